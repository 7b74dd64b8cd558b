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
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from pandas import DataFrame

from figures import style
from figures.plots import data, groups


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
    published = "paper" if groups.mark_published(axes, series, levels, plot) else None
    groups.label_groups(axes, plot, levels)
    _scale(axes, plot)
    groups.legend(figure, handles, labels, published)
    return figure


def _bars(axes: Axes, rows: DataFrame, one: data.Series, levels: list[Any], count: int, plot: Mapping[str, Any]) -> None:
    heights = [data.value_at(rows, plot["x"], level, plot["y"]) for level in levels]
    places = [group + groups.centre(one.place, count) for group in range(len(levels))]
    axes.bar(
        places,
        [0.0 if math.isnan(height) else height for height in heights],
        width=groups.GROUP / count,
        label=one.label,
        facecolor=style.COLOURS[one.place % len(style.COLOURS)],
        hatch=style.HATCHES[one.place % len(style.HATCHES)],
        edgecolor=style.INK,
        linewidth=0.5,
    )
    for place, height in zip(places, heights, strict=True):
        if height == 0:
            axes.annotate("0", (place, 0), (0, 1), textcoords="offset points", ha="center", va="bottom", fontsize=7)


def _scale(axes: Axes, plot: Mapping[str, Any]) -> None:
    heights = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_height() > 0]
    if plot.get("y_scale") == "log" and heights:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())  # powers of ten are enough
        axes.set_ylim(bottom=10.0 ** math.floor(math.log10(min(heights)) - 0.05))
    else:
        axes.set_ylim(bottom=0)
    if not heights:  # every bar is 0: matplotlib would show a meaningless scale
        axes.set_ylim(0, 1)
