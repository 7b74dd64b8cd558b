"""SpotServe against published numbers: Table 1, and the configurations that the artifact's solver picks.

The second set comes from running the artifact's solver on the same profiles (sheet of the paper, section 2.2), which
prints l_exe and throughput to three digits.
"""

from pathlib import Path

import pandas as pd
import pytest
from pypdf import PdfReader

import figures
from harness.claims.data import Table
from harness.claims.evaluate import Status, evaluate
from harness.figure_file import load_figure
from systems.common.core import Trial
from systems.registry import experiment
from systems.spotserve.cost_model import Layout, request_latency_s, throughput_rps
from systems.spotserve.models import MODELS
from systems.spotserve.profiles import read_profile

FIGURE = Path("figures", "spotserve", "table1.yaml")
TABLE1_MS = [("opt-6.7b", 1, 4, 5447.3276), ("gpt-20b", 3, 4, 14372.8266), ("llama-30b", 2, 8, 17539.8696)]
SIZES_GB = {"opt-6.7b": 25.0, "gpt-20b": 74.5, "llama-30b": 111.8}
SOLVER = [
    # model, B, D, P, M, l_exe in s, requests/s
    ("opt-6.7b", 2, 8, 1, 4, 4.89, 3.27),
    ("opt-6.7b", 4, 3, 1, 4, 5.29, 2.27),
    ("gpt-20b", 4, 1, 3, 4, 14.46, 0.277),
    ("gpt-20b", 4, 1, 2, 8, 12.96, 0.309),
    ("gpt-20b", 4, 2, 3, 4, 14.46, 0.553),
    ("gpt-20b", 4, 2, 2, 8, 12.96, 0.617),
    ("llama-30b", 4, 1, 2, 8, 17.75, 0.225),
]


@pytest.fixture(scope="module")
def profiles(mirror):
    folder = mirror / "spotserve" / "profile"
    return {name: read_profile(folder / model.profiles["t4"]) for name, model in MODELS.items()}


@pytest.mark.parametrize(("name", "pipeline", "tensor", "expected_ms"), TABLE1_MS)
def test_table_1_to_every_digit(profiles, name, pipeline, tensor, expected_ms):
    assert request_latency_s(profiles[name], Layout(pipeline, tensor), 128) * 1000 == pytest.approx(expected_ms, abs=1e-6)


@pytest.mark.parametrize("name", SIZES_GB)
def test_sizes_of_table_1(name):
    assert round(MODELS[name].weights_gib, 1) == SIZES_GB[name]


@pytest.mark.parametrize(("name", "batch", "replicas", "pipeline", "tensor", "latency_s", "rate_rps"), SOLVER)
def test_the_solver_s_configurations(profiles, name, batch, replicas, pipeline, tensor, latency_s, rate_rps):
    """At its best micro-batches each one has the latency and throughput that the artifact's solver gives it."""
    parts = [part for part in (1, 2, 4) if part <= batch]
    layouts = [Layout(pipeline, tensor, batch, prefill, decode) for prefill in parts for decode in parts]
    best = min(layouts, key=lambda layout: request_latency_s(profiles[name], layout, 128))
    assert request_latency_s(profiles[name], best, 128) == pytest.approx(latency_s, abs=0.006)
    assert throughput_rps(profiles[name], best, 128, replicas) == pytest.approx(rate_rps, rel=0.003)


@pytest.mark.parametrize(("name", "pipeline", "tensor", "expected_ms"), TABLE1_MS)
def test_the_papers_layout_is_the_models_own_choice(profiles, name, pipeline, tensor, expected_ms):
    """Among all layouts that use the paper's minimum of GPUs whole, the one that the paper prints is the fastest."""
    profile, gpus = profiles[name], pipeline * tensor
    layouts = [
        Layout(gpus // degree, degree)
        for degree in profile.tensor_degrees
        if gpus % degree == 0 and profile.padded_layers % (gpus // degree) == 0
    ]
    fastest = min(layouts, key=lambda layout: request_latency_s(profile, layout, 128))
    assert len(layouts) >= 3
    assert (fastest.pipeline, fastest.tensor) == (pipeline, tensor)


@pytest.fixture(scope="module")
def rows(root, mirror):
    """The figure's table, from its file and its experiment: one trial per point."""
    figure = load_figure(root / FIGURE)
    run = experiment("spotserve", figure.experiment)
    datasets = {"spotserve_profiles": mirror / "spotserve" / "profile"}
    rows = []
    for point in figure.points("spotserve"):
        outcome = run(Trial("spotserve", figure.experiment, point.parameters, figure.testbed, datasets=datasets))
        rows.append({"series": "spotserve", **point.at, **outcome.metrics})
    return rows


def test_every_claim_of_the_figure_is_reproduced(root, rows):
    figure = load_figure(root / FIGURE)
    table = Table(tuple(figure.factors), figure.objective, tuple(rows))
    assert [evaluate(claim, table).status for claim in figure.claims] == [Status.REPRODUCED] * 3


def test_a_wrong_digit_would_differ(root, rows):
    figure = load_figure(root / FIGURE)
    off = [{**row, "request_latency_s": row["request_latency_s"] * 1.0001} for row in rows]
    table = Table(tuple(figure.factors), figure.objective, tuple(off))
    assert [evaluate(claim, table).status for claim in figure.claims] == [Status.DIFFERS] * 3


def test_the_drawn_table(root, rows, tmp_path):
    figure = load_figure(root / FIGURE)
    plot = {
        **figure.plot.model_dump(),
        "x": "model",
        "x_labels": {level.value: level.label for level in figure.factors["model"].levels},
        "published": [value.model_dump() for value in figure.published],
        "footer": "simulated",
    }
    figures.draw(figure.plot.kind, pd.DataFrame(rows), plot, tmp_path / "table1.pdf")
    shown = PdfReader(tmp_path / "table1.pdf").pages[0].extract_text()
    for text in ("OPT-6.7B", "GPT-20B", "LLaMA-30B", "5.447", "14.373", "17.540", "111.8", "(3, 4)", "12", "simulated"):
        assert text in shown
    assert shown.count("17.540") == 2  # ours and the paper's
