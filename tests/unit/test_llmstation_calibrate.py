"""Rows of `corun.csv` from seconds, and a budget of time: pure."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.calibrate.budget import Budget
from systems.llmstation.calibrate.rows import Row, of_limit, of_means, of_steps, text
from systems.llmstation.corun.observed import Step

ALONE = {"forward": 0.0004, "backward": 0.0005}


def beside(took_s: float, phases: dict[str, list[float]], share: float = 1.0) -> Step:
    return Step(None, took_s, took_s * share, phases)


def test_a_step_that_tuning_ran_beside_throughout_is_as_much_slower_as_it_took() -> None:
    steps = [beside(0.010, {"forward": [0.0006]})] * 4 + [beside(0.012, {"backward": [0.001]})] * 4
    rows = of_steps(("decode", 32), 0.005, steps, ALONE, 500, 32)
    assert [(r.tuning_phase, r.serving_slowdown, r.tuning_slowdown) for r in rows] == [
        ("forward", pytest.approx(2.0), pytest.approx(1.5)),
        ("backward", pytest.approx(2.4), pytest.approx(2.0)),
    ]


def test_steps_beside_both_phases_count_only_where_there_are_few_others() -> None:
    both = [beside(0.030, {"forward": [0.0008], "backward": [0.001]})] * 5
    few = of_steps(("prefill", 2000), 0.015, [*both, beside(0.015, {"forward": [0.0004]})], ALONE, 500, 32)
    assert [r.serving_slowdown for r in few] == [pytest.approx(2.0)] * 2
    pure = of_steps(("prefill", 2000), 0.015, [*both, *[beside(0.015, {"forward": [0.0004]})] * 3], ALONE, 500, 32)
    assert pure[0].serving_slowdown == pytest.approx(1.0) and pure[1].serving_slowdown == pytest.approx(2.0)


def test_steps_without_tuning_beside_say_nothing() -> None:
    assert of_steps(("decode", 1), 0.005, [Step(None, 0.005)], ALONE, 500, 32) == []


@given(st.floats(0.001, 0.1), st.floats(1, 4), st.floats(0.2, 1))
def test_what_is_slower_while_shared_is_told_from_part_of_a_step(alone_s: float, times: float, share: float) -> None:
    """`share` of the layers ran beside tuning, each `times` as long; the rest alone."""
    took_s = alone_s * (1 - share) + alone_s * share * times
    step = Step(None, took_s, alone_s * share * times, {"forward": [0.001]})
    (row,) = of_steps(("decode", 8), alone_s, [step] * 3, {"forward": 0.0005}, 500, 32)
    assert row.serving_slowdown == pytest.approx(times, rel=1e-6)


def test_processes_are_told_by_their_means() -> None:
    rows = of_means(("decode", 32), 0.005, 0.0075, ALONE, {"forward": 0.0008, "backward": 0.002}, 512, 0.3, "mps")
    assert [(r.serving_slowdown, r.tuning_slowdown, r.sm_limit) for r in rows] == [
        (pytest.approx(1.5), pytest.approx(2.0), 0.3),
        (pytest.approx(1.5), pytest.approx(4.0), 0.3),
    ]
    alone = of_limit(ALONE, {"forward": 0.0012, "backward": 0.0015}, 512, 0.3, "mps")
    assert [(r.serving_phase, r.serving_size, r.tuning_slowdown) for r in alone] == [("idle", 0, pytest.approx(3.0))] * 2


def test_noise_never_makes_a_slowdown_below_one() -> None:
    written = list(csv.DictReader(io.StringIO(text([Row("decode", "forward", 1, 500, 1.0, 0.98, 0.9)]))))
    assert (written[0]["serving_slowdown"], written[0]["tuning_slowdown"], written[0]["way"]) == ("1.0000", "1.0000", "streams")


def test_a_budget_yields_points_while_time_is_left() -> None:
    now = [0.0]
    budget = Budget(2.5, lambda: now[0])
    done = []
    for point in budget.within("steps", range(5)):
        done.append(point)
        now[0] += 1.0
    assert done == [0, 1, 2] and budget.left_out == {"steps": "2 of 5 points"}
    assert list(budget.within("more", [7])) == [] and budget.left_out["more"] == "1 of 1 points"
    assert list(Budget().within("all", [1, 2])) == [1, 2]
