"""The planner: how many tuning tasklets may run beside the coming decode iteration (paper section 4.3; sheet 2.7).

With `l_d0` the latency of one decode tasklet (one layer) alone, `l_d` beside a tuning tasklet, `l_p` of a tuning tasklet beside
decoding, and `N_d` decode tasklets in the iteration, N tuning tasklets overlap for N l_p seconds; in that time N l_p /
l_d decode tasklets finish and the rest run at l_d0:

    T = N l_p + (N_d - N l_p / l_d) l_d0  <=  SLO_d      =>      N <= (SLO_d - N_d l_d0) l_d / ((l_d - l_d0) l_p)

Everything here is a pure function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoRunLatencies:
    """Seconds: a decode layer alone (l_d0) and beside tuning (l_d), a tuning tasklet beside decoding (l_p)."""

    decode_alone_s: float
    decode_s: float
    tuning_s: float

    def towards(self, other: CoRunLatencies, weight: float) -> CoRunLatencies:
        """The weighted mean, `weight` of it `other`."""
        keep = 1 - weight
        return CoRunLatencies(
            keep * self.decode_alone_s + weight * other.decode_alone_s,
            keep * self.decode_s + weight * other.decode_s,
            keep * self.tuning_s + weight * other.tuning_s,
        )


def overlapped_s(latencies: CoRunLatencies, decode_tasklets: int, tuning_tasklets: int) -> float:
    """T of the module's formula: how long the iteration takes with `tuning_tasklets` beside it.

    Tuning that outlasts the decode (more than fits) runs on beside nothing that matters: the decode then took `N_d l_d`
    at most.
    """
    alone, shared, tuning = latencies.decode_alone_s, latencies.decode_s, latencies.tuning_s
    overlap = min(tuning_tasklets * tuning, decode_tasklets * shared)
    return overlap + (decode_tasklets - overlap / shared) * alone


def most_that_fit(latencies: CoRunLatencies, decode_tasklets: int) -> int:
    """Tasklets whose overlap does not exceed the decode iteration: N l_p <= N_d l_d."""
    return math.floor(decode_tasklets * latencies.decode_s / latencies.tuning_s * (1 + 1e-12))


def plan_overlapped(latencies: CoRunLatencies, decode_tasklets: int, slo_s: float, remaining: int) -> int:
    """N_p: most tuning tasklets beside one decode iteration that keep it within `slo_s` seconds.

    Edge cases: no slack gives 0; no interference (l_d <= l_d0) is bounded only by what fits in the iteration; never more
    than the phase has left, nor than can overlap with the iteration.
    """
    cap = min(remaining, most_that_fit(latencies, decode_tasklets))
    slack = slo_s - decode_tasklets * latencies.decode_alone_s
    if slack <= 0:
        return 0
    harm = latencies.decode_s - latencies.decode_alone_s
    if harm <= 0:
        return cap
    bound = slack * latencies.decode_s / (harm * latencies.tuning_s)
    return min(cap, math.floor(bound * (1 + 1e-12)))


def plan_fused(decode_alone_s: float, fused_s: float, decode_tasklets: int, slo_s: float, remaining: int) -> int:
    """Most forward layers of tuning that may be fused with decode layers: k <= (SLO_d - N_d l_d0) / (l_x - l_d0).

    A forward layer can only fuse with the decode layer of the same weights, so at most `decode_tasklets` per iteration.
    """
    slack = slo_s - decode_tasklets * decode_alone_s
    if slack <= 0:
        return 0
    cap = min(remaining, decode_tasklets)
    harm = fused_s - decode_alone_s
    return cap if harm <= 0 else min(cap, math.floor(slack / harm * (1 + 1e-12)))
