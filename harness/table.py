"""A figure's table.csv: the rows of its series, in the order of the figure file. The same rows give the same bytes.

    python -m harness.table --figure figures/<system>/<figure>.yaml --series NAME.parquet... --out table.csv

Columns: `series`, the factors, the objective, the figure's `columns`, `knob_<name>`, `feasible`, `outcome`, `probes`,
`trial`. A cell that is absent is empty; numbers are written so that they read back exactly; a column in which one
number has a fraction has fractions throughout.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from harness import cli
from harness.atomic import write_atomically
from harness.figure_file import FigureFile, load_figure
from harness.leftovers import sweep
from harness.rows import Row, read_rows
from systems.registry import InputError, Scalar


def columns(figure: FigureFile) -> list[str]:
    """The columns of table.csv."""
    knobs = [f"knob_{name}" for name in figure.knobs]
    return ["series", *figure.factors, figure.objective, *figure.columns, *knobs, "feasible", "outcome", "probes", "trial"]


def as_csv(rows: Sequence[Row], names: Sequence[str]) -> str:
    """`rows` as CSV with the columns `names`, lines ending in a line feed."""
    cells = [[_text(value) for value in _alike([row[name] for row in rows])] for name in names]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*cells, strict=True))
    return file.getvalue()


def _alike(values: Sequence[Scalar]) -> list[Scalar]:
    kinds = {type(value) for value in values if value is not None}
    return [float(value) if type(value) is int else value for value in values] if kinds == {int, float} else list(values)


def _text(value: Scalar) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table of one figure."""
    parser = argparse.ArgumentParser(prog="python -m harness.table")
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--series", type=Path, nargs="+", required=True, help="parquet files of harness.series")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    figure = load_figure(args.figure)
    by_series = {str(rows[0]["series"]): rows for rows in (read_rows(path)[0] for path in args.series)}
    missing = [series.name for series in figure.series if series.name not in by_series]
    if missing:
        raise InputError(args.figure, "series", ", ".join(missing), "their parquet files are not among those given")
    sweep(args.out.parent)
    rows = [row for series in figure.series for row in by_series[series.name]]
    write_atomically(args.out, as_csv(rows, columns(figure)))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
