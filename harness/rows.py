"""The rows of a series on disk: a parquet file with a row per point, and in its metadata what the rows are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness.atomic import write_atomically
from harness.columns import table_of
from systems.registry import InputError, Scalar

Row = dict[str, Scalar]
_KEY = b"fivefold"


@dataclass(frozen=True, slots=True)
class About:
    """What stands behind the rows of one or more series; every list is sorted and has each entry once.

    `commits` are git commits, with `+` where files differed from the commit; `datasets` and `stand_ins` are names;
    `trials` are hashes; `notes` are what the trials want said under the figure.
    """

    hardware: list[str] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    stand_ins: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trials: list[str] = field(default_factory=list)


def merged(abouts: Iterable[About]) -> About:
    """All of `abouts` in one."""
    parts = [asdict(about) for about in abouts]
    return About(**{name: sorted({entry for part in parts for entry in part[name]}) for name in asdict(About())})


def write_rows(path: Path, rows: Sequence[Row], about: About) -> None:
    """Write `rows`, all with the same keys, as parquet. A column of both texts and numbers becomes text."""
    import pyarrow  # not at import: a job spends its first second better
    import pyarrow.parquet

    table = table_of({name: _alike([row[name] for row in rows]) for name in rows[0]})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table.replace_schema_metadata({_KEY: json.dumps(asdict(about))}), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_rows(path: Path) -> tuple[list[Row], About]:
    """What `write_rows` wrote. Raises InputError when it is no such file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # `read_table` loads three times as many modules
            table = file.read()
        told: Mapping[str, list[str]] = json.loads(table.schema.metadata[_KEY])
        return table.to_pylist(), About(**told)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(path, "rows", str(error), "delete this file: the next run writes it again") from error


def _alike(values: Sequence[Scalar]) -> list[Scalar]:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) <= 1:
        return list(values)
    return [None if value is None else str(value) for value in values]
