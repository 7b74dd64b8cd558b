"""Noisy systems with a known knee: how often the search is right, and what it says when it can't be sure.

*Right*, in the strict sense used here: the chosen knob is within the tolerance (5 %) of the true knee, the knob at which
the limit metric's median meets the limit; nothing is allowed for the noise. *Honest*: the reported bracket holds the true
knee (a search that ended without a bracket is honest when it is right). Both must hold for at least 95 % of 1,000 seeds.

Noise is log-normal and fresh for every setting and seed. What matters is its size relative to the metric's steepness:
with `m = (k / knee) ^ p`, noise of size s blurs the knob by s / p.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.search import Answer, Probe, Verdict, search
from harness.search.noise import CLIP, Setting, judge, margin, pooled_noise, rising, student
from tests.unit.search_systems import Ask, of, power, queue, space

SEEDS = 1000


def knees() -> list[float]:
    draw = random.Random(20261121)
    return [math.exp(draw.uniform(0, math.log(1000))) for _ in range(SEEDS)]


def is_right(verdict: Verdict, knee: float) -> bool:
    found = verdict.knobs["k"] if verdict.knobs else 1.0 if knee <= 1.05 else math.nan
    return abs(found / knee - 1) <= 0.05


def is_honest(verdict: Verdict, knee: float) -> bool:
    if verdict.bracket is None:
        return is_right(verdict, knee)
    low, high = verdict.bracket
    return low <= knee <= high


@pytest.mark.parametrize(
    ("noise", "exponent", "repeats"),
    [(0.02, 1, 5), (0.05, 1, 3), (0.1, 1, 3), (0.1, 1, 5), (0.1, 4, 5)],
)
def test_a_thousand_noisy_seeds(noise: float, exponent: float, repeats: int) -> None:
    right = honest = 0
    trials = []
    for seed, knee in enumerate(knees()):
        verdict, history = search(space(repeats=repeats), power(knee, exponent, noise, seed, objective_noise=noise))
        right += is_right(verdict, knee)
        honest += is_honest(verdict, knee)
        trials.append(len(history))
    assert right >= 0.95 * SEEDS
    assert honest >= 0.95 * SEEDS
    assert max(trials) <= 40


@pytest.mark.parametrize(("noise", "load"), [(0.05, 0.8), (0.1, 0.8), (0.1, 0.95)])
def test_a_thousand_noisy_seeds_of_a_queue(noise: float, load: float) -> None:
    outcomes = [(search(space(), queue(knee, load, noise, seed))[0], knee) for seed, knee in enumerate(knees())]
    assert sum(is_right(*at) for at in outcomes) >= 0.95 * SEEDS
    assert sum(is_honest(*at) for at in outcomes) >= 0.95 * SEEDS


def test_too_much_noise_is_admitted() -> None:
    """At 30 % noise on a metric of slope 1 the knee can't be had to 5 % with 40 trials: then the outcome must say so."""
    outcomes: Counter[str] = Counter()
    wrong_but_sure = honest = 0
    for seed, knee in enumerate(knees()[:400]):
        verdict, _ = search(space(), power(knee, 1, 0.3, seed))
        outcomes[verdict.outcome] += 1
        wrong_but_sure += verdict.outcome == "precision reached" and not is_right(verdict, knee)
        honest += is_honest(verdict, knee) or verdict.outcome in ("nothing feasible", "no limit in range")
    assert outcomes["limited by noise"] + outcomes["budget spent"] >= 0.8 * 400
    assert wrong_but_sure <= 0.1 * 400
    assert honest >= 0.9 * 400


def test_a_system_without_noise_pays_one_repeat_in_all() -> None:
    for i in range(200):
        _, history = search(space(repeats=8), power(1000 ** (i / 199), 2))
        assert sum(a.probe.seed > 0 for a in history) <= 1


def test_far_from_the_limit_nothing_is_asked_twice() -> None:
    for seed in range(200):
        _, history = search(space(repeats=8), power(77, 1, 0.02, seed))
        assert all(0.5 < a.probe.knobs["k"] / 77 < 2 for a in history if a.probe.seed > 0)


def test_one_repeat_means_one_seed_each() -> None:
    for seed in range(50):
        verdict, history = search(space(repeats=1), power(77, 1, 0.05, seed))
        assert {a.probe.seed for a in history} == {0} and verdict.outcome == "precision reached"


def test_more_repeats_are_never_asked_than_allowed() -> None:
    for repeats in (2, 3, 7):
        for seed in range(30):
            _, history = search(space(repeats=repeats), power(77, 1, 0.2, seed))
            assert max(a.probe.seed for a in history) < repeats
            asked = Counter(a.probe.knobs["k"] for a in history)
            for value, count in asked.items():
                assert sorted(a.probe.seed for a in history if a.probe.knobs["k"] == value) == list(range(count))


def test_an_early_wrong_verdict_is_revised() -> None:
    """Seed 0 at the first setting near the knee lies; the neighbours' answers overrule it."""
    lied: list[float] = []

    def ask(probe: Probe) -> Answer:
        value = probe.knobs["k"]
        metric = value / 100 * (1 + 0.03 * (-1) ** probe.seed)
        if not lied and abs(value / 100 - 1) < 0.2:
            lied.append(value)
            metric = 100 / value  # on the wrong side of the limit
        return Answer(probe, value, {"m": metric})

    verdict, _ = search(space(), ask)
    assert lied and verdict.knobs is not None and abs(verdict.knobs["k"] / 100 - 1) <= 0.05


def test_the_best_objective_is_not_picked_out_of_noise() -> None:
    """With a noisy objective the last passing setting stays the answer, unless a safer one is better beyond the noise."""
    far = [search(space(), power(100, 4, 0.02, s, objective_noise=0.05))[0].knobs for s in range(100)]
    assert sum(k is not None and abs(k["k"] / 100 - 1) <= 0.05 for k in far) >= 95


def test_two_limits_are_both_kept() -> None:
    def ask(probe: Probe) -> Answer:
        value = probe.knobs["k"]
        return Answer(probe, value, {"a": value / 300, "b": (value / 200) ** 3})

    verdict, _ = search(space(limits={"a": 1.0, "b": 1.0}), ask)
    assert verdict.knobs is not None and 200 / 1.05 <= verdict.knobs["k"] <= 200


@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 5)), min_size=1, max_size=12))
def test_rising_is_the_closest_rising_sequence(given_: list[tuple[float, int]]) -> None:
    values, weights = [v for v, _ in given_], [w for _, w in given_]
    fitted = rising(values, weights)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(fitted))
    total = sum(weights)
    mean = sum(v * w for v, w in given_) / total
    assert sum(f * w for f, w in zip(fitted, weights, strict=True)) / total == pytest.approx(mean, abs=1e-9)
    for level in (min(values), mean, max(values)):  # no constant is closer
        distance = sum(w * (v - f) ** 2 for v, w, f in zip(values, weights, fitted, strict=True))
        assert distance <= sum(w * (v - level) ** 2 for v, w in given_) + 1e-9
    if values == sorted(values):
        assert fitted == values


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(1e-3, 1e3))
def test_a_margin_is_bounded_and_has_the_sign_of_the_violation(metric: float, limit: float) -> None:
    found = margin(metric, limit)
    assert -CLIP <= found <= CLIP
    assert (found > 0) == (not math.isfinite(metric) or metric / limit > 1)


def test_pooled_noise_of_known_groups() -> None:
    noise = pooled_noise([[1.0, 3.0], [5.0], [2.0, 2.0, 5.0]])
    assert noise.degrees == 3 and noise.deviation == pytest.approx(math.sqrt((2 + 6) / 3))
    assert pooled_noise([[1.0], [2.0]]).degrees == 0


def test_student_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in range(1, 200):
        assert student(degrees) == pytest.approx(stats.t.ppf(0.985, degrees), rel=0.01)


def test_deciding_needs_the_noise_and_the_distance() -> None:
    def settled(*margins: float) -> bool:
        answers = tuple(Answer(Probe({"k": 1.0}, i), 1.0, {"m": math.exp(x)}) for i, x in enumerate(margins))
        return judge([Setting(0.0, answers)], {"m": 1.0})[0].decided

    assert settled(0.5) and settled(-0.5)  # far away
    assert not settled(0.1)  # near, and noise unknown
    assert settled(0.1, 0.1)  # no noise
    assert not settled(0.05, 0.15)  # two that differ say little about how much they differ
    assert settled(0.05, 0.15, 0.1, 0.08, 0.12)
    assert fmean([0.05, -0.15, 0.1, 0.08, -0.12]) < 0 and not settled(0.05, -0.15, 0.1, 0.08, -0.12)


def test_noise_never_makes_a_cliff_of_a_slope() -> None:
    outcomes = Counter(search(space(), power(77, 2, 0.1, seed))[0].outcome for seed in range(200))
    assert outcomes["cliff"] == 0


def test_a_noisy_cliff_is_still_a_cliff() -> None:
    def ask(seed: int) -> Ask:
        return lambda p: of(
            lambda k: k, lambda k: (0.5 if k < 77 else 9) * math.exp(0.1 * random.Random(f"{seed}{p}").gauss(0, 1))
        )(p)

    assert {search(space(), ask(seed))[0].outcome for seed in range(100)} == {"cliff"}
