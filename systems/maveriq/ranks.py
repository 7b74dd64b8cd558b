"""More ranks than were measured, on a machine that is not that of the priors. Pure numpy.

What the priors know of 4 and 8 ranks is a PCIe box's; elsewhere it may be several times too slow. There the paper's law
takes over, between this model's own one and two ranks:

    L(TP) = L(1) / TP + growth(TP) max(0, L(2) - L(1) / 2),     growth = (TP - 1)^`POWER`

Single points of that TP, too few for straight lines of its own, correct the growth.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from systems.maveriq.configuration import Floats
from systems.maveriq.fingerprint import Setting

POWER = 0.58
"""The mean of the seven published exponents beta (sheet 2.4)."""
_DOUBT = 0.3
"""Standard deviation of the growth, as a share of it, for every doubling of ranks beyond two."""
_NOISE = 0.05
"""Relative error of a single point, and of the law's shape."""


class Growth(NamedTuple):
    """How many times two ranks' overhead some ranks have, and its standard deviation."""

    value: float
    deviation: float


def lined(points: Iterable[Setting]) -> frozenset[int]:
    """The TP degrees that were measured well enough for straight lines: at two depths and two lengths on one stage."""
    found: dict[int, tuple[set[int], set[int]]] = {}
    for s in points:
        if s.pp == 1:
            depths, lengths = found.setdefault(s.tp, (set(), set()))
            depths.add(s.layers)
            lengths.add(s.output_length)
    return frozenset(tp for tp, (depths, lengths) in found.items() if min(len(depths), len(lengths)) >= 2)


def growth(tp: int, single_s: Floats, split_s: Floats, measured_s: Floats) -> Growth:
    """The growth at `tp` > 2 ranks, from points measured there (if any) and what one and two ranks would have taken."""
    expected = (tp - 1) ** POWER
    doubt = expected * _DOUBT * np.log2(tp / 2)
    overhead = np.maximum(0.0, split_s - single_s / 2) / measured_s
    information = 1 / doubt**2 + float(overhead @ overhead) / _NOISE**2
    pull = expected / doubt**2 + float(overhead @ (1 - single_s / tp / measured_s)) / _NOISE**2
    return Growth(max(0.0, pull / information), float(information**-0.5))


def beyond(
    tp: Floats, found: tuple[Floats, Floats], single: tuple[Floats, Floats], split: tuple[Floats, Floats]
) -> tuple[Floats, Floats]:
    """Latency (s) and its relative standard deviation by the law.

    Args:
        tp: ranks.
        found: growth and its deviation.
        single: latency on one rank and its relative deviation.
        split: the same on two ranks.
    """
    overhead = np.maximum(0.0, split[0] - single[0] / 2)
    value = single[0] / tp + found[0] * overhead
    doubt = np.hypot(split[0] * split[1], single[0] / 2 * single[1])
    parts = single[0] / tp * single[1], found[0] * doubt, found[1] * overhead, _NOISE * value
    return value, np.sqrt(sum(part**2 for part in parts)) / value
