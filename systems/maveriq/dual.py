"""Numbers that carry their derivatives: forward differentiation by a few parameters, on arrays. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from systems.maveriq.configuration import Floats


@dataclass(frozen=True, slots=True)
class Dual:
    """Values [n] and their derivatives by each parameter [parameters, n]."""

    value: Floats
    slope: Floats

    def __add__(self, other: Dual | Floats | float) -> Dual:
        """Sum."""
        return Dual(self.value + _value(other), self.slope + _slope(other))

    def __sub__(self, other: Dual | Floats | float) -> Dual:
        """Difference."""
        return Dual(self.value - _value(other), self.slope - _slope(other))

    def __mul__(self, other: Dual | Floats | float) -> Dual:
        """Product."""
        return Dual(self.value * _value(other), self.slope * _value(other) + self.value * _slope(other))

    def __truediv__(self, other: Dual | Floats | float) -> Dual:
        """Quotient."""
        below = _value(other)
        return Dual(self.value / below, (self.slope - self.value / below * _slope(other)) / below)

    def positive(self) -> Dual:
        """max(0, this): where it is 0 it does not change."""
        return Dual(np.maximum(self.value, 0.0), np.where(self.value > 0, self.slope, 0.0))


def raised(base: Floats, exponent: Dual) -> Dual:
    """`base` to the power of `exponent`; a base of 0 or below gives 0, whatever the exponent."""
    log = np.log(np.where(base > 0, base, 1.0))
    value = np.where(base > 0, np.exp(exponent.value * log), 0.0)
    return Dual(value, value * log * exponent.slope)


def parameter(values: Floats, place: int, count: int) -> Dual:
    """Parameter `place` of `values`, as a number for `count` points."""
    slope = np.zeros((len(values), count))
    slope[place] = 1.0
    return Dual(np.full(count, values[place]), slope)


def constant(value: Floats, parameters: int) -> Dual:
    """A number that depends on no parameter."""
    return Dual(value, np.zeros((parameters, len(value))))


def choose(condition: np.ndarray, yes: Dual, no: Dual) -> Dual:
    """`yes` where `condition`, else `no`."""
    return Dual(np.where(condition, yes.value, no.value), np.where(condition, yes.slope, no.slope))


def _value(number: Dual | Floats | float) -> Floats | float:
    return number.value if isinstance(number, Dual) else number


def _slope(number: Dual | Floats | float) -> Floats | float:
    return number.slope if isinstance(number, Dual) else 0.0
