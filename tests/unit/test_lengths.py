"""Lengths: rules, filters, sampling and rescaling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.workloads import lengths
from systems.common.workloads.lengths import VLLM_SHAREGPT, Caps, Lengths


def rng(seed=0):
    return np.random.default_rng(seed)


def table(*rows):
    columns = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return Lengths(columns[:, 0].copy(), columns[:, 1].copy())


def rows(made):
    return list(zip(made.input_tokens.tolist(), made.output_tokens.tolist(), strict=True))


tables = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=60).map(lambda r: table(*r))


def test_fixed():
    assert rows(lengths.fixed(2, 512, 128)) == [(512, 128)] * 2


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 50), st.integers(0, 50))
def test_uniform_stays_in_its_range(count, low, more):
    made = lengths.uniform(rng(), count, (low, low + more), (7, 7))
    assert len(made) == count
    assert all(low <= i <= low + more and o == 7 for i, o in rows(made))


def test_uniform_reaches_both_ends():
    made = lengths.uniform(rng(), 500, (3, 5), (1, 2))
    assert set(made.input_tokens.tolist()) == {3, 4, 5}


def test_lognormal_has_the_mean_and_median_that_were_asked_for():
    made = lengths.lognormal(rng(), 200_000, mean_tokens=243, p50_tokens=119)  # ShareGPT prompts, dLoRA's sheet
    assert made.mean() == pytest.approx(243, rel=0.03)
    assert np.median(made) == pytest.approx(119, rel=0.02)
    assert made.min() >= 1
    assert lengths.lognormal(rng(), 1000, 243, 119, most=300).max() == 300


def test_vllm_filter_bounds_are_inclusive():
    kept = lengths.keep(
        table((4, 4), (3, 4), (4, 3), (1024, 1024), (1025, 4), (1024, 1025), (1000, 1048), (1000, 1049)), VLLM_SHAREGPT
    )
    assert rows(kept) == [(4, 4), (1024, 1024), (1000, 1048)]


@settings(deadline=None)
@given(tables, st.integers(0, 150), st.integers(0, 3))
def test_sampling_keeps_rows_together_and_uses_all_before_any_twice(made, count, seed):
    drawn = rows(lengths.sample(made, rng(seed), count))
    assert len(drawn) == count
    assert set(drawn) <= set(rows(made))
    whole = count // len(made) * len(made)
    assert sorted(drawn[:whole]) == sorted(rows(made) * (count // len(made)))


@settings(deadline=None)
@given(tables, st.integers(0, 50))
def test_sampling_with_replacement(made, count):
    drawn = rows(lengths.sample(made, rng(), count, replacement=True))
    assert len(drawn) == count and set(drawn) <= set(rows(made))


@settings(deadline=None)
@given(tables, st.floats(5, 900), st.floats(5, 900))
def test_rescaled_means_hold_and_so_do_the_caps(made, input_mean, output_mean):
    try:
        made = lengths.keep(made, VLLM_SHAREGPT)
    except InputError:
        assume(False)
    scaled = lengths.scale_to_mean(made, input_mean, output_mean)
    # one row of the table rounds to a whole token, so the mean can be off by half a token (equal rows round together)
    assert scaled.input_tokens.mean() == pytest.approx(input_mean, abs=0.51)
    assert scaled.output_tokens.mean() == pytest.approx(output_mean, abs=0.51)
    assert len(lengths.keep(scaled, VLLM_SHAREGPT)) == len(made)  # nothing fell out of the caps
    order = np.argsort(made.input_tokens, kind="stable")
    assert (np.diff(scaled.input_tokens[order]) >= 0).all()


def test_rescaling_one_column_leaves_the_other():
    made = table((10, 20), (30, 40))
    scaled = lengths.scale_to_mean(made, output_mean=60, caps=Caps())
    assert rows(scaled) == [(10, 40), (30, 80)]
    assert rows(lengths.scale_to_mean(made, caps=Caps())) == rows(made)


def test_a_longer_prompt_leaves_less_room_for_the_answer():
    scaled = lengths.scale_to_mean(table((100, 1900), (100, 100)), input_mean=400)
    assert rows(scaled) == [(400, 1648), (400, 100)]


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: lengths.fixed(1, 0, 1), "input_tokens"),
        (lambda: lengths.fixed(1, 1, -5), "output_tokens"),
        (lambda: lengths.uniform(rng(), 1, (5, 4), (1, 1)), "input_tokens"),
        (lambda: lengths.lognormal(rng(), 1, 100, 200), "p50_tokens"),
        (lambda: lengths.lognormal(rng(), 1, float("nan"), 2), "p50_tokens"),
        (lambda: lengths.keep(table((1, 1)), VLLM_SHAREGPT), "lengths_filter"),
        (lambda: lengths.scale_to_mean(table((100, 100)), input_mean=2000), "mean_input_tokens"),
        (lambda: lengths.scale_to_mean(table((100, 100)), output_mean=2000), "mean_output_tokens"),
        (lambda: lengths.scale_to_mean(table((100, 100)), input_mean=1), "mean_input_tokens"),
        (lambda: lengths.scale_to_mean(table((100, 100)), input_mean=float("nan")), "mean_input_tokens"),
    ],
)
def test_bad_input_names_its_key(call, key):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.key == key
