"""MaverIQ's estimator against the authors' measurements: what the paper printed, and what improved mode must reach."""

import csv
import json

import numpy as np
import pytest

from systems.maveriq import fit
from systems.maveriq.configuration import Configuration, Question, known_models
from systems.maveriq.estimator import make_estimator
from systems.maveriq.exponents import published_exponents
from systems.maveriq.fingerprint import PAPER_GRID, points, read_fingerprints
from systems.maveriq.improved import ImprovedEstimator
from systems.maveriq.priors import PRIORS, SOURCE, calibrated, evidence, learn, read_priors, to_json

LATENCY = {"falcon-7b": 4.65, "falcon-40b": 2.24, "gptj-6b": 6.09, "llama-2-7b": 4.93, "llama-2-13b": 3.08, "llama-2-70b": 5.38}
MEMORY = {"falcon-7b": 1.56, "falcon-40b": 1.92, "gptj-6b": 10.38, "llama-2-7b": 8.44, "llama-2-13b": 7.61, "llama-2-70b": 1.87}
INTENTS = {
    "min_cost": lambda latency, memory, gpus: latency * memory,
    "min_lat": lambda latency, memory, gpus: latency,
    "min_mem": lambda latency, memory, gpus: memory,
    "min_gpu_cost": lambda latency, memory, gpus: latency * gpus,
}


@pytest.fixture(scope="module")
def folder(mirror):
    return mirror / "maveriq_a6000"


@pytest.fixture(scope="module")
def prints(folder):
    return read_fingerprints(folder / "fingerprint_data_collection.csv")


@pytest.fixture(scope="module")
def whole(folder):
    return read_fingerprints(folder / "full_model_data_collection.csv")


class Judged:
    """Estimates of a mode beside the truth, for every whole-model measurement."""

    def __init__(self, estimator, whole):
        self.settings = list(whole.points)
        asked = [
            Question(s.model, Configuration(s.tp, s.pp, s.dtype, s.int8_kv), s.batch, s.output_length) for s in self.settings
        ]
        self.found = estimator.estimate_many(asked)
        self.latency = np.array([point.latency_s for point in whole.points.values()])
        self.memory = np.array([point.memory_gib for point in whole.points.values()])
        self.model, self.tp, self.gpus, self.length = (
            np.array([value(s) for s in self.settings])
            for value in (lambda s: s.model, lambda s: s.tp, lambda s: s.tp * s.pp, lambda s: s.output_length)
        )

    def off(self, which):
        return self.found.latency_s[which] / self.latency[which] - 1

    def off_memory(self, which):
        return self.found.memory_gib[which] / self.memory[which] - 1

    def regret(self, intent, length):
        """True cost of the configuration with the least estimated cost, over the least true cost, per model."""
        regrets = []
        for model in sorted(set(self.model)):
            i = np.flatnonzero((self.model == model) & (self.length == length))
            cost = INTENTS[intent](self.found.latency_s[i], self.found.memory_gib[i], self.gpus[i])
            true = INTENTS[intent](self.latency[i], self.memory[i], self.gpus[i])
            regrets.append(true[cost.argmin()] / true.min())
        return regrets


@pytest.fixture(scope="module")
def paper(prints, whole):
    return Judged(make_estimator(prints, "paper"), whole)


@pytest.fixture(scope="module")
def improved(prints, whole):
    """Leave one model out: for each of the six, `Priors.of` gives what was learned from the other five."""
    assert set(read_priors().without) == set(whole.models)
    return Judged(make_estimator(prints, "improved"), whole)


# paper mode


def test_the_medians_that_the_paper_prints(paper):
    at = paper.length == 100
    assert at.sum() == 412
    assert 100 * np.median(np.abs(paper.off(at))) == pytest.approx(4.39, abs=0.005)
    assert 100 * np.median(np.abs(paper.off_memory(at))) == pytest.approx(4.10, abs=0.005)
    assert np.median(np.abs(paper.found.latency_s[at] - paper.latency[at])) == pytest.approx(0.11, abs=0.005)
    assert np.median(np.abs(paper.found.memory_gib[at] - paper.memory[at])) == pytest.approx(0.95, abs=0.005)
    assert 100 * np.abs(paper.off(at)).mean() == pytest.approx(8.97, abs=0.005)
    assert 100 * np.percentile(np.abs(paper.off(at)), 90) == pytest.approx(23.2, abs=0.05)


@pytest.mark.parametrize("model", sorted(LATENCY))
def test_the_medians_per_model(paper, model):
    at = (paper.length == 100) & (paper.model == model)
    assert 100 * np.median(np.abs(paper.off(at))) == pytest.approx(LATENCY[model], abs=0.006)
    assert 100 * np.median(np.abs(paper.off_memory(at))) == pytest.approx(MEMORY[model], abs=0.006)


def test_fp16_alone(paper):
    """Printed for two models in the profiling cost figure: 2.91 and 3.01 %."""
    is_fp16 = np.array([s.precision == ("float16", False) for s in paper.settings])
    for model, expected in (("llama-2-7b", 2.91), ("llama-2-70b", 3.01)):
        at = (paper.length == 100) & (paper.model == model) & is_fp16
        assert 100 * np.median(np.abs(paper.off(at))) == pytest.approx(expected, abs=0.006)


SPOT = [
    # empty cluster (sheet 7): model, TP, PP, dtype, int8 KV, GiB on each GPU
    ("llama-2-7b", 2, 4, "int4", True, 1.571),
    ("llama-2-13b", 4, 2, "int4", True, 2.031),
    ("llama-2-70b", 8, 1, "int4", True, 6.904),
    ("falcon-40b", 4, 1, "int4", False, 7.905),
    ("gptj-6b", 4, 2, "int4", False, 1.803),
    ("falcon-7b", 1, 8, "int4", False, 1.348),
    ("llama-2-7b", 1, 1, "int4", True, 3.974),
    ("llama-2-13b", 2, 1, "int4", True, 4.336),
    ("llama-2-70b", 4, 1, "int4", True, 10.869),
    ("gptj-6b", 1, 1, "int4", False, 3.907),
    ("falcon-7b", 1, 1, "int4", False, 4.650),
    ("llama-2-70b", 1, 1, "int4", True, 34.659),
    ("falcon-40b", 1, 1, "int4", False, 22.570),
    ("llama-2-70b", 1, 1, "int4", False, 34.814),
    ("llama-2-70b", 8, 1, "float16", True, 16.590),
    ("falcon-40b", 8, 1, "float16", False, 11.903),
    ("llama-2-7b", 4, 1, "float16", False, 4.228),
]


@pytest.mark.parametrize(("model", "tp", "pp", "dtype", "int8_kv", "gib"), SPOT)
def test_memory_of_the_logged_decisions(folder, model, tp, pp, dtype, int8_kv, gib):
    estimator = make_estimator(read_fingerprints(folder / "fingerprint_data_collection_BS.csv"), "paper")
    found = estimator.estimate(model, Configuration(tp, pp, dtype, int8_kv), output_length=20)
    assert found.memory_gib / (tp * pp) == pytest.approx(gib, abs=0.001)


SHORT = [
    ("llama-2-70b", 8, 1, "int4", True, 0.345),
    ("falcon-40b", 4, 1, "int4", False, 0.279),
    ("llama-2-7b", 2, 4, "int4", True, 0.081),
    ("llama-2-70b", 4, 1, "int4", True, 0.422),
    ("llama-2-7b", 1, 1, "int4", True, 0.118),
    ("llama-2-70b", 1, 1, "int4", True, 1.125),
    ("falcon-40b", 1, 1, "int4", False, 0.718),
]


@pytest.mark.parametrize(("model", "tp", "pp", "dtype", "int8_kv", "seconds"), SHORT)
def test_latency_with_short_prompts(folder, model, tp, pp, dtype, int8_kv, seconds):
    estimator = make_estimator(read_fingerprints(folder / "fingerprint_data_collection_BS.csv"), "paper")
    found = estimator.estimate(model, Configuration(tp, pp, dtype, int8_kv), output_length=20)
    assert found.latency_s == pytest.approx(seconds, abs=0.0006)


def test_the_exponents_are_those_of_the_file(folder):
    with (folder / "latency_exponents.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        dtype, int8_kv = row["Quant-config"].strip("()").split(", ")
        typed = published_exponents(row["Method"].replace("-", "_"))[dtype, int8_kv == "True"]
        assert typed == pytest.approx([float(row[name]) for name in ("alpha", "beta", "gamma", "delta")], rel=1e-12)


def test_the_grid_is_what_the_authors_measured(folder):
    measured = set(read_fingerprints(folder / "fingerprint_data_collection_BS.csv").points)
    models = known_models()
    for model in {s.model for s in measured}:
        mine = {s for s in measured if s.model == model}
        precisions = sorted({s.precision for s in mine})
        assert mine == set(points(PAPER_GRID, model, precisions, models[model].tensor_parallel))


# the fit


@pytest.fixture(scope="module")
def refits(prints, whole):
    rows = fit.table(prints, whole, known_models(), methods=("fingerprint",))
    rows += fit.table(prints, whole, known_models(), methods=("full_model", "full_model_shipped"), ways=(fit.ALL_POINTS,))
    return {(row.method, row.fitted_on): row for row in rows}


@pytest.mark.slow
def test_refits_against_the_sheet(refits):
    """Medians recomputed for the sheet (2.5), %; five points per model depend on the seed (4.12 there)."""
    expected = {"published exponents": 4.39, "all points": 3.74, "leave one model out": 5.32}
    for way, median in expected.items():
        assert 100 * refits["fingerprint", way].median == pytest.approx(median, abs=0.15)
    assert 3.5 < 100 * refits["fingerprint", "five points per model"].median < 6.5
    assert 100 * refits["fingerprint", "leave one model out"].p90 == pytest.approx(28.4, abs=1.5)


@pytest.mark.slow
def test_the_right_algebra_is_better_than_the_shipped_one(refits):
    assert refits["full_model", "all points"].median < refits["full_model_shipped", "all points"].median
    assert refits["full_model", "all points"].p90 < 0.5 * refits["full_model_shipped", "published exponents"].p90


# improved mode: bounds of the issue, each model estimated without its own whole-model measurements


def test_improved_latency(improved, paper):
    at = improved.length == 100
    assert np.median(np.abs(improved.off(at))) <= 0.035
    assert np.percentile(np.abs(improved.off(at)), 90) <= 0.15
    assert abs(improved.off(at & (improved.tp == 8)).mean()) <= 0.05
    assert np.median(np.abs(improved.off(at))) < 0.5 * np.median(np.abs(paper.off(at)))
    for length in (10, 20, 50, 100, 200):
        assert np.median(np.abs(improved.off(improved.length == length))) <= 0.035


def test_improved_memory(improved, paper):
    at = improved.length == 100
    assert np.median(np.abs(improved.off_memory(at))) < 0.5 * np.median(np.abs(paper.off_memory(at)))
    assert np.percentile(np.abs(improved.off_memory(at)), 90) < 0.10


@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("intent", sorted(INTENTS))
def test_decision_regret(improved, paper, intent, length):
    assert np.mean(improved.regret(intent, length)) <= 1.10
    assert np.mean(improved.regret(intent, length)) <= np.mean(paper.regret(intent, length)) + 0.005


def test_our_grid_costs_no_more_than_the_papers(folder, prints):
    """GPU seconds (Time-Prof x GPUs) per model: against the paper's whole grid, and against its half at batch 1 alone."""
    estimator = make_estimator(prints, "improved")
    theirs = read_fingerprints(folder / "fingerprint_data_collection_BS.csv")
    for model in prints.models:
        ours = estimator.used(model).gpu_seconds()
        assert ours <= theirs.select(s for s in theirs.points if s.model == model).gpu_seconds()
        half = [s for s in prints.points if s.model == model and s.layout in PAPER_GRID.layouts]
        assert ours <= prints.select(half).gpu_seconds()


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_intervals_hold_what_they_promise(prints, whole, level):
    """Coverage over models left out; six models are few, so within ten points."""
    judged = Judged(ImprovedEstimator(prints, known_models(), level=level), whole)
    found = judged.found
    held = (found.latency_low_s <= judged.latency) & (judged.latency <= found.latency_high_s)
    assert held.mean() == pytest.approx(level, abs=0.10)
    held = (found.memory_low_gib <= judged.memory) & (judged.memory <= found.memory_high_gib)
    assert held.mean() == pytest.approx(level, abs=0.10)


def test_batches_on_models_left_out(folder):
    """Short prompts, fp16, (1,8) or (1,4), 100 tokens; fingerprints only know batches 1 and 2."""
    truth = read_fingerprints(folder / "unbalanced_PP_data_collection.csv", even_only=True)
    estimator = make_estimator(read_fingerprints(folder / "fingerprint_data_collection_BS.csv"), "improved")
    judged = Judged(estimator, truth)
    batch = np.array([s.batch for s in judged.settings])
    assert np.abs(judged.off(batch == 32)).max() <= 0.15
    assert np.median(np.abs(judged.off(batch <= 64))) <= 0.05


def test_the_priors_can_be_made_anew(folder):
    """`python -m systems.maveriq.priors` gives the file's numbers: all of `everyone`, and the constants of one left out."""
    kept = json.loads(PRIORS.read_text())
    assert kept["source"] == SOURCE
    found = evidence(folder)
    for name, pair in (
        ("everyone", calibrated(found, found.names)),
        ("without gptj-6b", learn(found, [n for n in found.names if n != "gptj-6b"])),
    ):
        for prior, old in zip(pair, kept[name], strict=True):
            numbers = np.array(list(old["terms"].values()))
            assert prior.mean == pytest.approx(numbers[:, 0], rel=1e-3, abs=1e-6 * float(np.abs(prior.mean).max()))
            assert prior.spread == pytest.approx(numbers[:, 1], rel=1e-3)
    priors = read_priors()
    again = json.loads(to_json(priors))
    assert again["everyone"][0]["terms"] == kept["everyone"][0]["terms"]
