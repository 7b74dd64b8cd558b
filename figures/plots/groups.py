"""What bars and boxes in groups share: where each stands in its group, the paper's values over them, ticks and legend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import style
from figures.plots import data

GROUP = 0.84
"""Share of the distance between two groups that bars and boxes fill."""

HOLLOW: Mapping[str, Any] = {
    "linestyle": "none",
    "marker": "D",
    "markersize": 4,
    "markerfacecolor": "none",
    "markeredgecolor": style.INK,
    "markeredgewidth": 0.8,
}


def centre(place: int, count: int) -> float:
    """Where in its group the one at `place` of `count` stands, the group's own centre being 0."""
    return ((place + 0.5) / count - 0.5) * GROUP


def mark_published(axes: Axes, series: list[data.Series], levels: list[Any], plot: Mapping[str, Any]) -> bool:
    """Mark the values of `plot["y"]` that the paper prints; whether there was any."""
    marks = [
        (group + centre(one.place, len(series)), data.published(plot, plot["y"], one.name, plot["x"], level))
        for one in series
        for group, level in enumerate(levels)
    ]
    marks = [(place, value) for place, value in marks if not math.isnan(value)]
    if marks:
        axes.plot(*zip(*marks, strict=True), **HOLLOW, clip_on=False, zorder=3)
    return bool(marks)


def label_groups(axes: Axes, plot: Mapping[str, Any], levels: list[Any]) -> None:
    """A label under each group, and the axes' own."""
    axes.set_xticks(range(len(levels)), [data.level_label(level, plot) for level in levels])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_xlabel(str(plot.get("x_label") or plot["x"]))
    axes.set_ylabel(str(plot.get("y_label") or plot["y"]))
    axes.grid(axis="y")


def legend(figure: Figure, handles: list[Any], labels: list[str], published: str | None) -> None:
    """The legend over the figure; `published` is what the paper's marks are called, None where there are none."""
    if published is not None:
        handles, labels = [*handles, Line2D([], [], **HOLLOW)], [*labels, published]
    columns = data.legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, borderaxespad=0.3)
