"""Bars in groups: one group per level of x, one bar per series.

A bar of 0 is written as `0` on the axis, so that it differs from a number that is absent, which leaves a gap. Values
that the paper prints are hollow diamonds over our bars. `y_scale: log` begins at the power of ten below the least bar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from pandas import DataFrame

from figures import style
from figures.plots import data

_GROUP = 0.84  # share of the distance between two groups that bars fill


def build(table: DataFrame, plot: Mapping[str, Any]) -> Figure:
    """Draw `plot["y"]` of `table` over `plot["x"]`; one row per series and level."""
    x, y = data.key(plot, "x"), data.key(plot, "y")
    data.require(table, x, y)
    figure = style.figure(plot, height_in=2.1)
    axes = figure.subplots()
    series, levels = data.series(table, plot), data.levels(table, x)
    for one in series:
        _bars(axes, table[table["series"] == one.name], one, levels, len(series), plot)
    handles, labels = axes.get_legend_handles_labels()
    if _paper(axes, series, levels, plot):
        handles.append(Line2D([], [], **_HOLLOW))
        labels.append("paper")
    _dress(axes, plot, x, y, [data.level_label(level, plot) for level in levels])
    columns = data.legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, borderaxespad=0.3)
    return figure


_HOLLOW: Mapping[str, Any] = {
    "linestyle": "none",
    "marker": "D",
    "markersize": 4,
    "markerfacecolor": "none",
    "markeredgecolor": style.INK,
    "markeredgewidth": 0.8,
}


def _centre(place: int, count: int) -> float:
    """Where in its group the bar at `place` of `count` stands, the group's own centre being 0."""
    return ((place + 0.5) / count - 0.5) * _GROUP


def _bars(axes: Axes, rows: DataFrame, one: data.Series, levels: list[Any], count: int, plot: Mapping[str, Any]) -> None:
    heights = [data.value_at(rows, plot["x"], level, plot["y"]) for level in levels]
    places = [group + _centre(one.place, count) for group in range(len(levels))]
    axes.bar(
        places,
        [0.0 if math.isnan(height) else height for height in heights],
        width=_GROUP / count,
        label=one.label,
        facecolor=style.COLOURS[one.place % len(style.COLOURS)],
        hatch=style.HATCHES[one.place % len(style.HATCHES)],
        edgecolor=style.INK,
        linewidth=0.5,
    )
    for place, height in zip(places, heights, strict=True):
        if height == 0:
            axes.annotate("0", (place, 0), (0, 1), textcoords="offset points", ha="center", va="bottom", fontsize=7)


def _paper(axes: Axes, series: list[data.Series], levels: list[Any], plot: Mapping[str, Any]) -> bool:
    """Mark what the paper prints; whether there was anything."""
    marks = [
        (group + _centre(one.place, len(series)), data.published(plot, plot["y"], one.name, plot["x"], level))
        for one in series
        for group, level in enumerate(levels)
    ]
    marks = [(place, value) for place, value in marks if not math.isnan(value)]
    if marks:
        axes.plot(*zip(*marks, strict=True), **_HOLLOW, clip_on=False, zorder=3)
    return bool(marks)


def _dress(axes: Axes, plot: Mapping[str, Any], x: str, y: str, labels: list[str]) -> None:
    axes.set_xticks(range(len(labels)), labels)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    heights = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_height() > 0]
    if plot.get("y_scale") == "log" and heights:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())  # powers of ten are enough
        axes.set_ylim(bottom=10.0 ** math.floor(math.log10(min(heights)) - 0.05))
    else:
        axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] <= 0.06 and plot.get("y_scale") != "log":  # every bar is 0: matplotlib would show a meaningless scale
        axes.set_ylim(0, 1)
    axes.set_xlabel(str(plot.get("x_label") or x))
    axes.set_ylabel(str(plot.get("y_label") or y))
    axes.grid(axis="y")
