"""A figure's table as the claims see it: rows of plain cells, which columns are factors, which one is the objective."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.claims.models import At, Level, Range
from systems.registry import InputError

Cell = str | float | bool | None
#: One point of a figure: the levels of its factors, in the order of the table's factors.
Point = tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` have a cell `series` and one per factor; what else they have is the figure's own business."""

    factors: tuple[str, ...]
    objective: str
    rows: tuple[Mapping[str, Cell], ...]

    def select(self, series: str, at: At) -> Iterator[Mapping[str, Cell]]:
        """The rows of `series` that meet every condition of `at`."""
        for row in self.rows:
            if row["series"] == series and all(_meets(row.get(name), want) for name, want in at.items()):
                yield row

    def point(self, row: Mapping[str, Cell]) -> Point:
        """The levels of `row`'s factors."""
        return tuple(row.get(name) for name in self.factors)

    def numbers(self, series: str, at: At, column: str | None) -> dict[Point, float]:
        """The finite numbers in `column` (absent: the objective) of `series`, by point; what has none is left out."""
        found = ((self.point(row), _number(row.get(column or self.objective))) for row in self.select(series, at))
        return {point: number for point, number in found if number is not None}

    def lines(self, series: str, at: At, column: str | None, along: str) -> dict[Point, dict[float, float]]:
        """The numbers of `series` by level of the factor `along`, levels rising; one line per combination of the others."""
        place = self.factors.index(along)
        lines: dict[Point, dict[float, float]] = {}
        for point, number in self.numbers(series, at, column).items():
            level = _number(point[place])
            if level is not None:
                lines.setdefault(point[:place] + point[place + 1 :], {})[level] = number
        return {others: dict(sorted(line.items())) for others, line in lines.items()}

    def say(self, point: Point) -> str:
        """`point` in words, e.g. `rate_rps=0.5`."""
        return ", ".join(f"{name}={_short(level)}" for name, level in zip(self.factors, point, strict=True))


def read_table(path: Path, factors: Sequence[str], objective: str) -> Table:
    """Read a figure's table.csv.

    Raises:
        InputError: the file cannot be read, or lacks the column `series`, a factor or the objective.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = tuple(_row(raw) for raw in reader)
            header = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise InputError(path, "table", what, "draw the figure again to write it anew") from error
    for name in ("series", *factors, objective):
        if name not in header:
            raise InputError(path, "columns", ", ".join(header), f"column {name} is missing: draw the figure again")
    return Table(tuple(factors), objective, rows)


def _row(raw: Mapping[str, str | None]) -> dict[str, Cell]:
    return {name: text if name == "series" else _cell(text) for name, text in raw.items()}


def _cell(text: str | None) -> Cell:
    if not text:
        return None
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _number(cell: Cell) -> float | None:
    if cell is None or isinstance(cell, str) or not math.isfinite(cell):
        return None
    return float(cell)


def _meets(cell: Cell, want: Range | Level) -> bool:
    if not isinstance(want, Range):
        return _same(cell, want)
    number = _number(cell)
    return number is not None and want.holds(number)


def _same(cell: Cell, want: Level) -> bool:
    if isinstance(want, bool | str) or isinstance(cell, bool | str | None):
        return type(cell) is type(want) and cell == want
    return math.isclose(cell, want, rel_tol=1e-9)  # one was typed by hand, the other may have been through a CSV file


def _short(level: Cell) -> str:
    return f"{level:g}" if isinstance(level, float) else str(level)
