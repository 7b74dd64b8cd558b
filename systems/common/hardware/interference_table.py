"""Co-run slowdowns that were measured, from a CSV file.

Columns: `serving_phase` (`decode` or `prefill`), `serving_size` (sequences or tokens), `tuning_phase`, `tuning_tokens`,
`sm_limit` (share of the SMs left to tuning, 0 to 1), `serving_slowdown`, `tuning_slowdown` (times, at least 1, against running
alone and unlimited), and optionally `way`: how the two share the GPU (`interference.STREAMS`, the default, `STEADY`, `GREEN`,
`MPS`). For a way that was not measured a near one stands in (`INSTEAD`). Rows of the serving phase `idle` tell what a limit
alone does to tuning.

Interpolation is linear: between serving sizes, then between tuning tokens, beyond them as at the edge. Between limits it is
serving's slowdown and tuning's speed (1 / slowdown) that are interpolated; where a way was measured at several limits they go
on to 1 and 0 at a limit of 0, where nothing tunes. Green contexts of all SMs are steady tuning on plain streams.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from systems.common.errors import InputError
from systems.common.hardware.interference import GREEN, MPS, STEADY, STREAMS, Load, Slowdowns

NUMBERS = ("serving_size", "tuning_tokens", "sm_limit", "serving_slowdown", "tuning_slowdown")
COLUMNS = ("serving_phase", "tuning_phase", *NUMBERS)
WAY = "way"
WAYS = (STREAMS, STEADY, GREEN, MPS)
INSTEAD = {STREAMS: (STEADY,), STEADY: (STREAMS,), GREEN: (), MPS: (STEADY, STREAMS)}
IDLE = "idle"
"""The serving phase of rows in which nothing is served."""
NEAR = 0.1
"""A limit that lies so near to a measured one, and between none, is taken for it."""
Key = tuple[str, str, str, float]


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
    """Slowdowns of one pair of phases in one way at one limit, by tuning tokens, then by serving size; sizes may differ."""

    values: Mapping[float, Mapping[float, Slowdowns]]

    def at(self, size: float, tokens: float) -> Slowdowns:
        """Linear in the size for the two nearest tokens, then between those."""
        serving = tuning = 0.0
        for near, weight in _between(sorted(self.values), tokens):
            row = self.values[near]
            for place, share in _between(sorted(row), size):
                serving += weight * share * row[place].serving
                tuning += weight * share * row[place].tuning
        return Slowdowns(serving, tuning)


class MeasuredInterference:
    """An `Interference` that looks measured slowdowns up."""

    def __init__(self, grids: Mapping[Key, Grid], source: str) -> None:
        self._grids = grids
        self.source = source

    def slowdowns(self, serving: Load, tuning: Load) -> Slowdowns:
        """Slowdowns while both run; at the nearest limit where there is none on both sides of tuning's own.

        Raises:
            InputError: that pair of phases was never measured.
        """
        return self._at(serving.phase, serving.size, tuning)

    def alone(self, tuning: Load) -> float:
        """How many times longer tuning takes with nothing beside it.

        Raises:
            InputError: that phase was never measured so.
        """
        return self._at(IDLE, 0, tuning).tuning

    def covers(self, serving_phase: str, tuning: Load) -> bool:
        """Whether tuning's limit is one of those measured with that serving phase, near to one, or between two."""
        limits, wanted = self.limits(serving_phase, tuning.phase, tuning.tenant.way), tuning.tenant.sm_limit
        return len(limits) > 1 or any(abs(limit - wanted) <= NEAR for limit in limits)

    def limits(self, serving_phase: str, tuning_phase: str, way: str = STREAMS) -> list[float]:
        """The SM limits at which a pair of phases was measured in that way, or in the first of `INSTEAD` that was."""
        return sorted(self._keys(serving_phase, tuning_phase, way))

    def _keys(self, serving_phase: str, tuning_phase: str, way: str) -> dict[float, Key]:
        by_way = [
            {key[3]: key for key in self._grids if key[:3] == (serving_phase, tuning_phase, one)}
            for one in (way, *INSTEAD[way])
        ]
        found = next((keys for keys in by_way if keys), {})
        return {**self._keys(serving_phase, tuning_phase, STEADY), **found} if way == GREEN else found

    def _at(self, serving_phase: str, size: float, tuning: Load) -> Slowdowns:
        keys = self._keys(serving_phase, tuning.phase, tuning.tenant.way)
        if not keys:
            pair = (serving_phase, tuning.phase)
            raise InputError(self.source, "serving_phase, tuning_phase", pair, "measure this pair of phases too")
        wanted, limits = tuning.tenant.sm_limit, sorted(keys)
        if len(limits) > 1:
            limits.insert(0, 0.0)
        serving = speed = 0.0
        for limit, weight in _between(limits, wanted):
            if not weight:
                continue
            slow = self._grids[keys[limit]].at(size, tuning.size) if limit else Slowdowns(1.0, math.inf)
            serving += weight * slow.serving
            speed += weight / slow.tuning
        return Slowdowns(serving, 1 / speed)


def read_interference(path: Path) -> MeasuredInterference:
    """Read a table of co-run slowdowns.

    Raises:
        InputError: unreadable file, missing column, a value that is no slowdown, a way that there is none of.
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
    cells: dict[Key, dict[float, dict[float, Slowdowns]]] = {}
    for line, row in enumerate(rows, start=2):
        size, tokens, limit, serving, tuning = (_number(path, line, row, column) for column in NUMBERS)
        if (way := row.get(WAY) or STREAMS) not in WAYS:
            raise InputError(f"{path} line {line}", WAY, way, f"use one of {', '.join(WAYS)}")
        if not 0 < limit <= 1:
            raise InputError(f"{path} line {line}", "sm_limit", limit, "give a share above 0, at most 1")
        key = (str(row["serving_phase"]), str(row["tuning_phase"]), way, limit)
        cells.setdefault(key, {}).setdefault(tokens, {})[size] = Slowdowns(serving, tuning)
    return MeasuredInterference({key: Grid(values) for key, values in cells.items()}, f"co-run slowdowns measured, {path.name}")


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
