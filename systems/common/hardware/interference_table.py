"""Co-run slowdowns that were measured, from a CSV file.

Columns: `serving_phase` (`decode` or `prefill`), `serving_size` (sequences or tokens), `tuning_phase`, `tuning_tokens`,
`sm_limit` (share of the SMs left to tuning, 0 to 1), `serving_slowdown`, `tuning_slowdown` (times, at least 1). For every pair
of phases and limit the sizes form a full grid; between its points slowdowns are interpolated linearly, beyond it they stay
as at its edge.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from systems.common.errors import InputError
from systems.common.hardware.interference import Load, Slowdowns

NUMBERS = ("serving_size", "tuning_tokens", "sm_limit", "serving_slowdown", "tuning_slowdown")
COLUMNS = ("serving_phase", "tuning_phase", *NUMBERS)
Key = tuple[str, str, float]


def _between(points: Sequence[float], x: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The two neighbours of `x` among sorted `points`, each with its weight."""
    place = min(max(bisect_right(points, x), 1), len(points) - 1) if len(points) > 1 else 0
    if not place:
        return (points[0], 1.0), (points[0], 0.0)
    low, high = points[place - 1], points[place]
    share = min(1.0, max(0.0, (x - low) / (high - low)))
    return (low, 1.0 - share), (high, share)


@dataclass(frozen=True, slots=True)
class Grid:
    """Slowdowns of one pair of phases at one limit over (serving size, tuning tokens)."""

    sizes: tuple[float, ...]
    tokens: tuple[float, ...]
    values: Mapping[tuple[float, float], Slowdowns]

    def at(self, size: float, tokens: float) -> Slowdowns:
        """Bilinear interpolation."""
        corners = list(product(_between(self.sizes, size), _between(self.tokens, tokens)))
        weighted = [(a[1] * b[1], self.values[a[0], b[0]]) for a, b in corners]
        return Slowdowns(sum(w * v.serving for w, v in weighted), sum(w * v.tuning for w, v in weighted))


class MeasuredInterference:
    """An `Interference` that looks measured slowdowns up."""

    def __init__(self, grids: Mapping[Key, Grid], source: str) -> None:
        self._grids = grids
        self.source = source

    def slowdowns(self, serving: Load, tuning: Load) -> Slowdowns:
        """Slowdowns while both run, at the measured SM limit nearest to tuning's own.

        Raises:
            InputError: that pair of phases was never measured.
        """
        pair = (serving.phase, tuning.phase)
        if not (limits := self.limits(*pair)):
            raise InputError(self.source, "serving_phase, tuning_phase", pair, "measure this pair of phases too")
        nearest = min(limits, key=lambda limit: abs(limit - tuning.tenant.sm_limit))
        return self._grids[(*pair, nearest)].at(serving.size, tuning.size)

    def limits(self, serving_phase: str, tuning_phase: str) -> list[float]:
        """The SM limits at which a pair of phases was measured."""
        return [limit for a, b, limit in self._grids if (a, b) == (serving_phase, tuning_phase)]


def read_interference(path: Path) -> MeasuredInterference:
    """Read a table of co-run slowdowns.

    Raises:
        InputError: unreadable file, missing column, a value that is no slowdown, a hole in a grid.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "file", type(error).__name__, "give a readable CSV file in UTF-8") from error
    if not rows:
        raise InputError(path, "file", "no rows", "give at least one measured pair")
    for column in COLUMNS:
        if column not in rows[0]:
            raise InputError(path, "column", column, "missing: the head of interference_table.py lists the columns")
    cells: dict[Key, dict[tuple[float, float], Slowdowns]] = {}
    for line, row in enumerate(rows, start=2):
        size, tokens, limit, serving, tuning = (_number(path, line, row, column) for column in NUMBERS)
        key = (str(row["serving_phase"]), str(row["tuning_phase"]), limit)
        cells.setdefault(key, {})[size, tokens] = Slowdowns(serving, tuning)
    return MeasuredInterference(
        {key: _grid(path, key, values) for key, values in cells.items()}, f"co-run slowdowns measured, {path.name}"
    )


def _number(path: Path, line: int, row: Mapping[str, str | None], column: str) -> float:
    text = row[column]
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        value = math.nan
    least = 1.0 if column.endswith("slowdown") else 0.0
    if not math.isfinite(value) or value < least:
        raise InputError(f"{path} line {line}", column, text, f"give a number, at least {least:g}")
    return value


def _grid(path: Path, key: Key, values: Mapping[tuple[float, float], Slowdowns]) -> Grid:
    sizes, tokens = sorted({size for size, _ in values}), sorted({token for _, token in values})
    for hole in product(sizes, tokens):
        if hole not in values:
            raise InputError(path, f"{key[0]} x {key[1]}", hole, "this point of the grid is missing: measure it too")
    return Grid(tuple(sizes), tuple(tokens), values)
