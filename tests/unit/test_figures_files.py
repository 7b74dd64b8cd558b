"""The figure files that are shipped: each loads, its plot exists, and its claims speak about its own table."""

import subprocess
import sys
from pathlib import Path

import pytest

import figures
from harness.claims.data import Table
from harness.claims.evaluate import Status, evaluate, expected
from harness.figure_file import load_figure

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "figures").glob("*/*.yaml"))


def test_both_targets_are_there():
    assert {f"{path.parent.name}/{path.stem}" for path in FILES} >= {"llmstation/fig8a", "spotserve/table1"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_figure_loads_and_can_be_drawn_and_judged(path):
    figure = load_figure(path)
    assert figure.plot.kind in figures.KINDS
    assert figure.claims or figure.paper.figure == "none"  # a figure of ours has nothing to be held against
    for claim in figure.claims:
        assert expected(claim)
        assert claim.column in (None, figure.objective, *figure.columns)


def fig8a(**series):
    """A table of fig8a: rates of its figure file, heights by series."""
    figure = load_figure(ROOT / "figures" / "llmstation" / "fig8a.yaml")
    levels = [float(level.value) for level in figure.factors["rate_rps"].levels]
    rows = [
        {"series": name, "rate_rps": rate, figure.objective: float(height)}
        for name, heights in series.items()
        for rate, height in zip(levels, heights, strict=False)
    ]
    table = Table(tuple(figure.factors), figure.objective, tuple(rows))
    return {claim.id: evaluate(claim, table).status for claim in figure.claims}


def test_fig8a_as_the_paper_describes_it_reproduces_every_claim():
    said = fig8a(
        llmstation=[3.0, 2.7, 2.2, 1.6, 0.8, 0],
        fineinfer=[0.8, 0.4, 0, 0, 0, 0],
        vllm_torchtune=[0.9, 0.8, 0.5, 0.3, 0.1, 0],
        chunked=[1.6, 1.5, 1.2, 0.9, 0.5, 0],
    )
    assert said == dict.fromkeys(("C1", "C2a", "C2b", "C2c", "C4a", "C4b"), Status.REPRODUCED)


def test_fig8a_otherwise_differs_claim_by_claim():
    said = fig8a(
        llmstation=[3.0, 2.7, 2.2, 1.6, 0.8, 0.1],
        fineinfer=[2.0, 1.0, 1.0, 1.0, 1.0, 0],
        vllm_torchtune=[0.1, 0.8, 0.5, 0, 0, 0],
        chunked=[1.6, 1.5, 1.2, 0.9, 0.5, 0],
    )
    wanted = dict.fromkeys(("C1", "C2a", "C2b", "C4a", "C4b"), Status.DIFFERS) | {"C2c": Status.REPRODUCED}
    assert said == wanted


def test_fig8a_at_smoke_scale_does_not_judge_what_it_cannot_see():
    said = fig8a(llmstation=[3.0, 2.7], fineinfer=[0.8, 0.4], vllm_torchtune=[0.9, 0.8], chunked=[1.6, 1.5])
    assert (said["C4a"], said["C4b"]) == (Status.NOT_TESTABLE, Status.NOT_TESTABLE)
    assert said["C2a"] is Status.REPRODUCED


def test_reading_figures_and_claims_does_not_load_the_slow_libraries():
    """A series job starts in under a second: pandas and matplotlib alone would take that."""
    code = (
        "import sys, figures, harness.claims.judge, harness.claims.table;"
        "print([m for m in ('pandas', 'matplotlib', 'scipy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
