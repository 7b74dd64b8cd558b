"""Arrival processes: when requests come.

Every function gives the arrival times of one run, in seconds from its start, rising. `Extent` says how far: until so
many requests, or until so many seconds. Times are drawn as gaps of mean 1 and then stretched, so that one seed gives
the *same* pattern at every rate and a longer run begins with the shorter one: neighbouring points of a figure share
their noise.

| function | process | used by |
| --- | --- | --- |
| `deterministic` | equal gaps | checks |
| `poisson` | exponential gaps | LLMStation Figure 8, dLoRA (per adapter) |
| `gamma` | gamma gaps of a true coefficient of variation (CV) | SpotServe's text (CV 6) |
| `spotserve_gamma` | what SpotServe's artifact really draws | SpotServe's figures |
| `piecewise` | Poisson, rate constant in pieces | Sirius 4.1, SpotServe's fluctuating load |
| `mmpp` | Markov-modulated Poisson | Sirius BURST, MaverIQ's two-rate load |
| `modulated_gamma` | gamma gaps under a rate that is redrawn | stand-ins for bursty traces |
| `replay` | recorded times, all gaps scaled by one factor | LLMStation Figures 9, 10, 13 |

All raise InputError for a rate that is zero, negative, infinite or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from systems.common.errors import InputError

FloatArray = npt.NDArray[np.float64]
Draw = Callable[[int], FloatArray]
"""Draws that many gaps of mean 1."""
Pieces = Callable[[int], tuple[FloatArray, FloatArray]]
"""Draws at least that many pieces of a rate curve: how long each lasts (s), and its rate (req/s)."""

MOST_REQUESTS = 50_000_000
"""More than this is a slip of the keyboard, and would end in a machine without memory."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How far an arrival process goes: `count` requests, or all before `seconds`. Exactly one is given."""

    count: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.seconds is None):
            given = "neither" if self.count is None else "both"
            raise InputError("workload", "requests, seconds", given, "give exactly one of the two")
        if self.count is not None and not 1 <= self.count <= MOST_REQUESTS:
            raise InputError("workload", "requests", self.count, f"give a whole number from 1 to {MOST_REQUESTS}")
        if self.seconds is not None:
            positive("seconds", self.seconds)

    def expect(self, rate_rps: float) -> int:
        """About how many requests come at `rate_rps`.

        Raises InputError when they are too many to be meant.
        """
        if self.count is not None:
            return self.count
        assert self.seconds is not None
        if self.seconds * rate_rps > MOST_REQUESTS:
            raise InputError("workload", "seconds", self.seconds, f"at this rate it means more than {MOST_REQUESTS} requests")
        return math.ceil(self.seconds * rate_rps)


def positive(key: str, value: float) -> float:
    """`value` if it is finite and above zero, else InputError."""
    if not (math.isfinite(value) and value > 0):
        raise InputError("workload", key, value, "give a finite number above 0")
    return value


def deterministic(rate_rps: float, extent: Extent) -> FloatArray:
    """One request every 1/`rate_rps` seconds, the first at 0."""
    positive("rate_rps", rate_rps)
    times = np.arange(extent.expect(rate_rps) + 1) / rate_rps
    kept: FloatArray = times[: extent.count] if extent.seconds is None else times[times < extent.seconds]
    return kept


def poisson(rng: np.random.Generator, rate_rps: float, extent: Extent) -> FloatArray:
    """Poisson arrivals: exponential gaps of mean 1/`rate_rps`."""
    return _renewal(rng.standard_exponential, positive("rate_rps", rate_rps), extent)


def gamma(rng: np.random.Generator, rate_rps: float, cv: float, extent: Extent) -> FloatArray:
    """Gamma gaps whose standard deviation is `cv` times their mean: shape 1/cv^2. `cv` 1 is Poisson, above 1 is bursty."""
    return _renewal(_gamma_gaps(rng, positive("cv", cv)), positive("rate_rps", rate_rps), extent)


def spotserve_gamma(rng: np.random.Generator, rate_rps: float, cv: float, extent: Extent) -> FloatArray:
    """What SpotServe's artifact draws when it is asked for a CV (elastic-switch/trace/gen_query.py).

    It passes `cv` as the *scale* of a gamma in milliseconds and (1000/rate)/cv as its shape. The mean gap is right,
    but the coefficient of variation is sqrt(cv * rate / 1000): 0.046 where the paper says 6, almost a clock.
    """
    positive("rate_rps", rate_rps)
    return gamma(rng, rate_rps, math.sqrt(positive("cv", cv) * rate_rps / 1000), extent)


def piecewise(
    rng: np.random.Generator, rates_rps: Sequence[float], durations_s: Sequence[float], extent: Extent | None = None
) -> FloatArray:
    """Poisson arrivals whose rate is `rates_rps[i]` for `durations_s[i]`; a piece of rate 0 is silent.

    Without an extent: one pass over the pieces. With a longer one they repeat from the start.
    """
    rates, durations = _curve(rates_rps, durations_s)
    extent = extent or Extent(seconds=float(durations.sum()))
    extent.expect(float(rates @ durations / durations.sum()))
    return _on_curve(rng.standard_exponential, lambda n: _tile(durations, rates, n), extent)


def mmpp(
    rng: np.random.Generator,
    modulation: np.random.Generator,
    rates_rps: Sequence[float],
    dwell_s: Sequence[float],
    extent: Extent,
    rate_rps: float | None = None,
) -> FloatArray:
    """Markov-modulated Poisson: the rate is `rates_rps[state]`, and state i lasts an exponential time of mean `dwell_s[i]`.

    It starts in state 0 and leaves a state for any other with equal chance. `modulation` drives the states, `rng` the
    arrivals. With `rate_rps` all rates are scaled by one factor to that long-run mean.
    """
    rates, dwells = _curve(rates_rps, dwell_s)
    if len(rates) < 2:
        raise InputError("workload", "rates_rps", list(rates_rps), "give at least two states, or use arrivals: poisson")
    mean_rps = float(rates @ dwells / dwells.sum())
    if rate_rps is not None:
        rates = rates * (positive("rate_rps", rate_rps) / mean_rps)
    extent.expect(rate_rps or mean_rps)
    state = 0

    def pieces(count: int) -> tuple[FloatArray, FloatArray]:
        nonlocal state
        visited = np.empty(count, dtype=np.int64)
        for i, step in enumerate(modulation.integers(1, len(rates), size=count).tolist()):
            visited[i] = state
            state = (state + step) % len(rates)
        return dwells[visited] * modulation.standard_exponential(count), rates[visited]

    return _on_curve(rng.standard_exponential, pieces, extent)


def modulated_gamma(
    rng: np.random.Generator,
    modulation: np.random.Generator,
    rate_rps: float,
    gap_cv: float,
    rate_cv: float,
    period_s: float,
    extent: Extent,
) -> FloatArray:
    """Gamma gaps under a rate that is itself redrawn from a gamma of mean `rate_rps` and CV `rate_cv` every `period_s`.

    `gap_cv` is the CV of *all* gaps together. With a slow rate of gamma shape k = 1/rate_cv^2 it obeys
    gap_cv^2 + 1 = (1 + g^2) k / (k - 1), which gives the CV g of the gaps at a constant rate.

    Raises InputError when no g does: `rate_cv` of 1 or more, or a `gap_cv` that the changing rate alone exceeds.
    """
    shape = 1 / positive("rate_cv", rate_cv) ** 2
    inner = (positive("gap_cv", gap_cv) ** 2 + 1) * (shape - 1) / shape - 1
    if shape <= 1 or inner <= 0:
        raise InputError("workload", "rate_cv", rate_cv, f"too large for a gap_cv of {gap_cv:g}: lower it")
    positive("period_s", period_s)
    scale = positive("rate_rps", rate_rps) / shape
    extent.expect(rate_rps)

    def pieces(count: int) -> tuple[FloatArray, FloatArray]:
        return np.full(count, period_s), modulation.standard_gamma(shape, count) * scale

    return _on_curve(_gamma_gaps(rng, math.sqrt(inner)), pieces, extent)


def replay(recorded_s: FloatArray, extent: Extent, rate_rps: float | None = None, skip: int = 0) -> FloatArray:
    """Recorded arrivals from number `skip` on, starting at 0; with `rate_rps` all gaps are scaled by one factor.

    As LLMStation's client does with BurstGPT: for n requests it takes n + 1 recorded times, and scales their n gaps
    to the mean 1/`rate_rps`. The shape of bursts is kept, and so are gaps of zero, where requests arrive together.
    For `seconds`, n is `rate_rps` times them (or, unscaled, what the record holds).

    Raises InputError when the record is too short or has no duration.
    """
    times = np.asarray(recorded_s, dtype=np.float64)[skip:]
    times = times - times[0] if len(times) else times
    if rate_rps is None and extent.seconds is not None:
        return times[times < extent.seconds]
    count = extent.expect(1.0 if rate_rps is None else positive("rate_rps", rate_rps))
    if count > len(times):
        raise InputError("workload", "requests", count, f"the trace holds {len(times)} from number {skip} on: ask for fewer")
    if rate_rps is None:
        return times[:count]
    gaps = min(count, len(times) - 1)
    if gaps < 1 or times[gaps] <= 0:
        raise InputError("workload", "trace", f"{count} requests", "they all arrive at one time and can't be scaled: take more")
    scaled: FloatArray = times[:count] * (gaps / (rate_rps * times[gaps]))
    return scaled


def _gamma_gaps(rng: np.random.Generator, cv: float) -> Draw:
    shape = 1 / cv**2
    return lambda count: rng.standard_gamma(shape, count) / shape


def _renewal(gaps: Draw, rate_rps: float, extent: Extent) -> FloatArray:
    expected = extent.expect(rate_rps)
    if extent.seconds is None:
        return np.cumsum(gaps(expected)) / rate_rps
    times = _until(gaps, extent.seconds * rate_rps, expected) / rate_rps
    return times[times < extent.seconds]


def _until(gaps: Draw, end: float, expected: int) -> FloatArray:
    """Running sum of `gaps`, up to `end` at least."""
    drawn = gaps(expected + 4 * math.isqrt(expected) + 8)
    while (times := np.cumsum(drawn))[-1] < end:
        drawn = np.concatenate((drawn, gaps(len(drawn))))
    return times


def _on_curve(gaps: Draw, pieces: Pieces, extent: Extent) -> FloatArray:
    """Arrivals with `gaps` in operational time, which passes at the rate that `pieces` gives (time-rescaling theorem)."""
    durations, rates = pieces(16)
    arrivals = np.cumsum(gaps(extent.count)) if extent.count is not None else np.empty(0)
    while _falls_short(durations, rates, arrivals, extent):
        more_durations, more_rates = pieces(len(durations))
        durations, rates = np.concatenate((durations, more_durations)), np.concatenate((rates, more_rates))
    edges_s = np.concatenate(([0.0], np.cumsum(durations)))
    mass = np.concatenate(([0.0], np.cumsum(durations * rates)))
    if extent.seconds is None:
        return np.interp(arrivals, mass, edges_s)
    end = float(np.interp(extent.seconds, edges_s, mass))
    arrivals = _until(gaps, end, math.ceil(end))
    times = np.interp(arrivals[arrivals < end], mass, edges_s)
    return times[times < extent.seconds]


def _falls_short(durations: FloatArray, rates: FloatArray, arrivals: FloatArray, extent: Extent) -> bool:
    if extent.seconds is not None:
        return float(durations.sum()) < extent.seconds
    return float(durations @ rates) < float(arrivals[-1])


def _tile(durations: FloatArray, rates: FloatArray, count: int) -> tuple[FloatArray, FloatArray]:
    """Whole passes over the pieces, at least `count` of them."""
    passes = -(-count // len(rates))
    return np.tile(durations, passes), np.tile(rates, passes)


def _curve(rates_rps: Sequence[float], durations_s: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    rates, durations = np.asarray(rates_rps, dtype=np.float64), np.asarray(durations_s, dtype=np.float64)
    if len(rates) != len(durations):
        raise InputError("workload", "rates_rps", len(rates), f"give one duration per rate ({len(durations)} are given)")
    if not (np.isfinite(rates).all() and (rates >= 0).all() and rates.any()):
        raise InputError("workload", "rates_rps", rates.tolist(), "give finite rates, none negative and at least one above 0")
    for duration in durations.tolist():
        positive("durations_s", duration)
    return rates, durations
