"""Several knobs: how close to the best of a brute-force grid, and within which budget."""

from __future__ import annotations

import itertools
import math
import random
from statistics import median

import pytest

from harness.search import Answer, Knob, Probe, SearchSpace, propose, search
from harness.search.surrogate import promising_moves, slopes, solve
from tests.unit.search_systems import Ask, several


def problem(seed: int, knobs: int, **changes: object) -> tuple[SearchSpace, Ask]:
    """Random gains, and two limits that are random products of powers of the knobs."""
    draw = random.Random(seed)
    names = [f"k{i}" for i in range(knobs)]
    centre = {n: math.exp(draw.uniform(math.log(2), math.log(60))) for n in names}
    powers = {m: {n: draw.uniform(0.1, 1.5) for n in names} for m in ("a", "b")}
    limits = {m: math.prod(centre[n] ** e for n, e in p.items()) for m, p in powers.items()}
    rules = {"maximise": "y", "limits": limits, "knobs": {n: Knob(low=1, high=100) for n in names}, "budget": 40}
    return SearchSpace.model_validate({**rules, **changes}), several({n: draw.uniform(0.1, 1) for n in names}, powers)


def brute_force(space: SearchSpace, ask: Ask, levels: int) -> float:
    """The best feasible objective on a full grid, even in log space."""
    axes = [[1 * 100 ** (i / (levels - 1)) for i in range(levels)] for _ in space.knobs]
    answers = (ask(Probe(dict(zip(space.knobs, point, strict=True)))) for point in itertools.product(*axes))
    return max((a.objective for a in answers if all(a.metrics[m] <= v for m, v in space.limits.items())), default=0.0)


@pytest.mark.parametrize(("knobs", "levels", "problems", "least", "usual"), [(2, 41, 60, 0.9, 0.98), (4, 9, 10, 0.85, 0.97)])
def test_the_stated_share_of_the_brute_force_optimum(
    knobs: int, levels: int, problems: int, least: float, usual: float
) -> None:
    shares = []
    for seed in range(problems):
        space, ask = problem(seed, knobs)
        verdict, history = search(space, ask)
        assert len(history) <= 40
        assert verdict.answer is not None and all(verdict.answer.metrics[m] <= v for m, v in space.limits.items())
        shares.append(verdict.objective / brute_force(space, ask, levels))
    assert min(shares) >= least
    assert median(shares) >= usual


def test_nothing_feasible_takes_one_trial() -> None:
    space, ask = problem(1, 3, limits={"a": 0.5, "b": 0.5})
    verdict, history = search(space, ask)
    assert (verdict.outcome, verdict.objective, verdict.knobs) == ("nothing feasible", 0.0, None)
    assert len({tuple(a.probe.knobs.values()) for a in history}) == 1


def test_no_limit_in_range_takes_two_trials() -> None:
    space, ask = problem(1, 3, limits={"a": 1e9, "b": 1e9})
    verdict, history = search(space, ask)
    assert verdict.outcome == "no limit in range" and len(history) == 2
    assert verdict.knobs == {"k0": 100, "k1": 100, "k2": 100}


def test_integer_and_falling_knobs_as_in_llmstation_s_fixed_mode() -> None:
    """Tasklets up, waits down; four knobs, as LLMStation's artifact has them."""
    knobs = {
        "forward_tasklets": {"low": 1, "high": 32, "integer": True},
        "forward_wait_s": {"low": 0.0005, "high": 0.05, "direction": "down"},
        "backward_tasklets": {"low": 1, "high": 32, "integer": True},
        "backward_wait_s": {"low": 0.0005, "high": 0.05, "direction": "down"},
    }
    space = SearchSpace.model_validate({"maximise": "y", "limits": {"ttft_s": 0.5, "tpot_s": 0.05}, "knobs": knobs})

    def ask(probe: Probe) -> Answer:
        k = probe.knobs
        assert all(isinstance(k[n], int) for n in ("forward_tasklets", "backward_tasklets"))
        forward, backward = k["forward_tasklets"] * 0.004, k["backward_tasklets"] * 0.008
        busy = (forward + backward) / (forward + backward + k["forward_wait_s"] + k["backward_wait_s"])
        ttft = 0.1 + 0.05 / (1.02 - busy) + 2 * max(forward, backward)
        return Answer(probe, busy, {"ttft_s": ttft, "tpot_s": 0.02 + 0.03 * busy + backward / 10})

    verdict, history = search(space, ask)
    assert verdict.feasible and len(history) <= 40
    safest = ask(Probe({"forward_tasklets": 1, "forward_wait_s": 0.05, "backward_tasklets": 1, "backward_wait_s": 0.05}))
    assert verdict.objective > 5 * safest.objective
    points = itertools.product((1, 2, 4, 8, 16, 32), (0.0005, 0.002, 0.01, 0.05), repeat=2)
    answers = [ask(Probe(dict(zip(knobs, p, strict=True)))) for p in points]
    best = max(a.objective for a in answers if a.metrics["ttft_s"] <= 0.5 and a.metrics["tpot_s"] <= 0.05)
    assert verdict.objective >= 0.95 * best


def test_hints_on_all_knobs_save_trials() -> None:
    cold = hinted = 0
    for seed in range(20):
        space, ask = problem(seed, 2)
        verdict, history = search(space, ask)
        assert verdict.knobs is not None
        knobs = {n: {"low": 1, "high": 100, "start": verdict.knobs[n]} for n in space.knobs}
        again, repeated = search(SearchSpace.model_validate({**space.model_dump(), "knobs": knobs}), ask)
        assert again.objective >= verdict.objective
        cold, hinted = cold + len(history), hinted + len(repeated)
    assert hinted < cold


def test_infeasible_hints_are_survived() -> None:
    space, ask = problem(3, 2)
    knobs = {n: {"low": 1, "high": 100, "start": 100} for n in space.knobs}
    verdict, _ = search(SearchSpace.model_validate({**space.model_dump(), "knobs": knobs}), ask)
    assert verdict.feasible


def test_the_budget_is_kept_and_the_best_so_far_given() -> None:
    for budget in range(1, 30):
        space, ask = problem(5, 4, budget=budget)
        verdict, history = search(space, ask)
        assert len(history) == budget and verdict.outcome == "budget spent"
        feasible = [a.objective for a in history if all(a.metrics[m] <= v for m, v in space.limits.items())]
        assert verdict.objective == max(feasible)


def test_noisy_points_near_a_limit_are_asked_again() -> None:
    shares = []
    for seed in range(30):
        space, ask = problem(seed, 2, repeats=3)

        def noisy(probe: Probe, ask: Ask = ask, seed: int = seed) -> Answer:
            answer, draw = ask(probe), random.Random(f"{seed} {probe}")
            return Answer(
                probe, answer.objective, {m: v * math.exp(0.03 * draw.gauss(0, 1)) for m, v in answer.metrics.items()}
            )

        verdict, history = search(space, noisy)
        assert verdict.knobs is not None and len(history) <= 40
        truth = ask(Probe(verdict.knobs))
        assert all(truth.metrics[m] <= 1.1 * v for m, v in space.limits.items())
        shares.append(verdict.objective / brute_force(space, ask, 21))
    assert median(shares) >= 0.95


@pytest.mark.parametrize("knobs", [2, 4])
def test_every_prefix_asks_the_same_next_question(knobs: int) -> None:
    space, ask = problem(7, knobs)
    verdict, history = search(space, ask)
    for length in range(0, len(history), knobs):
        assert propose(space, list(history[:length])) == history[length].probe
    assert propose(space, history) == verdict


def test_slopes_recover_a_linear_function() -> None:
    truth, draw = (0.7, -0.2, 1.5), random.Random(1)
    points = [tuple(draw.uniform(-0.2, 0.2) for _ in truth) for _ in range(40)]
    rises = [sum(a * b for a, b in zip(truth, p, strict=True)) for p in points]
    assert slopes(points, rises, 0.25, 0.0) == pytest.approx(truth, abs=0.1)
    assert slopes(points, rises, 0.25, 0.5)[1] < 0
    assert solve([[4.0, 1.0], [1.0, 3.0]], [1.0, 2.0]) == pytest.approx([1 / 11, 7 / 11])


def test_promising_moves_climb_and_keep_the_limits() -> None:
    points = ((0.25, 0.0), (0.0, 0.25))
    moves = promising_moves(points, (1.0, 0.25), ((0.0, (0.5, 0.5)),), 0.25)  # the first knob gains more for the same cost
    assert moves[0] == (0.25, -0.25)
    assert promising_moves(points, (0.0, 0.0), (), 0.25) == ()
