"""A table as a vector drawing, ruled like one in a paper: one row per row of the table.

`columns` lists what to show: `{column, label, format}` for ours, `{published, label, format}` for a number that the
paper prints (`published` is the column's name there). `format` is a Python format such as `"{:.1f}"`; a number that is
absent shows as a dash. Where `columns` is absent every column is shown as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from pandas import DataFrame, isna

from figures import PlotError, style
from figures.plots import data

_PT = 8.0
_LINE_IN = 0.155
_PAD_IN = 0.07
_GAP_IN = 0.14


@dataclass(frozen=True, slots=True)
class _Column:
    label: str
    cells: tuple[str, ...]
    numeric: bool

    def least_in(self) -> float:
        """The width below which a cell or a word of the label would not fit."""
        return max(style.text_in(text, _PT) for text in (*self.cells, *self.label.split(), "-"))


def build(table: DataFrame, plot: Mapping[str, Any]) -> Figure:
    """Draw `table` with the columns that `plot` lists."""
    data.require(table)
    columns = [_column(table, plot, spec) for spec in plot.get("columns") or [{"column": name} for name in table.columns]]
    width = style.width_in(plot)
    widths = _widths(columns, width - 2 * style.MARGIN_IN)
    heads = [style.wrap(column.label, _PT, room + 1e-6, math=True) for column, room in zip(columns, widths, strict=True)]
    height = (len(table) + max(map(len, heads))) * _LINE_IN + 4 * _PAD_IN
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0, h_pad=0))
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(0, height))  # so that a place in the drawing is in inches
    axes.axis("off")
    _ink(axes, columns, widths, heads, height)
    return figure


def _column(table: DataFrame, plot: Mapping[str, Any], spec: Mapping[str, Any]) -> _Column:
    ours, papers = spec.get("column"), spec.get("published")
    if (ours is None) == (papers is None):
        raise PlotError(f"plot.columns: {dict(spec)!r}: give either column or published")
    name = str(papers if ours is None else ours)
    if ours is not None:
        data.require(table, name)
        values = list(table[name])
    else:
        x = data.key(plot, "x")
        data.require(table, x, "series")
        values = [data.published(plot, name, one, x, at) for one, at in zip(table["series"], table[x], strict=True)]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    cells = tuple(_cell(value, name, spec, plot) for value in values)
    return _Column(str(spec.get("label") or name), cells, numeric)


def _cell(value: object, name: str, spec: Mapping[str, Any], plot: Mapping[str, Any]) -> str:
    if isna(value):  # type: ignore[call-overload]
        return "-"
    if name == plot.get("x"):
        return data.level_label(value, plot)
    if name == "series":
        return next((str(one.get("label") or value) for one in plot.get("series") or () if one["name"] == value), str(value))
    try:
        return str(spec.get("format") or ("{:.6g}" if isinstance(value, float) else "{}")).format(value)
    except (ValueError, IndexError, KeyError) as error:
        raise PlotError(f"plot.columns: format {spec.get('format')!r} of {name}: {error}") from error


def _widths(columns: Sequence[_Column], room: float) -> list[float]:
    """Inches for each column; what is left over goes between them."""
    least = [column.least_in() for column in columns]
    spare = room - sum(least) - _GAP_IN * (len(columns) - 1)
    if spare < 0:
        raise PlotError(f"plot.width: the columns need {room - spare:.1f} in and have {room:.1f}: use page, or fewer columns")
    # a label that would be wrapped gets its line before the rest is spread evenly
    wants = [max(0.0, style.text_in(column.label, _PT) - width) for column, width in zip(columns, least, strict=True)]
    share = min(1.0, spare / sum(wants)) if sum(wants) else 0.0
    return [width + share * want for width, want in zip(least, wants, strict=True)]


def _ink(axes: Axes, columns: Sequence[_Column], widths: Sequence[float], heads: Sequence[list[str]], height: float) -> None:
    room = axes.get_xlim()[1] - 2 * style.MARGIN_IN
    gap = (room - sum(widths)) / max(1, len(columns) - 1)
    head_lines = max(map(len, heads))
    left = style.MARGIN_IN
    for column, width, head in zip(columns, widths, heads, strict=True):
        x, side = (left + width, "right") if column.numeric else (left, "left")
        for place, text in enumerate(head):
            y = height - _PAD_IN - (head_lines - len(head) + place + 0.5) * _LINE_IN  # the last line stands on the rule
            axes.text(x, y, text, ha=side, va="center_baseline", fontsize=_PT)
        for place, text in enumerate(column.cells):
            y = height - 3 * _PAD_IN - (head_lines + place + 0.5) * _LINE_IN
            axes.text(x, y, text, ha=side, va="center_baseline", fontsize=_PT, parse_math=False)
        left += width + gap
    under_head = height - 2 * _PAD_IN - head_lines * _LINE_IN
    for y, thickness in ((height - 0.02, 0.9), (under_head, 0.5), (0.02, 0.9)):
        axes.plot((0, axes.get_xlim()[1]), (y, y), color=style.INK, linewidth=thickness)
