"""Figures: `<system>/<figure>.yaml` says what to run, what to plot and what the paper claims; the rest draws.

A figure is a function of a table: nothing here knows a system or runs anything.

* `draw`: draw a table as one kind of plot.
* `KINDS`: the kinds, each a module of `figures.plots` with a function `build`. Adding a kind is one module and one line.
* `style`: fonts, colours, page widths, and how a PDF is written so that it comes out the same every time.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

#: Plot kind to module. Modules are imported when drawn, so that reading a figure file does not load matplotlib.
KINDS: Mapping[str, str] = {
    "boxes": "figures.plots.boxes",
    "errors": "figures.plots.errors",
    "grouped_bars": "figures.plots.grouped_bars",
    "lines": "figures.plots.lines",
    "panels": "figures.plots.panels",
    "table": "figures.plots.table",
    "search_trace": "figures.plots.search_trace",
}


class PlotError(ValueError):
    """A plot asks for something that its table or its kind does not have; the text says what, in one line."""


def draw(kind: str, table: DataFrame, plot: Mapping[str, Any], out: Path) -> None:
    """Draw `table` as a plot of `kind` into the PDF file `out`, whole or not at all.

    Keys of `plot` that every kind knows: `series` (list of {name, label}, in the order of the legend), `x`, `x_label`,
    `x_labels` (level to label), `y`, `y_label`, `published` (the paper's own values: {series, at, value, column?}),
    `width` ("column" or "page"), `height_in`, `title`, `footer`. Each kind's module says what else it reads.

    The same table and plot give the same bytes, on any run.

    Raises:
        PlotError: the kind is unknown, or the table lacks a column or a series that the plot names.
        OSError: the file cannot be written.
    """
    if kind not in KINDS:
        raise PlotError(f"plot.kind: {kind!r}: use one of {', '.join(KINDS)}")
    from figures import style  # not at import: matplotlib is slow to load

    with style.context():
        figure = importlib.import_module(KINDS[kind]).build(table, plot)
        style.save(figure, plot, out)
