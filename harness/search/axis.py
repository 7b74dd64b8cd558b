"""A knob as an axis: from its safest setting to its most aggressive one, in equal steps of what matters.

A *position* grows with the objective and with the limits' metrics: it is the logarithm of the value on a log scale, the
value on a linear one, the index in a list of `values`; negated when `direction` is `down`. Values handed out are rounded
to a few significant digits, so that tables are readable and replay does not hang on the last bit of a logarithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from harness.search.space import Knob

NEAR_ZERO = 0.1
"""On a linear scale, a value's own size measures the tolerance, but never less than this share of the range."""


@dataclass(frozen=True)
class Axis:
    """`knob` seen with a relative `tolerance`."""

    knob: Knob
    tolerance: float

    @cached_property
    def safest(self) -> float:
        """The value with the lowest position."""
        return self.value(-math.inf)

    @cached_property
    def boldest(self) -> float:
        """The value with the highest position."""
        return self.value(math.inf)

    @cached_property
    def span(self) -> float:
        """Difference of position between the two ends."""
        return self.position(self.boldest) - self.position(self.safest)

    @property
    def stride(self) -> float:
        """First step of a walk from the safest end: a factor of 2 on a log scale, a sixteenth of a linear range, one index."""
        if self.knob.values is not None:
            return 1.0
        return math.log(2) if self.knob.scale == "log" else self.span / 16

    def position(self, value: float) -> float:
        """Where `value` lies."""
        knob = self.knob
        if knob.values is not None:
            raw = float(min(range(len(knob.values)), key=lambda i: abs(knob.values[i] - value)))  # type: ignore[index]
        else:
            raw = math.log(value) if knob.scale == "log" else value
        return raw if knob.direction == "up" else -raw

    def value(self, position: float) -> float:
        """The allowed value nearest to `position`, an int for an integer knob."""
        knob, raw = self.knob, position if self.knob.direction == "up" else -position
        if knob.values is not None:
            last = len(knob.values) - 1
            return self._typed(knob.values[round(min(max(raw, 0), last))])
        if raw <= self._raw(knob.low):
            return self._typed(knob.low)
        if raw >= self._raw(knob.high):
            return self._typed(knob.high)
        value = math.exp(raw) if knob.scale == "log" else raw
        if not knob.integer:
            value = min(max(self._readable(value), knob.low), knob.high)
        return self._typed(round(value) if knob.integer else value)

    def _readable(self, value: float) -> float:
        """`value` with as few digits as tell apart a thousandth of the tolerance, and of the whole range."""
        finest = min(10 * self.tolerance, (self.knob.high - self.knob.low) / abs(value), 1.0) if value else 1.0
        return float(f"{value:.{4 + math.ceil(-math.log10(finest))}g}")

    def _raw(self, value: float) -> float:
        return math.log(value) if self.knob.scale == "log" else value

    def _typed(self, value: float) -> float:
        return round(value) if self.knob.integer else float(value)

    def width(self, a: float, b: float) -> float:
        """The distance between two values in units of the tolerance: at most 1 is close enough."""
        gap = abs(self.position(a) - self.position(b))
        if self.knob.values is not None:
            return abs(a - b) / (self.tolerance * max(abs(a), abs(b)))
        if self.knob.scale == "log":
            return gap / math.log1p(self.tolerance)
        return gap / self.unit_near(max(abs(a), abs(b)))

    def unit_near(self, value: float) -> float:
        """One tolerance at `value`, in units of position."""
        if self.knob.values is not None:
            return 1.0
        if self.knob.scale == "log":
            return math.log1p(self.tolerance)
        return self.tolerance * max(abs(value), NEAR_ZERO * self.span)

    def middle(self, a: float, b: float) -> float | None:
        """The value halfway in position between `a` and `b`, or None when no allowed value lies strictly between."""
        low, high = sorted((self.position(a), self.position(b)))
        value = self.value((low + high) / 2)
        if low < self.position(value) < high:
            return value
        # rounding fell on an end: the whole number beside the smaller one, if there is one
        whole = self.knob.integer and self.knob.values is None and abs(a - b) > 1
        return min(a, b) + 1 if whole else None

    def step(self, value: float, distance: float) -> float:
        """The value `distance` onward (back, if negative) from `value`, at least one allowed value away, within the range."""
        here = self.position(value)
        there = self.value(here + distance)
        if self.position(there) != here or not self.knob.integer:
            return there
        sign = math.copysign(1, distance) * (1 if self.knob.direction == "up" else -1)
        return self._typed(min(max(value + sign, self.knob.low), self.knob.high))
