"""The search itself: every probe, its knob against the objective; a row per series and knob, a column per level of x.

The table has a row per probe: `series`, the factors, `knob_<name>` (NaN where a series has not that knob), the
objective, `<metric>_over_limit` for each limit (measured / limit; 1 or less meets it, NaN breaks it) and `chosen`.
A probe that meets all limits is filled; one that breaks a limit carries that limit's cross; the chosen one is ringed.
Further keys of the plot: `limit_labels` and `knob_labels` (name to label), `knob_scales` (name to `linear` or `log`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter
from pandas import DataFrame, Series

from figures import PlotError, style
from figures.plots import data

_SUFFIX = "_over_limit"
_CROSSES = ("x", "+", "1", "2", "3", "4")


def build(table: DataFrame, plot: Mapping[str, Any]) -> Figure:
    """Draw the probes of `table`."""
    x, y = data.key(plot, "x"), data.key(plot, "y")
    data.require(table, "series", x, y, "chosen")
    limits = [str(column) for column in table.columns if str(column).endswith(_SUFFIX)]
    panels = [(one, knob) for one in data.series(table, plot) for knob in _knobs(table, one.name)]
    if not panels:
        raise PlotError("table: no series has a knob: there was no search to draw")
    levels = data.levels(table, x)
    # a page wide whatever the figure itself is: there is a panel for each of its bars
    figure = style.figure({"width": "page"}, height_in=0.6 + 1.3 * len(panels))
    grid = figure.subplots(len(panels), len(levels), squeeze=False, sharex="row", sharey=True)
    for (one, knob), row in zip(panels, grid, strict=True):
        for level, axes in zip(levels, row, strict=True):
            rows = table[(table["series"] == one.name) & (table[x] == level)]
            _panel(axes, rows, f"knob_{knob}", y, limits, one)
        _dress_row(row, one, knob, plot, table)
    for level, axes in zip(levels, grid[0], strict=True):
        axes.set_title(f"{x}={data.level_label(level, plot)}" if level == levels[0] else data.level_label(level, plot))
    figure.supylabel(str(plot.get("y_label") or y), fontsize=8)
    _legend(figure, limits, plot)
    return figure


def _knobs(table: DataFrame, name: str) -> list[str]:
    rows = table[table["series"] == name]
    return [str(c).removeprefix("knob_") for c in table.columns if str(c).startswith("knob_") and rows[c].notna().any()]


def _panel(axes: Axes, rows: DataFrame, knob: str, y: str, limits: Sequence[str], one: data.Series) -> None:
    colour = style.COLOURS[one.place % len(style.COLOURS)]
    within = rows[limits].le(1).all(axis=1) if limits else rows[y].notna()
    good, chosen = rows[within], rows[rows["chosen"].astype(bool)]
    _dots(axes, good[knob], good[y], {"marker": "o", "markersize": 3.5, "color": colour})
    for limit, cross in zip(limits, _CROSSES, strict=False):
        bad = rows[~rows[limit].le(1)]
        _dots(axes, bad[knob], bad[y], {"marker": cross, "markersize": 5, "color": colour})
    _dots(axes, chosen[knob], chosen[y], _RING)
    axes.grid()


def _dots(axes: Axes, xs: Series[float], ys: Series[float], look: Mapping[str, Any]) -> None:
    if ys.notna().any():  # an empty line that is not clipped would upset the layout
        axes.plot(xs, ys, **{"linestyle": "none", **look}, clip_on=False)


_RING: Mapping[str, Any] = {
    "marker": "o",
    "markersize": 8,
    "markerfacecolor": "none",
    "markeredgecolor": style.INK,
    "markeredgewidth": 0.9,
}


def _dress_row(row: Sequence[Axes], one: data.Series, knob: str, plot: Mapping[str, Any], table: DataFrame) -> None:
    values = table.loc[table["series"] == one.name, f"knob_{knob}"].dropna()
    wide = bool(values.min() > 0 and values.max() >= 10 * values.min())
    scale = (plot.get("knob_scales") or {}).get(knob) or ("log" if wide else "linear")
    for axes in row:
        axes.set_ylim(bottom=0)
        axes.set_xscale(scale)
        if scale == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(nbins=3, min_n_ticks=2))
        else:
            axes.xaxis.set_major_locator(FixedLocator(_ends(float(values.min()), float(values.max()))))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    label = (plot.get("knob_labels") or {}).get(knob) or knob
    row[0].set_xlabel(str(label), loc="left")
    row[0].set_ylabel("\n".join(style.wrap(one.label, 8, 1.1)))


def _ends(low: float, high: float) -> list[float]:
    """Two numbers to write on a log axis: its panels are too narrow for powers of ten, which may not even be two."""
    return [low, high] if high > low else [low]


def _legend(figure: Figure, limits: Sequence[str], plot: Mapping[str, Any]) -> None:
    names = plot.get("limit_labels") or {}
    handles = [Line2D([], [], linestyle="none", marker="o", markersize=3.5, color=style.INK, label="meets the limits")]
    for limit, cross in zip(limits, _CROSSES, strict=False):
        metric = limit.removesuffix(_SUFFIX)
        label = f"{names.get(metric, metric)} over its limit"
        handles.append(Line2D([], [], linestyle="none", marker=cross, markersize=5, color=style.INK, label=label))
    handles.append(Line2D([], [], linestyle="none", label="chosen", **_RING))
    labels = [str(handle.get_label()) for handle in handles]
    columns = data.legend_columns(labels, figure.get_figwidth())
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, borderaxespad=0.3)
