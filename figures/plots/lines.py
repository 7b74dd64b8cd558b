"""One line with markers per series; with `cdf: true` the share of rows up to each value of y.

Further keys of the plot: `x_scale` and `y_scale` (`linear`, `log`), `zero: false` to let y start above 0. Values that
the paper prints are hollow markers of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from pandas import DataFrame

from figures import PlotError, style
from figures.plots import data

_FEW = 8  # levels that get a tick each on a logarithmic axis


def build(table: DataFrame, plot: Mapping[str, Any]) -> Figure:
    """Draw `plot["y"]` of `table` over `plot["x"]`, or the distribution of `plot["y"]`."""
    y = data.key(plot, "y")
    data.require(table, y)
    figure = style.figure(plot, height_in=2.1)
    axes = figure.subplots()
    series = data.series(table, plot)
    for one in series:
        rows = table[table["series"] == one.name]
        _cdf(axes, rows, one, y) if plot.get("cdf") else _line(axes, rows, one, plot)
    handles, labels = axes.get_legend_handles_labels()
    if not plot.get("cdf") and _paper(axes, table, series, plot):
        handles.append(Line2D([], [], marker="o", markerfacecolor="none", markeredgecolor=style.INK, linestyle="none"))
        labels.append("paper")
    _dress(axes, plot)
    columns = data.legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, borderaxespad=0.3)
    return figure


def _look(one: data.Series) -> dict[str, Any]:
    return {
        "color": style.COLOURS[one.place % len(style.COLOURS)],
        "marker": style.MARKERS[one.place % len(style.MARKERS)],
        "linestyle": style.DASHES[one.place % len(style.DASHES)],
        "label": one.label,
    }


def _line(axes: Axes, rows: DataFrame, one: data.Series, plot: Mapping[str, Any]) -> None:
    x = data.key(plot, "x")
    data.require(rows, x)
    points = [(level, data.value_at(rows, x, level, plot["y"])) for level in data.levels(rows, x)]
    there = [point for point in points if not math.isnan(point[1])]  # a level that only other series have cuts no line
    axes.plot([level for level, _ in there], [value for _, value in there], **_look(one), clip_on=False)


def _cdf(axes: Axes, rows: DataFrame, one: data.Series, y: str) -> None:
    """Every row is one observation; one that never came (NaN, infinite) keeps the curve below 1."""
    values = np.asarray(rows[y], dtype=float)
    finite = np.sort(values[np.isfinite(values)])
    shares = np.arange(1, len(finite) + 1) / max(len(values), 1)
    axes.plot(finite, shares, drawstyle="steps-post", markevery=max(1, len(finite) // 8), **_look(one))


def _paper(axes: Axes, table: DataFrame, series: list[data.Series], plot: Mapping[str, Any]) -> bool:
    """Mark what the paper prints; whether there was anything."""
    found = False
    for one in series:
        marks = [(x, data.published(plot, plot["y"], one.name, plot["x"], x)) for x in data.levels(table, plot["x"])]
        marks = [(x, value) for x, value in marks if not math.isnan(value)]
        if marks:
            found = True
            hollow = _look(one) | {"linestyle": "none", "label": "_paper", "markersize": 6.5}
            axes.plot(*zip(*marks, strict=True), **hollow, markerfacecolor="none", clip_on=False)
    return found


def _ticks_at_levels(axes: Axes, plot: Mapping[str, Any]) -> None:
    """Mark the levels themselves where they are few: nobody measures at powers of ten."""
    levels = sorted({float(x) for line in axes.get_lines() for x in np.asarray(line.get_xdata(), dtype=float)})
    if len(levels) <= _FEW:
        axes.set_xticks(levels, [data.level_label(level, plot) for level in levels])
        axes.xaxis.set_minor_locator(NullLocator())


def _ticks_within_a_decade(axes: Axes) -> None:
    """Where y spans less than two powers of ten: 1, 2 and 5 times each of them, as plain numbers."""
    low, high = axes.get_ylim()
    if 0 < high / max(low, 1e-300) < 100:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _dress(axes: Axes, plot: Mapping[str, Any]) -> None:
    cdf = bool(plot.get("cdf"))
    for axis in ("x_scale", "y_scale"):
        if plot.get(axis, "linear") not in ("linear", "log"):
            raise PlotError(f"plot.{axis}: {plot[axis]!r}: use linear or log")
    axes.set_xscale(plot.get("x_scale", "linear"))
    if plot.get("x_scale") == "log" and not cdf:
        _ticks_at_levels(axes, plot)
    axes.set_yscale(plot.get("y_scale", "linear"))
    if plot.get("y_scale") == "log":
        _ticks_within_a_decade(axes)
    if cdf:
        axes.set_ylim(0, 1)
    elif plot.get("zero", True) and plot.get("y_scale", "linear") == "linear":
        axes.set_ylim(bottom=0)
    axes.set_xlabel(str(plot.get("x_label") or (plot.get("y") if cdf else plot.get("x"))))
    axes.set_ylabel(str(plot.get("y_label") or ("Share of requests" if cdf else plot.get("y"))))
    axes.grid()
