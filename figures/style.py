"""The look of every figure, and how its PDF is written.

Sizes follow a two-column page: 3.33 in for a column, 7 in for a page. No text is smaller than 7 pt. Colours are
Okabe and Ito's, which colour-blind readers can tell apart; hatches and markers tell series apart in grey.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oooo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
INK = "#222222"
WIDTHS_IN = {"column": 3.33, "page": 7.0}
FOOTER_PT = 7.0
TITLE_PT = 9.0
MARGIN_IN = 0.05

RC: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same on every machine
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.borderpad": 0.1,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.linewidth": 0.4,
    "grid.color": "#cccccc",
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "pdf.compression": 6,
    "figure.constrained_layout.use": True,
}


def context() -> AbstractContextManager[None]:
    """Matplotlib's defaults and then ours: a reader's own matplotlibrc changes nothing."""
    return style.context(["default", dict(RC)])


def figure(plot: Mapping[str, Any], height_in: float) -> Figure:
    """An empty figure of the plot's width; `plot["height_in"]` overrules `height_in`. The footer comes on top of that."""
    return Figure(figsize=(width_in(plot), float(plot.get("height_in") or height_in)), layout="constrained")


def width_in(plot: Mapping[str, Any]) -> float:
    """Inches across: a column's width unless the plot asks for a page's."""
    from figures import PlotError

    width = plot.get("width", "column")
    if width not in WIDTHS_IN:
        raise PlotError(f"plot.width: {width!r}: use one of {', '.join(WIDTHS_IN)}")
    return WIDTHS_IN[width]


def save(figure: Figure, plot: Mapping[str, Any], out: Path) -> None:
    """Add title and footer, and write the PDF: to a temporary name, flushed to disk, then renamed."""
    frame(figure, str(plot.get("title") or ""), str(plot.get("footer") or ""))
    FigureCanvasPdf(figure)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # a date would change the bytes from run to run
            figure.savefig(file, format="pdf", metadata={"CreationDate": None, "Creator": "Fivefold"})
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def frame(figure: Figure, title: str, footer: str) -> None:
    """A title above the plot and small grey text under it: the figure grows by both, the plot keeps its own size."""
    width, height = figure.get_size_inches()
    room = width - 2 * MARGIN_IN
    over, under = wrap(title, TITLE_PT, room, math=True), wrap(footer, FOOTER_PT, room)
    above, below = _block_in(over, TITLE_PT), _block_in(under, FOOTER_PT)
    total = above + height + below
    figure.set_size_inches(width, total)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine), engine
    if over and figure.legends:  # the layout leaves room for a legend at the top, and a title of its own goes with it
        figure.legends[0].set_title("\n".join(over), prop=FontProperties(family=RC["font.family"], size=TITLE_PT))
        engine.set(rect=(0, below / total, 1, (above + height) / total))
    else:
        engine.set(rect=(0, below / total, 1, height / total))
        for place, line in enumerate(over):
            y = 1 - (MARGIN_IN + place * _line_in(TITLE_PT)) / total
            figure.text(0.5, y, line, fontsize=TITLE_PT, va="top", ha="center")
    for place, line in enumerate(under):
        y = (below - MARGIN_IN - place * _line_in(FOOTER_PT)) / total
        figure.text(MARGIN_IN / width, y, line, fontsize=FOOTER_PT, color="#555555", va="top", parse_math=False)


def _line_in(size_pt: float) -> float:
    return size_pt * 1.25 / 72


def _block_in(lines: Sequence[str], size_pt: float) -> float:
    return len(lines) * _line_in(size_pt) + 2 * MARGIN_IN if lines else 0.0


def wrap(text: str, size_pt: float, width_in: float, *, math: bool = False) -> list[str]:
    """Break `text` into lines that are at most `width_in` wide in our font at `size_pt`; an overlong word is cut.

    With `math`, `$...$` is a formula.
    """

    def fits(part: str) -> bool:
        return text_in(part, size_pt, math=math) <= width_in

    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and not fits(f"{line} {word}"):
                lines.append(line)
                line = ""
            while not fits(word) and len(word) > 1:
                cut = max(1, bisect.bisect_left(range(len(word)), True, key=lambda n: not fits(word[:n])) - 1)
                lines.append(word[:cut])
                word = word[cut:]
            line = f"{line} {word}".strip()
        lines += [line] if line else []
    return lines


def text_in(text: str, size_pt: float, *, math: bool = True) -> float:
    """Inches that `text` takes in our font; with `math`, `$...$` is a formula."""
    is_math = math and text.count("$") > 1
    font = FontProperties(family=RC["font.family"], size=size_pt)
    return float(text_to_path.get_text_width_height_descent(text, font, is_math)[0]) / 72
