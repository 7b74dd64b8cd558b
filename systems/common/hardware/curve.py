"""Straight lines between measured points, and surfaces of them.

Linear interpolation is used throughout: on kernel times it has been found several times closer than log-space
interpolation (leave-one-out 2.3 to 3.7 % against 11.6 to 14.4 %). Outside the measured range:

* left of the first point the first value holds: a kernel that is too small to fill the GPU takes the same time;
* right of the last point, the line through the last point and the one nearest half its x goes on. The last two
  points alone would carry their noise far out. Its slope is never negative.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from systems.common.hardware.cost import Affine


@dataclass(frozen=True, slots=True)
class Curve:
    """Piecewise-linear y over strictly increasing `xs`."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def __post_init__(self) -> None:
        assert self.xs and len(self.xs) == len(self.ys), self
        assert all(a < b for a, b in zip(self.xs, self.xs[1:], strict=False)), self

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """A curve through `points` in any order; the mean where an x comes more than once."""
        by_x: dict[float, list[float]] = {}
        for x, y in points:
            by_x.setdefault(x, []).append(y)
        return cls(tuple(sorted(by_x)), tuple(fmean(by_x[x]) for x in sorted(by_x)))

    @property
    def tail_slope(self) -> float:
        """Slope to the right of the last point."""
        half = min(range(len(self.xs)), key=lambda i: abs(self.xs[i] - self.xs[-1] / 2))
        if half == len(self.xs) - 1:
            half -= 1
        if half < 0:
            return 0.0
        return max(0.0, (self.ys[-1] - self.ys[half]) / (self.xs[-1] - self.xs[half]))

    def slope(self, segment: int) -> float:
        """Slope of a segment: 0 left of the first point, 1 from the first to the second, and so on."""
        if segment == 0:
            return 0.0
        if segment == len(self.xs):
            return self.tail_slope
        rise = self.ys[segment] - self.ys[segment - 1]
        return rise / (self.xs[segment] - self.xs[segment - 1])

    def at(self, x: float) -> float:
        """The value at `x`."""
        segment = bisect_right(self.xs, x)
        knot = max(segment - 1, 0)
        return self.ys[knot] + self.slope(segment) * (x - self.xs[knot])

    def pieces(self) -> list[Affine]:
        """The curve as straight pieces from x = 0 on, in order; each is valid up to its `end`."""
        ends = (*self.xs, math.inf)
        found = []
        for segment, end in enumerate(ends):
            knot, slope = max(segment - 1, 0), self.slope(segment)
            found.append(Affine(self.ys[knot] - slope * self.xs[knot], slope, end))
        return found


def mix(parts: Sequence[tuple[float, Curve]]) -> Curve:
    """The weighted sum of curves, as a curve over all their knots; its tail slope follows from its own points."""
    knots = sorted({x for _, curve in parts for x in curve.xs})
    return Curve(tuple(knots), tuple(sum(weight * curve.at(x) for weight, curve in parts) for x in knots))


def neighbours(knots: Sequence[float], x: float) -> tuple[tuple[int, float], ...]:
    """The knots between which `x` lies, as (index, weight); weights sum to 1.

    One knot where `x` is on it or left of all of them. Right of all, the weights extrapolate as `Curve.tail_slope` does.
    """
    if len(knots) == 1 or x <= knots[0]:
        return ((0, 1.0),)
    right = bisect_right(knots, x)
    if knots[right - 1] == x:
        return ((right - 1, 1.0),)
    last = len(knots) - 1
    if right > last:
        half = min(range(last), key=lambda i: abs(knots[i] - knots[last] / 2))
        beyond = (x - knots[last]) / (knots[last] - knots[half])
        return ((half, -beyond), (last, 1.0 + beyond))
    share = (x - knots[right - 1]) / (knots[right] - knots[right - 1])
    return ((right - 1, 1.0 - share), (right, share))
