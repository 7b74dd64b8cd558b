"""What the plot kinds share: reading the table and the plot's plain data, and saying what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pandas import DataFrame

from figures import PlotError, style


@dataclass(frozen=True, slots=True)
class Series:
    """One entry of the legend; `place` is its position, which decides its colour, hatch and marker."""

    name: str
    label: str
    place: int


def require(table: DataFrame, *columns: str) -> None:
    """Raise PlotError unless `table` has rows and all `columns`."""
    for column in columns:
        if column not in table.columns:
            raise PlotError(f"table: column {column!r} is missing: it has {', '.join(map(str, table.columns))}")
    if table.empty:
        raise PlotError("table: it has no rows: nothing to draw")


def key(plot: Mapping[str, Any], name: str) -> str:
    """The text under a key that this kind of plot cannot do without."""
    if not plot.get(name):
        raise PlotError(f"plot.{name}: missing: name a column of the table")
    return str(plot[name])


def series(table: DataFrame, plot: Mapping[str, Any]) -> list[Series]:
    """The series in the order of the legend; those of the table as they come where the plot names none."""
    require(table, "series")
    present = list(dict.fromkeys(table["series"]))
    named = plot.get("series") or [{"name": name} for name in present]
    found = [Series(entry["name"], str(entry.get("label") or entry["name"]), place) for place, entry in enumerate(named)]
    unknown = [name for name in present if name not in {one.name for one in found}]
    if unknown:
        raise PlotError(f"plot.series: the table also has {', '.join(map(str, unknown))}: name them too")
    return found


def levels(table: DataFrame, x: str) -> list[Any]:
    """The levels of a factor: numbers rising, names as they come."""
    found = list(dict.fromkeys(table[x]))
    return sorted(found) if all(isinstance(level, int | float) for level in found) else found


def level_label(level: object, plot: Mapping[str, Any]) -> str:
    """What to write for a level of x."""
    labels: Mapping[str, str] = plot.get("x_labels") or {}
    text = f"{level:g}" if isinstance(level, int | float) else str(level)
    return str(labels.get(str(level), labels.get(text, text)))


def value_at(rows: DataFrame, x: str, level: object, y: str) -> float:
    """The number of one series at one level; NaN where there is none."""
    cells = rows.loc[rows[x] == level, y]
    if len(cells) > 1:
        raise PlotError(f"table: {len(cells)} rows for {rows['series'].iloc[0]} at {x}={level}: this kind draws one")
    return float(cells.iloc[0]) if len(cells) else math.nan


def published(plot: Mapping[str, Any], column: str, name: str, x: str, level: object) -> float:
    """The paper's own number in `column` for a series at a level; NaN where it is not known."""
    objective = plot.get("y")
    for entry in plot.get("published") or ():
        at: Mapping[str, object] = entry.get("at") or {}
        if entry["series"] == name and (entry.get("column") or objective) == column and at.get(x) == level:
            return float(entry["value"])
    return math.nan


def legend_columns(labels: Sequence[str], width_in: float) -> int:
    """How many legend entries to put side by side: as few rows as fit, and those evenly filled."""
    entries = [0.42 + style.text_in(label, 7.5) for label in labels]  # handle, its gap and the gap to the next column
    for columns in range(len(entries), 1, -1):
        # matplotlib fills column by column, the first ones with one entry more
        if sum(max(part) for part in np.array_split(entries, columns)) <= width_in - 0.1:
            return math.ceil(len(entries) / math.ceil(len(entries) / columns))
    return 1
