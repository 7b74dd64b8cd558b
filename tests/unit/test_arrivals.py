"""Arrival processes: their statistics, their extents, what a seed keeps, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.workloads import arrivals
from systems.common.workloads.arrivals import Extent
from systems.common.workloads.streams import PURPOSES, stream


def rng(seed=0, purpose="arrivals"):
    return stream(seed, purpose)


PROCESSES = {
    "poisson": lambda rate, extent, seed=0: arrivals.poisson(rng(seed), rate, extent),
    "gamma": lambda rate, extent, seed=0: arrivals.gamma(rng(seed), rate, 3.0, extent),
    "spotserve": lambda rate, extent, seed=0: arrivals.spotserve_gamma(rng(seed), rate, 6.0, extent),
    "deterministic": lambda rate, extent, seed=0: arrivals.deterministic(rate, extent),
    "mmpp": lambda rate, extent, seed=0: arrivals.mmpp(
        rng(seed), rng(seed, "modulation"), [1.0, 6.0], [10.0, 5.0], extent, rate
    ),
    "modulated": lambda rate, extent, seed=0: arrivals.modulated_gamma(
        rng(seed), rng(seed, "modulation"), rate, 2.0, 0.5, 30.0, extent
    ),
}
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def cv(times):
    gaps = np.diff(times, prepend=0.0)
    return gaps.std() / gaps.mean()


@EVERY
@settings(deadline=None)
@given(rate=st.floats(0.01, 100), count=st.integers(1, 300), seed=st.integers(0, 5))
def test_count_is_exact_and_times_rise(process, rate, count, seed):
    times = process(rate, Extent(count=count), seed)
    assert len(times) == count
    assert np.isfinite(times).all() and times[0] >= 0 and (np.diff(times) >= 0).all()


@EVERY
@settings(deadline=None)
@given(rate=st.floats(0.01, 20), seconds=st.floats(0.1, 100), seed=st.integers(0, 5))
def test_seconds_is_the_beginning_of_a_longer_run(process, rate, seconds, seed):
    times = process(rate, Extent(seconds=seconds), seed)
    longer = process(rate, Extent(seconds=2.5 * seconds), seed)
    assert (times < seconds).all()
    np.testing.assert_allclose(times, longer[longer < seconds], rtol=1e-9)
    counted = process(rate, Extent(count=len(times) + 1), seed)
    np.testing.assert_allclose(times, counted[:-1], rtol=1e-9)
    assert counted[-1] >= seconds * (1 - 1e-9)  # the next one would have been too late


@EVERY
def test_same_seed_same_times_other_seed_other_times(process):
    a, b = (process(2.0, Extent(count=50), 7) for _ in range(2))
    assert (a == b).all()
    if process is not PROCESSES["deterministic"]:
        assert (process(2.0, Extent(count=50), 8) != a).any()


@pytest.mark.parametrize("name", ["poisson", "gamma", "deterministic"])
def test_another_rate_stretches_the_same_pattern(name):
    slow, fast = (PROCESSES[name](rate, Extent(count=100)) for rate in (1.0, 4.0))
    np.testing.assert_allclose(slow, 4 * fast, rtol=1e-12)


@pytest.mark.parametrize(("name", "expected"), [("poisson", 1.0), ("gamma", 3.0), ("modulated", 2.0)])
def test_rate_and_cv_of_many(name, expected):
    times = PROCESSES[name](4.0, Extent(count=200_000))
    assert 200_000 / times[-1] == pytest.approx(4.0, rel=0.04)
    assert cv(times) == pytest.approx(expected, rel=0.05)


def test_spotserve_generator_is_nearly_a_clock():
    # measured on the artifact's query_tpt0.35_cv6 (0.046), query6144_tpt1.5_cv6 (0.094) and query_tpt0.2_cv6 (0.035)
    for rate, measured in ((0.35, 0.0457), (1.5, 0.0939), (0.2, 0.0351)):
        times = arrivals.spotserve_gamma(rng(), rate, 6.0, Extent(count=20_000))
        assert cv(times) == pytest.approx(measured, rel=0.03)
        assert 20_000 / times[-1] == pytest.approx(rate, rel=0.01)


def test_deterministic_starts_at_zero():
    assert arrivals.deterministic(2.0, Extent(seconds=2.0)).tolist() == [0.0, 0.5, 1.0, 1.5]
    assert arrivals.deterministic(2.0, Extent(count=3)).tolist() == [0.0, 0.5, 1.0]


def test_piecewise_rates_and_silence():
    times = arrivals.piecewise(rng(), [50.0, 0.0, 200.0], [100.0, 50.0, 100.0])
    counts, _ = np.histogram(times, [0, 100, 150, 250])
    assert counts[1] == 0
    assert counts[0] == pytest.approx(5_000, abs=5 * math.sqrt(5_000))
    assert counts[2] == pytest.approx(20_000, abs=5 * math.sqrt(20_000))
    assert times[-1] < 250


def test_piecewise_repeats_when_asked_for_more():
    times = arrivals.piecewise(rng(), [100.0, 0.0], [1.0, 9.0], Extent(seconds=100.0))
    assert set(np.floor(times % 10).tolist()) == {0.0}
    assert len(times) == pytest.approx(1000, abs=5 * math.sqrt(1000))


def test_piecewise_of_one_rate_is_poisson():
    whole = arrivals.piecewise(rng(), [3.0], [100.0])
    np.testing.assert_allclose(whole, arrivals.poisson(rng(), 3.0, Extent(seconds=100.0)), rtol=1e-9)


def test_mmpp_starts_in_state_zero_and_switches():
    times = arrivals.mmpp(rng(), rng(0, "modulation"), [0.0, 1000.0], [10.0, 10.0], Extent(seconds=2000.0))
    assert times[0] > 0.5  # state 0 is silent, and it lasts 10 s on average
    per_second, _ = np.histogram(times, np.arange(0, 2001))
    assert len(times) / 2000 == pytest.approx(500, rel=0.25)
    assert (per_second == 0).mean() == pytest.approx(0.5, abs=0.15)


def test_mmpp_long_run_mean_is_scaled():
    times = arrivals.mmpp(rng(), rng(0, "modulation"), [1.0, 10.0, 4.0], [2.0, 1.0, 1.0], Extent(count=100_000), rate_rps=7.0)
    assert 100_000 / times[-1] == pytest.approx(7.0, rel=0.05)


RECORDED = np.array([100.0, 101.0, 101.0, 104.0, 110.0, 110.0, 112.0])


def test_replay_scales_all_gaps_by_one_factor():
    times = arrivals.replay(RECORDED, Extent(count=4), rate_rps=2.0)
    # n = 4 requests have n gaps: 1, 0, 3, 6 with mean 2.5; wanted 0.5
    assert times.tolist() == pytest.approx([0.0, 0.2, 0.2, 0.8])
    whole = arrivals.replay(RECORDED, Extent(count=7), rate_rps=0.5)  # 6 gaps are all there are: mean 2, as wanted
    assert whole.tolist() == pytest.approx((RECORDED - 100).tolist())


def test_replay_unscaled_skip_and_seconds():
    assert arrivals.replay(RECORDED, Extent(count=3)).tolist() == [0.0, 1.0, 1.0]
    assert arrivals.replay(RECORDED, Extent(seconds=9.0)).tolist() == [0.0, 1.0, 1.0, 4.0]
    assert arrivals.replay(RECORDED, Extent(count=2), skip=3).tolist() == [0.0, 6.0]
    assert len(arrivals.replay(RECORDED, Extent(seconds=2.5), rate_rps=2.0)) == 5


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 10.0), min_size=3, max_size=50).filter(lambda gaps: sum(gaps[1:]) > 0.01), st.floats(0.1, 50))
def test_replay_keeps_the_shape(gaps, rate):
    recorded = np.cumsum(gaps)
    count = len(gaps) - 1
    times = arrivals.replay(recorded, Extent(count=count), rate_rps=rate)
    factor = count / (rate * (recorded[count] - recorded[0]))
    np.testing.assert_allclose(np.diff(times), factor * np.diff(recorded[:count]), rtol=1e-6, atol=1e-9)
    assert (np.diff(times)[np.diff(recorded[:count]) == 0] == 0).all()  # together stays together


@EVERY
@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_impossible_rates_are_refused(process, rate):
    for extent in (Extent(count=3), Extent(seconds=3.0)):
        with pytest.raises(InputError, match=r"rate_rps: .*above 0"):
            process(rate, extent)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Extent(), "exactly one"),
        (lambda: Extent(count=1, seconds=1.0), "exactly one"),
        (lambda: Extent(count=0), "whole number"),
        (lambda: Extent(seconds=math.nan), "above 0"),
        (lambda: Extent(seconds=-1.0), "above 0"),
        (lambda: arrivals.poisson(rng(), 1e12, Extent(seconds=1e6)), "more than"),
        (lambda: arrivals.gamma(rng(), 1.0, 0.0, Extent(count=1)), "cv"),
        (lambda: arrivals.piecewise(rng(), [0.0, 0.0], [1.0, 1.0]), "at least one above 0"),
        (lambda: arrivals.piecewise(rng(), [-1.0, 2.0], [1.0, 1.0]), "none negative"),
        (lambda: arrivals.piecewise(rng(), [math.nan], [1.0]), "finite rates"),
        (lambda: arrivals.piecewise(rng(), [1.0], [1.0, 2.0]), "one duration per rate"),
        (lambda: arrivals.piecewise(rng(), [1.0], [0.0]), "durations_s"),
        (lambda: arrivals.mmpp(rng(), rng(), [1.0], [1.0], Extent(count=1)), "two states"),
        (lambda: arrivals.modulated_gamma(rng(), rng(), 1.0, 1.0, 1.2, 10.0, Extent(count=1)), "rate_cv"),
        (lambda: arrivals.modulated_gamma(rng(), rng(), 1.0, 0.3, 0.8, 10.0, Extent(count=1)), "rate_cv"),
        (lambda: arrivals.replay(RECORDED, Extent(count=8)), "ask for fewer"),
        (lambda: arrivals.replay(RECORDED, Extent(count=2), skip=6), "ask for fewer"),
        (lambda: arrivals.replay(RECORDED[1:3], Extent(count=2), rate_rps=1.0), "can't be scaled"),
        (lambda: stream(-1, "arrivals"), "seed"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_streams_are_those_that_numpy_spawns_and_differ():
    children = np.random.SeedSequence(5).spawn(len(PURPOSES))
    drawn = {purpose: stream(5, purpose).random() for purpose in PURPOSES}
    assert list(drawn.values()) == [np.random.Generator(np.random.PCG64(child)).random() for child in children]
    assert len(set(drawn.values())) == len(PURPOSES)
