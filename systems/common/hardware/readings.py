"""Reading a CSV of measurements, with every number checked.

`read_columns` is the one door by which measured tables come in: the numbers that it returns are finite and not negative.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from systems.common.errors import InputError


def read_columns(
    path: Path, numbers: Sequence[str], words: Sequence[str]
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """The columns of a CSV with a header: `numbers` as floats that are finite and at least 0, `words` as text.

    Raises:
        InputError: no such file, an empty one, a missing column, or a bad value, naming file, column, row and value.
            The header is row 1.
    """
    numbered: dict[str, list[float]] = {name: [] for name in numbers}
    worded: dict[str, list[str]] = {name: [] for name in words}
    for row, cells in _rows(path, (*numbers, *words)):
        for name, column in numbered.items():
            column.append(_number(path, name, row, cells[name]))
        for name, texts in worded.items():
            texts.append(cells[name] or "")
    return numbered, worded


def read_numbers(path: Path, columns: Sequence[str]) -> dict[str, list[float]]:
    """`read_columns` where all columns are numbers."""
    return read_columns(path, columns, ())[0]


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    """Row number and cells of each row, after a check of the header."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            for name in needed:
                if name not in header:
                    raise InputError(
                        path, "column", name, f"add it to the header, which has {', '.join(header[:12]) or 'nothing'}"
                    )
            empty = True
            for row in reader:
                empty = False
                yield reader.line_num, row
            if empty:
                raise InputError(path, "rows", 0, "put at least one measurement under the header")
    except FileNotFoundError:
        raise InputError(path.parent, "file", path.name, "put the file there; docs/hardware.md describes the format") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, "file", str(error), "give a readable CSV in UTF-8") from None


def _number(path: Path, column: str, row: int, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(path, f"column {column}, row {row}", text, "give a finite number that is not negative")
    return value
