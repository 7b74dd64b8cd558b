"""Drawings: the same bytes every time, embedded fonts, the words that must be there, clear refusals."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from pypdf import PdfReader

import figures
from figures import style
from figures.plots import data

SERIES = [{"name": "ours", "label": "LLMStation"}, {"name": "mps", "label": "vLLM+torchtune"}]
RATES = [0.5, 1, 2]
BARS = pd.DataFrame(
    {"series": ["ours"] * 3 + ["mps"] * 3, "rate_rps": RATES * 2, "peft": [3.0, 2.0, 1.0, 1.0, 0.0, np.nan]},
)
PLOT = {
    "x": "rate_rps",
    "x_label": "Request rate (req/s)",
    "y": "peft",
    "y_label": "PEFT throughput",
    "series": SERIES,
    "width": "column",
    "height_in": None,
    "footer": "simulated · roofline rtx3090 · sharegpt_lengths · seed 0 · commit 3f2a91c",
}
PROBES = pd.DataFrame(
    {
        "series": ["ours"] * 3 + ["mps"] * 3,
        "rate_rps": [0.5] * 6,
        "knob_target_s": [0.01, 0.02, 0.04, np.nan, np.nan, np.nan],
        "knob_percentage": [np.nan] * 3 + [1, 50, 100],
        "peft": [1.0, 2.0, 3.0, 1.0, 2.0, np.nan],
        "ttft_p99_s_over_limit": [0.5, 0.9, 1.2, 0.3, 1.1, np.nan],
        "chosen": [False, True, False, True, False, False],
    }
)
BOXES = BARS.assign(**{f"e2e_p{share}_s": [share * n for n in (1.0, 2, 3, 2, 4, 6)] for share in (5, 25, 50, 75, 95)})
PANELS = pd.concat([BARS.assign(trace=name) for name in ("code", "conversation")])[["series", "rate_rps", "trace", "peft"]]
ERRORS = pd.DataFrame(
    [
        {"series": s, "workload": w, "metric": m, "statistic": p, "error": 0.01 * len(w), "aim": 0.02 if m == "e2e" else np.nan}
        for s in ("ours", "mps") for w in ("steady", "bursty") for m in ("ttft", "e2e") for p in ("p50", "p90", "p99")
    ]
)  # fmt: skip
CASES = {
    "boxes": (BOXES, {"y": "e2e_p50_s", "published": [{"series": "ours", "at": {"rate_rps": 1}, "value": 90}]}),
    "errors": (ERRORS, {"metrics": {"ttft": "TTFT", "e2e": "E2E"}}),
    "panels": (
        PANELS,
        {"panel": "trace", "published": [{"series": "ours", "at": {"rate_rps": 1, "trace": "code"}, "value": 2}]},
    ),
    "grouped_bars": (BARS, {"published": [{"series": "ours", "at": {"rate_rps": 1}, "value": 2.2}]}),
    "lines": (BARS, {"title": "Llama-3.1-8B", "published": [{"series": "ours", "at": {"rate_rps": 1}, "value": 2.2}]}),
    "table": (BARS, {}),
    "search_trace": (PROBES, {"limit_labels": {"ttft_p99_s": "P99 TTFT"}}),
}


def draw(kind, out, **changes):
    table, more = CASES[kind]
    figures.draw(kind, table, {**PLOT, **more, **changes}, out)
    return out


def text(path):
    return " ".join(PdfReader(path).pages[0].extract_text().split())


def fonts(path):
    """Every font dictionary of a PDF, and what it descends to."""
    found = [font.get_object() for font in PdfReader(path).pages[0]["/Resources"]["/Font"].values()]
    below = [font["/DescendantFonts"][0].get_object() for font in found if "/DescendantFonts" in font]
    return {font["/Subtype"] for font in [*found, *below]}


@pytest.mark.parametrize("kind", figures.KINDS)
def test_drawn_twice_gives_the_same_bytes(kind, tmp_path):
    first, second = draw(kind, tmp_path / "a.pdf"), draw(kind, tmp_path / "b.pdf")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "b.pdf"]


@pytest.mark.slow
def test_other_processes_hash_seeds_and_settings_give_the_same_bytes(root, tmp_path):
    """Also a matplotlibrc of the reader's own must not show."""
    (tmp_path / "matplotlibrc").write_text("font.size: 30\npdf.fonttype: 3\naxes.facecolor: red\n")
    script = tmp_path / "draw_all.py"
    script.write_text(
        "import sys, pathlib, test_plots as t\n[t.draw(kind, pathlib.Path(sys.argv[1], kind + '.pdf')) for kind in t.CASES]\n"
    )
    for seed in ("0", "4711"):
        (tmp_path / seed).mkdir()
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": f"{root}:{root / 'tests' / 'unit'}",
            "MATPLOTLIBRC": str(tmp_path if seed == "0" else root),
        }
        subprocess.run([sys.executable, script, tmp_path / seed], env=environment, check=True, timeout=120)
    for kind in CASES:
        here = draw(kind, tmp_path / "here.pdf").read_bytes()
        assert here == (tmp_path / "0" / f"{kind}.pdf").read_bytes() == (tmp_path / "4711" / f"{kind}.pdf").read_bytes(), kind


@pytest.mark.parametrize("kind", figures.KINDS)
def test_fonts_are_embedded_as_type_42(kind, tmp_path):
    assert fonts(draw(kind, tmp_path / "a.pdf")) == {"/Type0", "/CIDFontType2"}


@pytest.mark.parametrize("kind", figures.KINDS)
def test_nothing_tells_when_it_was_drawn(kind, tmp_path):
    assert "/CreationDate" not in PdfReader(draw(kind, tmp_path / "a.pdf")).metadata


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "grouped_bars",
            ["LLMStation", "vLLM+torchtune", "paper", "Request rate (req/s)", "PEFT throughput", "commit 3f2a91c"],
        ),
        ("lines", ["Llama-3.1-8B", "LLMStation", "paper", "Request rate (req/s)", "seed 0"]),
        ("table", ["series", "rate_rps", "LLMStation", "roofline rtx3090"]),
        ("search_trace", ["target_s", "percentage", "P99 TTFT over its limit", "chosen", "meets the limits", "simulated"]),
    ],
)
def test_what_must_be_readable(kind, words, tmp_path):
    shown = text(draw(kind, tmp_path / "a.pdf"))
    for word in words:
        assert word in shown, shown


def test_a_zero_is_written_and_a_missing_number_is_not(tmp_path):
    def zeros(peft):
        axes = drawn("grouped_bars", BARS.assign(peft=peft)).axes[0]
        return [round(note.xy[0], 2) for note in axes.texts if note.get_text() == "0"]

    assert zeros([3.0, 2.0, 1.0, 1.0, 0.0, np.nan]) == [1.21]  # the second bar of the second group
    assert zeros([3.0, 2.0, 0.0, 1.0, 0.0, 0.0]) == [1.79, 1.21, 2.21]


def drawn(kind, table, **changes):
    """The matplotlib figure, laid out."""
    module = __import__(figures.KINDS[kind], fromlist=["build"])
    with style.context():
        figure = module.build(table, {**PLOT, **changes})
        figure.draw_without_rendering()
    return figure


def test_published_values_are_hollow_and_stand_at_their_bar(tmp_path):
    entry = {"series": "mps", "at": {"rate_rps": 2}, "value": 0.4, "source": "Figure 8a"}
    marks = drawn("grouped_bars", BARS, published=[entry]).axes[0].lines
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(pytest.approx(2.21), 0.4)]
    assert marks[0].get_markerfacecolor() == "none"
    assert not drawn("grouped_bars", BARS).axes[0].lines


def test_the_search_shows_which_probes_break_a_limit(tmp_path):
    first = drawn("search_trace", PROBES).axes[0]
    shown = {line.get_marker(): list(line.get_xdata()) for line in first.lines if line.get_markersize() < 8}
    assert shown == {"o": [0.01, 0.02], "x": [0.04]}
    ring = [line for line in first.lines if line.get_markersize() == 8]
    assert [list(line.get_xdata()) for line in ring] == [[0.02]]


@pytest.mark.parametrize("title", ["", "SLO-bound PEFT throughput of Llama-3.1-8B on two RTX 3090 under steady load"])
@pytest.mark.parametrize("width", style.WIDTHS_IN)
@pytest.mark.parametrize("kind", figures.KINDS)
def test_nothing_sticks_out_overlaps_or_is_too_small(kind, width, title):
    """Every text keeps to the page, and legend, title, panels and footer keep clear of each other."""
    table, more = CASES[kind]
    figure = drawn(kind, table, **{**more, "title": "", "width": width})
    assert figure.get_figwidth() == style.WIDTHS_IN["page" if kind == "search_trace" else width]
    with style.context():
        style.frame(figure, title, PLOT["footer"] * 2)
        figure.draw_without_rendering()
    for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and artist.get_text()):
        assert text.get_fontsize() >= 7, text
    loose = [text for text in figure.texts if text is not figure._supylabel]
    boxes = [part.get_tightbbox() for part in [*figure.legends, *loose]]
    for box in boxes:
        assert figure.bbox.padded(1).fully_containsx(box.x0) and figure.bbox.padded(1).fully_containsx(box.x1), box
        assert figure.bbox.padded(1).fully_containsy(box.y0) and figure.bbox.padded(1).fully_containsy(box.y1), box
    panels = [axes.get_tightbbox() for axes in figure.axes if kind != "table"]
    for box in boxes:
        for panel in panels:
            assert not box.padded(-1).overlaps(panel), (box, panel)


def test_title_and_footer_add_to_the_height_and_leave_the_plot_its_own(tmp_path):
    def size(path):
        box = PdfReader(path).pages[0].mediabox
        return float(box.width) / 72, float(box.height) / 72

    bare = size(draw("grouped_bars", tmp_path / "a.pdf", footer=""))
    full = size(draw("grouped_bars", tmp_path / "b.pdf", footer="word " * 60, title="A title"))
    assert bare == (pytest.approx(3.33, abs=0.01), pytest.approx(2.1, abs=0.01))
    assert full[0] == bare[0]
    assert full[1] > bare[1] + 0.7


@pytest.mark.parametrize("words", ["a " * 200, "sha256:" + "0123456789abcdef" * 12, "cost 5 $ and 6 $ · é"])
def test_long_footers_are_wrapped_and_nothing_is_lost(words):
    lines = style.wrap(words, 7, 3.2)
    assert "".join("".join(lines).split()) == "".join(words.split())
    assert all(style.text_in(line, 7, math=False) <= 3.2 for line in lines)


def test_a_cdf_never_counts_what_did_not_finish():
    table = pd.DataFrame({"series": ["ours"] * 4, "ttft_s": [0.3, 0.1, np.inf, np.nan]})
    line = drawn("lines", table, y="ttft_s", cdf=True).axes[0].lines[0]
    assert list(line.get_xdata()) == [0.1, 0.3]
    assert list(line.get_ydata()) == [0.25, 0.5]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("pie", {}, r"plot\.kind: 'pie': use one of boxes, errors, grouped_bars"),
        ("grouped_bars", {"y": "goodput"}, "column 'goodput' is missing"),
        ("grouped_bars", {"x": None}, r"plot\.x: missing"),
        ("grouped_bars", {"series": SERIES[:1]}, "the table also has mps"),
        ("grouped_bars", {"width": "poster"}, "'poster': use one of column, page"),
        ("lines", {"y_scale": "loglog"}, "use linear or log"),
        ("table", {"columns": [{"label": "x"}]}, "either column or published"),
        ("table", {"columns": [{"column": "peft", "format": "{:d}"}]}, "format"),
        ("table", {"columns": [{"column": "peft", "label": "x" * 80}]}, "use page, or fewer columns"),
    ],
)
def test_refusals_are_one_line_that_says_what(kind, changes, message, tmp_path):
    with pytest.raises(figures.PlotError, match=message) as raised:
        figures.draw(kind, BARS, {**PLOT, **changes}, tmp_path / "a.pdf")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_two_rows_for_one_bar_are_refused(tmp_path):
    with pytest.raises(figures.PlotError, match=r"2 rows for ours at rate_rps=0\.5"):
        figures.draw("grouped_bars", pd.concat([BARS, BARS]), PLOT, tmp_path / "a.pdf")


def test_an_empty_table_and_a_figure_without_search_are_refused(tmp_path):
    with pytest.raises(figures.PlotError, match="no rows"):
        figures.draw("grouped_bars", BARS[:0], PLOT, tmp_path / "a.pdf")
    with pytest.raises(figures.PlotError, match="no series has a knob"):
        figures.draw("search_trace", BARS.assign(chosen=True), PLOT, tmp_path / "a.pdf")


def test_a_folder_that_does_not_exist_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        draw("table", tmp_path / "none" / "a.pdf")


def test_levels_are_numbers_rising_or_names_as_they_come():
    assert data.levels(pd.DataFrame({"x": [2, 0.5, 2]}), "x") == [0.5, 2]
    assert data.levels(pd.DataFrame({"x": ["opt", "gpt"]}), "x") == ["opt", "gpt"]
    assert data.level_label(0.5, {"x_labels": {"0.5": "half"}}) == "half"
    assert data.level_label(2.0, {"x_labels": {"2": "two"}}) == "two"
    assert data.level_label("opt", {}) == "opt"


@pytest.mark.parametrize("width", [3.33, 7.0])
def test_the_legend_fits(width):
    labels = ["LLMStation", "FineInfer", "vLLM+torchtune", "Chunked-training", "paper"]
    columns = data.legend_columns(labels, width)
    assert columns == (5 if width == 7 else 3)
    assert data.legend_columns(["x" * 60, "y" * 60], width) == 1
