"""One knob, no noise: the knee, the ends, cliffs, whole numbers, hints, targets, peaks."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.search import Answer, Knob, Probe, SearchSpace, Verdict, propose, search
from systems.registry import InputError
from tests.unit.search_systems import of, power, queue, space
from tests.unit.search_systems import settings as count_settings


def check_knee(knee: float, verdict: Verdict, history: list[Answer]) -> None:
    assert verdict.knobs is not None
    assert abs(verdict.knobs["k"] / knee - 1) <= 0.05
    assert verdict.objective == verdict.knobs["k"] <= knee * (1 + 1e-12)  # the system's own rounding
    assert count_settings(history) <= 12 and len(history) <= 12  # even counting the one repeat that shows there is no noise


@settings(max_examples=1500, deadline=None)
@given(st.floats(0, math.log(1000)), st.floats(0.2, 12))
def test_the_knee_is_found_to_five_percent_in_twelve_probes(log_knee: float, exponent: float) -> None:
    knee = max(1.0, min(math.exp(log_knee), 1000.0))
    check_knee(knee, *search(space(), power(knee, exponent)))


def test_five_thousand_knees_evenly_over_the_range() -> None:
    most = 0
    for i in range(5001):
        knee = min(1000 ** (i / 5000), 1000.0)
        verdict, history = search(space(), power(knee))
        check_knee(knee, verdict, history)
        most = max(most, len(history))
    assert most == 12


@settings(max_examples=300, deadline=None)
@given(st.floats(1, 1000), st.floats(0.05, 0.999))
def test_a_saturating_latency_is_no_different(knee: float, load: float) -> None:
    check_knee(knee, *search(space(), queue(knee, load)))


@pytest.mark.parametrize("knee", [1.0, 1.0001, 2.0, 8.0, 128.0, 999.9])
def test_knees_at_the_ends_and_at_the_walk_s_own_steps(knee: float) -> None:
    check_knee(knee, *search(space(), power(knee)))


def test_nothing_feasible_is_zero_after_one_setting() -> None:
    verdict, history = search(space(infeasible=0), power(0.2))
    assert (verdict.outcome, verdict.knobs, verdict.objective, verdict.answer) == ("nothing feasible", None, 0.0, None)
    assert len(history) == 1 and not verdict.feasible
    assert verdict.beyond == history[0]


def test_nothing_feasible_close_below_the_range() -> None:
    verdict, history = search(space(infeasible=-1), power(0.99))
    assert (verdict.outcome, verdict.objective, len(history)) == ("nothing feasible", -1.0, 2)


def test_no_limit_in_range_answers_the_high_end() -> None:
    verdict, _ = search(space(), power(5000))
    assert (verdict.outcome, verdict.knobs, verdict.bracket) == ("no limit in range", {"k": 1000.0}, None)


def test_no_limits_at_all_is_no_limit_in_range() -> None:
    verdict, _ = search(space(limits={}), power(5))
    assert (verdict.outcome, verdict.knobs) == ("no limit in range", {"k": 1000.0})


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_none_count_as_violated(broken: float) -> None:
    verdict, _ = search(space(), of(lambda k: k, lambda k: 0.1 if k < 50 else broken))
    assert verdict.outcome == "cliff" and verdict.knobs is not None and 50 / 1.05 <= verdict.knobs["k"] < 50
    verdict, _ = search(space(), of(lambda k: k if k < 50 else broken, lambda k: 0.1))
    assert verdict.knobs is not None and 50 / 1.05 <= verdict.knobs["k"] < 50


def test_a_cliff_is_called_one_with_both_sides() -> None:
    verdict, _ = search(space(), of(lambda k: k, lambda k: 0.4 * (1 + k / 1e4) if k < 77 else 11.3))
    assert verdict.outcome == "cliff"
    assert verdict.answer is not None and verdict.answer.metrics["m"] < 0.5
    assert verdict.beyond is not None and verdict.beyond.metrics["m"] == 11.3
    assert verdict.bracket is not None and verdict.bracket[0] < 77 <= verdict.bracket[1]
    assert "11.3" in verdict.note and "limit 1" in verdict.note


@pytest.mark.parametrize("exponent", [0.5, 1, 4, 12])
def test_a_steep_slope_is_not_a_cliff(exponent: float) -> None:
    assert search(space(), power(77, exponent))[0].outcome == "precision reached"


def test_neighbouring_small_integers_are_not_a_cliff() -> None:
    knob = Knob(low=1, high=64, integer=True)
    verdict, _ = search(space(knobs={"k": knob}), power(1.5, 2))
    assert (verdict.outcome, verdict.knobs, verdict.bracket) == ("precision reached", {"k": 1}, (1, 2))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.sampled_from(["log", "linear"]), st.sampled_from(["up", "down"]))
def test_integers_end_within_tolerance_or_at_neighbours(knee: int, scale: str, direction: str) -> None:
    knob = Knob.model_validate({"low": 1, "high": 3000, "integer": True, "scale": scale, "direction": direction})
    sign = 1 if direction == "up" else -1
    verdict, history = search(space(knobs={"k": knob}), of(lambda k: sign * k + 3001, lambda k: (k / knee) ** sign))
    assert verdict.knobs is not None and isinstance(verdict.knobs["k"], int)
    found = verdict.knobs["k"]
    assert sign * found <= sign * knee
    assert abs(found - knee) <= max(0.05 * max(found, knee), 1e-9) + (15 if scale == "linear" else 0)
    assert all(isinstance(a.probe.knobs["k"], int) for a in history)


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 10))
def test_a_linear_knob_that_may_be_zero(knee: float) -> None:
    knob = Knob(low=0, high=10, scale="linear")
    verdict, history = search(space(knobs={"k": knob}), of(lambda k: k, lambda k: math.exp(k - knee)))
    assert verdict.knobs is not None
    assert 0 <= knee - verdict.knobs["k"] <= 0.05 * max(verdict.knobs["k"] * 1.06, 1.0) + 1e-3
    assert count_settings(history) <= 12


def test_listed_values_are_the_only_ones_asked() -> None:
    values = (16, 32, 64, 128, 256, 512, 1024)
    knob = Knob.model_validate({"values": values, "integer": True})
    verdict, history = search(space(knobs={"k": knob}), power(300))
    assert verdict.knobs == {"k": 256} and verdict.bracket == (256, 512)
    assert {a.probe.knobs["k"] for a in history} <= set(values)


@settings(max_examples=300, deadline=None)
@given(st.floats(1, 1000))
def test_a_falling_knob_is_the_mirror_image(knee: float) -> None:
    knob = Knob(low=1, high=1000, direction="down")
    verdict, history = search(space(knobs={"k": knob}), of(lambda k: 1 / k, lambda k: knee / k))
    assert verdict.knobs is not None and 1 <= verdict.knobs["k"] / knee <= 1.05 + 1e-9
    assert history[0].probe.knobs["k"] == 1000 and count_settings(history) <= 12


def hinted(start: float) -> SearchSpace:
    return space(knobs={"k": Knob(low=1, high=1000, start=start)})


def test_a_good_hint_needs_two_settings() -> None:
    verdict, history = search(hinted(200), power(204))
    assert verdict.knobs == {"k": 200} and count_settings(history) == 2


@settings(max_examples=300, deadline=None)
@given(st.floats(2, 500), st.floats(0.8, 1.25))
def test_a_hint_within_a_quarter_saves_probes(knee: float, error: float) -> None:
    verdict, history = search(hinted(knee * error), power(knee))
    assert verdict.knobs is not None and abs(verdict.knobs["k"] / knee - 1) <= 0.05
    assert count_settings(history) <= 6


@settings(max_examples=300, deadline=None)
@given(st.floats(1, 1000), st.floats(1, 1000))
def test_any_hint_leads_to_the_knee(knee: float, start: float) -> None:
    verdict, _ = search(hinted(start), power(knee))
    assert verdict.knobs is not None and abs(verdict.knobs["k"] / knee - 1) <= 0.05


@settings(max_examples=200, deadline=None)
@given(st.floats(1, 1000), st.floats(1, 1000))
def test_a_peaked_objective_ends_at_the_best_feasible_setting_probed(peak: float, knee: float) -> None:
    verdict, history = search(space(), of(lambda k: 1 / (k / peak + peak / k), lambda k: k / knee))
    assert verdict.objective == max(a.objective for a in history if a.metrics["m"] <= 1)


@settings(max_examples=200, deadline=None)
@given(st.floats(1.1, 900), st.floats(0.3, 3))
def test_a_target_is_met_within_the_tolerance(at: float, exponent: float) -> None:
    tuned = space(limits={}, target={"metric": "m", "value": 1.0})
    verdict, _ = search(tuned, power(at, exponent))
    assert verdict.outcome == "precision reached" and verdict.answer is not None
    assert abs(math.log(verdict.answer.metrics["m"])) <= max(1, exponent) * math.log(1.05) * (1 + 1e-3)


def test_targets_out_of_reach() -> None:
    tuned = space(limits={}, target={"metric": "m", "value": 1.0})
    assert search(tuned, power(5000))[0].outcome == "no limit in range"
    assert search(tuned, power(0.5))[0].outcome == "nothing feasible"


def test_the_budget_is_kept_and_said() -> None:
    for budget in range(1, 12):
        verdict, history = search(space(budget=budget), power(999))
        assert len(history) <= budget
        assert verdict.outcome == "budget spent"
        assert verdict.objective == max((a.objective for a in history if a.metrics["m"] <= 1), default=0)


def test_no_knob_is_one_trial() -> None:
    rules = space(knobs={})
    assert propose(rules, []) == Probe({}, 0)
    verdict, history = search(rules, lambda probe: Answer(probe, 3.0, {"m": 0.5}))
    assert (verdict.outcome, verdict.knobs, verdict.objective, len(history)) == ("single trial", {}, 3.0, 1)
    verdict, _ = search(rules, lambda probe: Answer(probe, 3.0, {"m": 1.5}))
    assert (verdict.outcome, verdict.knobs, verdict.objective) == ("nothing feasible", None, 0.0)


@pytest.mark.parametrize("knobs", [{}, {"k": Knob(low=1, high=9)}, {"k": Knob(low=1, high=9), "l": Knob(low=1, high=9)}])
def test_a_limit_on_a_metric_that_is_not_reported(knobs: dict) -> None:
    with pytest.raises(InputError, match="does not report it; it reports other"):
        search(space(knobs=knobs), lambda probe: Answer(probe, 1.0, {"other": 0.5}))


def test_the_first_questions_double_ever_faster() -> None:
    _, history = search(space(), power(5000))
    assert [a.probe.knobs["k"] for a in history] == [1, 2, 8, 128, 1000]


def test_probes_are_a_pure_function_of_the_history() -> None:
    rules, draw = space(), random.Random(4)
    for _ in range(50):
        system = power(math.exp(draw.uniform(0, 6.9)), 1, 0.1, draw.randrange(99))
        verdict, history = search(rules, system)
        for length in range(len(history)):
            assert propose(space(), list(history[:length])) == history[length].probe
        assert propose(rules, history) == verdict
