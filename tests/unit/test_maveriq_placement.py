"""Layer placement and load strategies: the closed form against dealing one by one, limits, and what brute force could do."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.maveriq.placement import GpuState, NoRoom, Placement, capacity, fill, place
from systems.maveriq.strategies import STRATEGIES, assign

TOTAL = 48.0


def states(used, busy=None):
    return [GpuState(place, TOTAL, float(gib), (busy or [0.0] * len(used))[place]) for place, gib in enumerate(used)]


nodes = st.lists(st.floats(0, TOTAL), min_size=1, max_size=8)


@st.composite
def asked(draw):
    used = draw(nodes)
    tp = draw(st.integers(1, len(used)))
    pp = draw(st.integers(1, len(used) // tp))
    return states(used, [draw(st.floats(0, 1)) for _ in used]), draw(st.integers(1, 80)), draw(st.floats(0.01, 20)), tp, pp


def dealt(layers, rooms):
    """One layer at a time, round and round, as the paper has it."""
    counts, left = [0] * len(rooms), layers
    while left:
        before = left
        for stage, room in enumerate(rooms):
            if left and counts[stage] < room:
                counts[stage] += 1
                left -= 1
        if left == before:
            break
    return counts


@settings(deadline=None)
@given(st.integers(0, 200), st.lists(st.integers(0, 90), min_size=1, max_size=8))
def test_the_closed_form_is_dealing_one_by_one(layers, rooms):
    assert fill(layers, rooms) == dealt(layers, rooms)


@settings(deadline=None)
@given(asked())
def test_a_placement_keeps_its_promises(case):
    gpus, layers, per_layer, tp, pp = case
    found = place(layers, per_layer, tp, pp, gpus)
    if isinstance(found, NoRoom):
        assert found.reason
        return
    assert sum(found.pp_map) == layers and min(found.pp_map) >= 1 and len(found.pp_map) == pp
    assert len(set(found.gpus)) == len(found.gpus) == tp * pp
    for slot, (gpu, gib) in enumerate(zip(found.gpus, found.gib, strict=True)):
        assert gib == found.pp_map[slot // tp] * per_layer
        assert gpus[gpu].used_gib + gib <= TOTAL
    assert found.total_gib == pytest.approx(layers * tp * per_layer)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 80), st.floats(0.01, 1), st.floats(0, 5))
def test_equal_gpus_get_balanced_stages(pp, layers, per_layer, used):
    found = place(layers, per_layer, 1, pp, states([used] * pp))
    if isinstance(found, Placement):
        assert max(found.pp_map) - min(found.pp_map) <= 1


@settings(deadline=None)
@given(st.lists(st.floats(0, TOTAL), min_size=1, max_size=4), st.integers(1, 2), st.integers(1, 12), st.floats(1, 20))
def test_it_fits_whenever_any_choice_of_gpus_would(used, tp, layers, per_layer):
    gpus = states(used)
    for pp in range(1, len(gpus) // tp + 1):
        could = False
        for order in permutations(gpus, tp * pp):
            rooms = [min(capacity(gpu, per_layer, layers) for gpu in order[i * tp : i * tp + tp]) for i in range(pp)]
            could |= min(rooms) >= 1 and sum(rooms) >= layers >= pp
        assert isinstance(place(layers, per_layer, tp, pp, gpus), Placement) == could


@settings(deadline=None)
@given(st.floats(0, TOTAL), st.floats(0.001, 10))
def test_capacity_is_the_most_that_fits(used, per_layer):
    gpu = GpuState(0, TOTAL, used)
    most = capacity(gpu, per_layer, 10**6)
    assert capacity(gpu, per_layer, 3) == min(3, most)
    assert used + most * per_layer <= TOTAL < used + (most + 1) * per_layer


def test_the_surplus_flows_to_roomier_stages():
    found = place(80, 0.5, 1, 2, states([TOTAL - 17, TOTAL - 23]))
    assert isinstance(found, Placement)
    assert (found.pp_map, found.gpus) == ((46, 34), (1, 0))


@pytest.mark.parametrize(
    ("used", "layers", "per_layer", "tp", "pp", "why"),
    [
        ([0, 0], 10, 1, 2, 2, "takes 4 GPUs and there are 2"),
        ([0, 0], 1, 1, 1, 2, "more than its 1 layers"),
        ([40, 40], 80, 1, 1, 2, "room for 16 of 80"),
        ([0, 48], 10, 1, 1, 2, "stage 1 has no room"),
    ],
)
def test_no_room_says_why(used, layers, per_layer, tp, pp, why):
    found = place(layers, per_layer, tp, pp, states(used))
    assert isinstance(found, NoRoom) and why in found.reason


@settings(deadline=None)
@given(asked(), st.sampled_from(STRATEGIES), st.floats(0, 1))
def test_a_strategy_never_fails_where_the_placement_fits(case, strategy, threshold):
    gpus, layers, per_layer, tp, pp = case
    found = place(layers, per_layer, tp, pp, gpus)
    if isinstance(found, Placement):
        chosen = assign(strategy, found, gpus, threshold)
        assert isinstance(chosen, Placement)
        assert (chosen.pp_map, chosen.gib) == (found.pp_map, found.gib)
        assert len(set(chosen.gpus)) == len(chosen.gpus)
        assert all(gpus[gpu].used_gib + gib <= TOTAL for gpu, gib in zip(chosen.gpus, chosen.gib, strict=True))


def chosen(strategy, busy, parts=(1.0,), used=None, threshold=0.7):
    placement = Placement((1,) * len(parts), tuple(range(len(parts))), tuple(parts))
    found = assign(strategy, placement, states(used or [0] * len(busy), busy), threshold)
    return found.gpus if isinstance(found, Placement) else found.reason


def test_strategies_differ_in_whom_they_prefer():
    busy = [0.5, 0.9, 0.1, 1.0]
    assert chosen("llf", busy) == (2,)
    assert chosen("hybrid", busy) == (0,)  # the busiest below 0.7
    assert chosen("packing", busy) == (1,)  # the busiest that is not busy all the time
    assert chosen("none", busy) == (0,)
    assert chosen("hybrid", busy, (1, 1, 1, 1)) == (0, 2, 1, 3)  # leftovers: the least busy first
    assert chosen("packing", busy, (1, 1, 1, 1)) == (1, 0, 2, 3)


def test_larger_parts_choose_first_and_take_only_what_has_room():
    assert chosen("llf", [0, 0.5], (1, 40), used=[10, 0]) == (0, 1)


@pytest.mark.parametrize("strategy", ["llf", "packing", "hybrid"])
def test_a_strategy_ends_where_nothing_fits(strategy):
    assert "no GPU that is left has 1.000 GiB free" in chosen(strategy, [0, 0], used=[48, 48])
