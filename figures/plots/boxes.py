"""Boxes in groups: one group per level of x, one box per series, on a logarithmic axis unless `y_scale: linear` is said.

`y` names the median and holds `p50`; the same name with `p5`, `p25`, `p75` and `p95` in its place gives whiskers and box, so
those columns must be in the table. A series without a number leaves a gap. Medians that the paper prints are hollow diamonds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from pandas import DataFrame

from figures import PlotError, style
from figures.plots import data, groups


def build(table: DataFrame, plot: Mapping[str, Any]) -> Figure:
    """Draw the distribution around `plot["y"]` of `table` over `plot["x"]`; one row per series and level."""
    x, y = data.key(plot, "x"), data.key(plot, "y")
    if "p50" not in y:
        raise PlotError(f"plot.y: {y!r}: name a column of medians, with p50 in its name")
    data.require(table, x, *(y.replace("p50", share) for share in ("p5", "p25", "p50", "p75", "p95")))
    figure = style.figure(plot, height_in=2.3)
    axes = figure.subplots()
    series, levels = data.series(table, plot), data.levels(table, x)
    for one in series:
        _boxes(axes, table[table["series"] == one.name], one, levels, len(series), plot)
    patches = [Patch(facecolor=_colour(one), edgecolor=style.INK, linewidth=0.5) for one in series]
    published = "paper, median" if groups.mark_published(axes, series, levels, plot) else None
    axes.set_yscale("log" if plot.get("y_scale", "log") == "log" else "linear")
    groups.label_groups(axes, plot, levels)
    groups.legend(figure, patches, [one.label for one in series], published)
    return figure


def _colour(one: data.Series) -> str:
    return style.COLOURS[one.place % len(style.COLOURS)]


def _boxes(axes: Axes, rows: DataFrame, one: data.Series, levels: list[Any], count: int, plot: Mapping[str, Any]) -> None:
    y = str(plot["y"])
    stats, places = list[dict[str, Any]](), list[float]()
    for group, level in enumerate(levels):
        found = {share: data.value_at(rows, plot["x"], level, y.replace("p50", share)) for share in _KEYS}
        if all(map(math.isfinite, found.values())):
            stats.append({key: found[share] for share, key in _KEYS.items()} | {"fliers": []})
            places.append(group + groups.centre(one.place, count))
    if stats:
        axes.bxp(
            stats,
            positions=places,
            widths=0.8 * groups.GROUP / count,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": _colour(one), "edgecolor": style.INK, "linewidth": 0.5},
            medianprops={"color": style.INK, "linewidth": 0.9},
            whiskerprops={"color": style.INK, "linewidth": 0.5},
            capprops={"color": style.INK, "linewidth": 0.5},
        )


_KEYS: Mapping[str, str] = {"p5": "whislo", "p25": "q1", "p50": "med", "p75": "q3", "p95": "whishi"}
