"""What users may write about a search, and what they are told when it is wrong."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.search import Knob, read_space
from harness.search.axis import Axis
from systems.registry import InputError

GOOD = {"maximise": "y", "limits": {"ttft_p99_s": 0.5}, "knobs": {"k": {"low": 1, "high": 10}}}


@pytest.mark.parametrize(
    ("change", "key", "mend"),
    [
        ({"limits": {"ttft_p99_s": 0}}, "limits.ttft_p99_s", "above 0"),
        ({"limits": {"ttft_p99_s": -1}}, "limits.ttft_p99_s", "above 0"),
        ({"limits": {"ttft_p99_s": math.inf}}, "limits.ttft_p99_s", "finite"),
        ({"limit": {}}, "limit", "unknown key"),
        ({"tolerance": 0}, "tolerance", "greater than 0"),
        ({"tolerance": 1.0}, "tolerance", "less than 1"),
        ({"repeats": 0}, "repeats", "greater than or equal to 1"),
        ({"budget": True}, "budget", "not true or false"),
        ({"infeasible": math.nan}, "infeasible", "finite"),
        ({"target": {"metric": "y", "value": 1}}, "target", "not both"),
        ({"limits": {}, "target": {"metric": "y", "value": 0}}, "target.value", "greater than 0"),
        ({"limits": {}, "knobs": {}, "target": {"metric": "y", "value": 1}}, "target", "exactly one knob"),
        ({"knobs": {"k": {"low": 5, "high": 5}}}, "knobs.k.low", "below high"),
        ({"knobs": {"k": {"low": 0, "high": 5}}}, "knobs.k.low", "log scale"),
        ({"knobs": {"k": {"low": 1, "high": 5, "scale": "lin"}}}, "knobs.k.scale", "linear"),
        ({"knobs": {"k": {"low": 1, "high": 5, "direction": "left"}}}, "knobs.k.direction", "up"),
        ({"knobs": {"k": {"low": 1.5, "high": 5, "integer": True}}}, "knobs.k.low", "whole"),
        ({"knobs": {"k": {"low": 1, "high": 5, "start": 6}}}, "knobs.k.start", "between 1 and 5"),
        ({"knobs": {"k": {"values": [1, 3, 2]}}}, "knobs.k.values", "rising"),
        ({"knobs": {"k": {"values": [1, 2], "low": 0}}}, "knobs.k.low", "leave low and high out"),
        ({"knobs": {"k": {"low": True, "high": 5}}}, "knobs.k.low", "not true or false"),
    ],
)
def test_bad_input_is_one_line_with_file_key_and_mend(change: dict, key: str, mend: str) -> None:
    with pytest.raises(InputError) as caught:
        read_space("fig8a.yaml", {**GOOD, **change})
    error = caught.value
    assert (error.where, error.key) == ("fig8a.yaml", key)
    assert mend in error.mend and "\n" not in str(error)


def test_defaults_and_values_without_ends() -> None:
    space = read_space("f", {**GOOD, "knobs": {"k": {"values": [64, 128, 256]}}})
    assert (space.knobs["k"].low, space.knobs["k"].high) == (64, 256)
    assert space.infeasible == 0 and space.tolerance == 0.05


KNOBS = st.one_of(
    st.builds(
        lambda low, ratio, direction: Knob(low=low, high=low * ratio, direction=direction),
        st.floats(1e-6, 1e3),
        st.floats(1.001, 1e6),
        st.sampled_from(["up", "down"]),
    ),
    st.builds(
        lambda low, width, direction: Knob(low=low, high=low + width, scale="linear", direction=direction),
        st.floats(-1e3, 1e3),
        st.floats(0.01, 1e4),
        st.sampled_from(["up", "down"]),
    ),
    st.builds(
        lambda low, width, direction: Knob(low=low, high=low + width, integer=True, direction=direction),
        st.integers(1, 1000),
        st.integers(1, 10_000),
        st.sampled_from(["up", "down"]),
    ),
)


@given(KNOBS, st.floats(0, 1), st.floats(0, 1))
def test_an_axis_keeps_order_range_and_type(knob: Knob, a: float, b: float) -> None:
    axis = Axis(knob, 0.05)
    start = axis.position(axis.safest)
    first, second = (axis.value(start + axis.span * share) for share in sorted((a, b)))
    assert axis.position(first) <= axis.position(second)
    assert all(knob.low <= x <= knob.high and isinstance(x, int) == knob.integer for x in (first, second))
    assert {axis.safest, axis.boldest} == {knob.low, knob.high}
    middle = axis.middle(first, second)
    assert middle is None or min(first, second) < middle < max(first, second)
    if middle is None and knob.integer:
        assert abs(first - second) <= 1


@given(KNOBS, st.floats(0, 1), st.floats(1e-9, 1))
def test_a_step_always_moves_until_the_end(knob: Knob, share: float, distance: float) -> None:
    axis = Axis(knob, 0.05)
    here = axis.value(axis.position(axis.safest) + axis.span * share)
    there = axis.step(here, max(axis.unit_near(here), distance))
    assert axis.position(there) > axis.position(here) or here == axis.boldest
