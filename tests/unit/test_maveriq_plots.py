"""The plot kinds of the serving figures: boxes and panels."""

from __future__ import annotations

import pandas as pd
import pytest

import figures

SHARES = {"p5": 0.5, "p25": 0.8, "p50": 1.0, "p75": 2.0, "p95": 9.0}


def table(missing=False):
    rows = [
        {"series": series, "cell": cell, "k": k, **{f"e2e_{share}_s": value * scale for share, value in SHARES.items()}}
        for series, scale in (("ours", 1), ("theirs", 100))
        for cell in ("a", "b")
        for k in (2.5, 5)
    ]
    found = pd.DataFrame(rows)
    if missing:
        found.loc[found["series"] == "theirs", [f"e2e_{share}_s" for share in SHARES]] = float("nan")
    return found


PLOT = {
    "series": [{"name": "ours", "label": "Ours"}, {"name": "theirs", "label": "Theirs"}],
    "x": "cell", "x_label": "Cell", "y": "e2e_p50_s", "y_label": "Latency (s)",
    "published": [
        {"series": "ours", "at": {"cell": "a"}, "value": 1.2}, {"series": "ours", "at": {"cell": "a", "k": 5}, "value": 1.1},
    ],
}  # fmt: skip


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", ["boxes", "panels"])
def test_the_same_table_gives_the_same_bytes(tmp_path, kind, missing):
    found = table(missing)
    found = found[found["k"] == 5] if kind == "boxes" else found
    for name in ("one", "two"):
        figures.draw(kind, found, PLOT, tmp_path / f"{name}.pdf")
    assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "two.pdf").read_bytes()
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("kind", "found", "plot", "said"),
    [
        ("boxes", table().drop(columns="e2e_p95_s"), PLOT, "e2e_p95_s"),
        ("boxes", table(), {**PLOT, "y": "k"}, "name a column of medians"),
        ("boxes", table(), PLOT, "this kind draws one"),
        ("panels", table()[["series", "cell", "e2e_p50_s"]], PLOT, "needs a second factor"),
        ("panels", table(), {**PLOT, "x": "nothing"}, "nothing"),
    ],
)
def test_what_a_kind_can_not_draw_is_said(tmp_path, kind, found, plot, said):
    with pytest.raises(figures.PlotError, match=said):
        figures.draw(kind, found, plot, tmp_path / "x.pdf")
