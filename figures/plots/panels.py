"""Lines in panels side by side: x is the first factor, a panel per level of the second, a line per series.

The second factor is the one column of the table, besides `series` and x, that the published values or the rows vary by:
it is named by `plot["panel"]` where that is given, else it is the column right after x. Published values are hollow markers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame

from figures import PlotError, style
from figures.plots import data


def build(table: DataFrame, plot: Mapping[str, Any]) -> Figure:
    """Draw `plot["y"]` of `table` over `plot["x"]`, a panel per level of the second factor."""
    x, y = data.key(plot, "x"), data.key(plot, "y")
    data.require(table, x, y)
    panel = _panel(table, plot, x, y)
    figure = style.figure(plot, height_in=2.1)
    levels = data.levels(table, panel)
    every = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    series = data.series(table, plot)
    found = [
        _draw(axes, table[table[panel] == level], series, panel, level, plot) for axes, level in zip(every, levels, strict=True)
    ]
    every[0].set_ylabel(str(plot.get("y_label") or y))
    handles, labels = every[0].get_legend_handles_labels()
    if any(found):
        handles.append(Line2D([], [], marker="o", markerfacecolor="none", markeredgecolor=style.INK, linestyle="none"))
        labels.append("paper")
    columns = data.legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, borderaxespad=0.3)
    return figure


def _panel(table: DataFrame, plot: Mapping[str, Any], x: str, y: str) -> str:
    named = plot.get("panel")
    if named:
        data.require(table, str(named))
        return str(named)
    columns = [str(column) for column in table.columns]
    after = columns[columns.index(x) + 1 :]
    if not after or after[0] == y:
        raise PlotError("table: this kind needs a second factor: use lines for one")
    return after[0]


def _look(one: data.Series) -> dict[str, Any]:
    return {
        "color": style.COLOURS[one.place % len(style.COLOURS)],
        "marker": style.MARKERS[one.place % len(style.MARKERS)],
        "linestyle": style.DASHES[one.place % len(style.DASHES)],
        "label": one.label,
    }


def _draw(axes: Axes, rows: DataFrame, series: list[data.Series], panel: str, level: object, plot: Mapping[str, Any]) -> bool:
    """One panel; whether the paper prints a value in it."""
    x, y, paper = plot["x"], plot["y"], False
    levels = data.levels(rows, x)
    for one in series:
        mine = rows[rows["series"] == one.name]
        axes.plot(levels, [data.value_at(mine, x, place, y) for place in levels], **_look(one), clip_on=False)
        marks = [
            (place, value) for place in levels if not math.isnan(value := _published(plot, one.name, {x: place, panel: level}))
        ]
        if marks:
            paper = True
            hollow = _look(one) | {"linestyle": "none", "label": "_paper", "markersize": 6.5}
            axes.plot(*zip(*marks, strict=True), **hollow, markerfacecolor="none", clip_on=False)
    text = f"{level:g}" if isinstance(level, int | float) else str(level)
    axes.set_title(f"{panel.replace('_', ' ')} = {text}")
    axes.set_xscale(plot.get("x_scale", "linear"))
    axes.set_yscale(plot.get("y_scale", "linear"))
    if plot.get("zero", True) and plot.get("y_scale", "linear") == "linear":
        axes.set_ylim(bottom=0)
    axes.set_xlabel(str(plot.get("x_label") or x))
    axes.grid()
    return paper


def _published(plot: Mapping[str, Any], name: str, at: Mapping[str, object]) -> float:
    for entry in plot.get("published") or ():
        told: Mapping[str, object] = entry.get("at") or {}
        if entry["series"] == name and (entry.get("column") or plot["y"]) == plot["y"] and dict(told) == dict(at):
            return float(entry["value"])
    return math.nan
