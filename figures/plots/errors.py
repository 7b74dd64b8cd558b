"""Signed relative errors: a panel per metric, a row per workload, a mark per statistic, a colour per series.

The table has columns `series`, `workload`, `metric`, `statistic`, `error` (a fraction) and `aim` (the largest |error| aimed
at, drawn as a band; empty where there is none). Further keys of the plot: `metrics` (metric to label, in order).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame

from figures import style
from figures.plots import data

STATISTICS = {"p50": "o", "p90": "s", "p99": "^", "rate": "D"}
"""A `rate` has one value. Only those that the table has are in the legend."""


def build(table: DataFrame, plot: Mapping[str, Any]) -> Figure:
    """Draw the errors of `table`."""
    data.require(table, "workload", "metric", "statistic", "error", "aim")
    data.key(plot, "metrics")
    metrics: Mapping[str, str] = plot["metrics"]
    workloads = list(dict.fromkeys(table["workload"]))
    series = data.series(table, plot)
    figure = style.figure(plot, height_in=0.9 + 0.32 * len(workloads) * max(1, len(series)) / 2)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (metric, label) in zip(panels, metrics.items(), strict=True):
        _panel(axes, table[table["metric"] == metric], series, workloads)
        axes.set_xlabel(f"{label}: error (%)")
    shown = set(table.loc[table["metric"].isin(list(metrics)), "statistic"])
    handles = [
        Line2D([], [], color=style.COLOURS[one.place % len(style.COLOURS)], marker="o", linestyle="none", label=one.label)
        for one in series
    ]
    handles += [
        Line2D([], [], color=style.INK, marker=marker, markerfacecolor="none", linestyle="none", label=name)
        for name, marker in STATISTICS.items()
        if name in shown
    ]
    labels = [str(handle.get_label()) for handle in handles]
    columns = data.legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, borderaxespad=0.3)
    return figure


def _panel(axes: Axes, rows: DataFrame, series: list[data.Series], workloads: list[str]) -> None:
    aims = rows["aim"].dropna()
    if len(aims):
        axes.axvspan(-100 * aims.max(), 100 * aims.max(), color=style.COLOURS[2], alpha=0.15, linewidth=0)
    axes.axvline(0, color=style.INK, linewidth=0.6)
    for place, workload in enumerate(workloads):
        for one in series:
            shift = (one.place - (len(series) - 1) / 2) * 0.3
            for statistic, marker in STATISTICS.items():
                here = rows[(rows["workload"] == workload) & (rows["series"] == one.name) & (rows["statistic"] == statistic)]
                colour = style.COLOURS[one.place % len(style.COLOURS)]
                axes.plot(100 * here["error"], [place + shift] * len(here), marker, color=colour, markersize=3.5)
    axes.set_yticks(range(len(workloads)), workloads)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
