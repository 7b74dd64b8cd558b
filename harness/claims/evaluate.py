"""One claim and one table give one judgement. Pure: no files, no clock, and the same table always gives the same words.

Three rules hold for every kind. A point whose number is missing or not finite counts as absent. A statement about
several points or series differs as soon as one of them breaks it; where none does but a whole series is absent it is
not testable here. A ratio over 0 says nothing: it is left out, and the judgement says how many were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from harness.claims.crossing import judge_crossing
from harness.claims.data import Table
from harness.claims.judgement import Judgement, Status, expected, untestable
from harness.claims.models import (
    AtLeast,
    Claim,
    Crossing,
    Equals,
    Monotone,
    Ordering,
    RatioBetween,
    ZeroAt,
    series_of,
)

__all__ = ["Judgement", "Status", "evaluate", "expected"]


@dataclass(frozen=True, slots=True)
class _Value:
    """One number that a claim speaks about, and where it stands."""

    where: str
    number: float


def evaluate(claim: Claim, table: Table) -> Judgement:
    """What `table` says about `claim`."""
    column = claim.column or table.objective
    if not table.rows:
        return untestable(claim, "the table is empty")
    if all(column not in row for row in table.rows):
        return untestable(claim, f"the table has no column {column}")
    match claim:
        case RatioBetween():
            return _ratio_between(claim, table)
        case AtLeast():
            return _at_least(claim, table)
        case Ordering():
            return _ordering(claim, table)
        case ZeroAt():
            return _every(claim, table, _numbers(claim, table), lambda x: abs(x) - claim.tolerance)
        case Monotone():
            return _monotone(claim, table)
        case Crossing():
            return judge_crossing(claim, table)
        case Equals():
            slack = claim.tolerance * (abs(claim.value) or 1.0)
            return _every(claim, table, _numbers(claim, table), lambda x: abs(x - claim.value) - slack)


def _ratio_between(claim: RatioBetween, table: Table) -> Judgement:
    low, high = claim.low - claim.tolerance * abs(claim.low), claim.high + claim.tolerance * abs(claim.high)
    values, left_out = _ratios(table, claim, (claim.series,), claim.over)
    return _every(claim, table, values, lambda x: max(low - x, x - high), left_out)


def _at_least(claim: AtLeast, table: Table) -> Judgement:
    floor = claim.value - claim.tolerance * abs(claim.value)
    if not claim.over:
        return _every(claim, table, _numbers(claim, table), lambda x: floor - x)
    values, left_out = _ratios(table, claim, claim.series, claim.over)
    return _every(claim, table, values, lambda x: floor - x, left_out)


def _ordering(claim: Ordering, table: Table) -> Judgement:
    sign = 1 if claim.direction == "falling" else -1
    pairs = []
    for first, second in pairwise(claim.series):
        ours, theirs = (table.numbers(name, claim.at, claim.column) for name in (first, second))
        for point in (point for point in ours if point in theirs):
            lead = sign * (ours[point] - theirs[point]) + claim.tolerance * abs(theirs[point])
            pairs.append(_Value(f"{first} {ours[point]:.4g}, {second} {theirs[point]:.4g} at {table.say(point)}", lead))
    return _counted(claim, table, pairs, "pairs")


def _monotone(claim: Monotone, table: Table) -> Judgement:
    sign = 1 if claim.direction == "rising" else -1
    steps = []
    for name in claim.series:
        for line in table.lines(name, claim.at, claim.column, claim.along).values():
            for (x0, y0), (x1, y1) in pairwise(line.items()):
                rise = sign * (y1 - y0) + claim.tolerance * abs(y0)
                steps.append(_Value(f"{name} {y0:.4g} at {claim.along}={x0:g}, {y1:.4g} at {x1:g}", rise))
    return _counted(claim, table, steps, "steps")


def _numbers(claim: AtLeast | ZeroAt | Equals, table: Table) -> list[_Value]:
    names = (claim.series,) if isinstance(claim.series, str) else claim.series
    return [
        _Value(f"{name} at {table.say(point)}", number)
        for name in names
        for point, number in table.numbers(name, claim.at, claim.column).items()
    ]


def _ratios(table: Table, claim: Claim, series: Sequence[str], over: Sequence[str]) -> tuple[list[_Value], str]:
    """Every ratio that the claim speaks about, and in words what had to be left out."""
    values, zeros, absent = [], 0, 0
    for name in series:
        ours = table.numbers(name, claim.at, claim.column)
        for base in over:
            theirs = table.numbers(base, claim.at, claim.column)
            absent += len(ours.keys() ^ theirs.keys())
            zeros += sum(theirs[point] == 0 for point in ours if point in theirs)
            values += [
                _Value(f"{name} over {base} at {table.say(point)}", number / theirs[point])
                for point, number in ours.items()
                if theirs.get(point, 0) != 0
            ]
    said = [f"left out: {zeros} with {' or '.join(over)} at 0"] if zeros else []
    said += [f"left out: {absent} with a number missing"] if absent else []
    return values, "; ".join(said)


def _every(
    claim: Claim, table: Table, values: Sequence[_Value], excess: Callable[[float], float], left_out: str = ""
) -> Judgement:
    """A statement that must hold for each of `values`; `excess` is above 0 by as much as a number breaks it."""
    broken = [value for value in values if excess(value.number) > 0]
    numbers = {"points": float(len(values)), "broken": float(len(broken))}
    measured, reason = "-", left_out
    if values:
        low, high = min(value.number for value in values), max(value.number for value in values)
        numbers |= {"min": low, "max": high}
        measured = f"{low:.6g}" if low == high else f"{low:.4g} to {high:.4g}"
    if broken:
        worst = max(broken, key=lambda value: excess(value.number))
        said = f"{len(broken)} of {len(values)} outside, worst {worst.where}: {worst.number:.6g}"
        reason = f"{said}; {left_out}" if left_out else said
    return _conclude(claim, table, measured, reason, numbers)


def _counted(claim: Claim, table: Table, leads: Sequence[_Value], noun: str) -> Judgement:
    """A statement about comparisons: each of `leads` says by how much one holds, below 0 where it does not."""
    broken = [lead for lead in leads if lead.number < 0]
    measured = f"holds for {len(leads) - len(broken)} of {len(leads)} {noun}"
    worst = min(broken, key=lambda lead: lead.number).where if broken else ""
    numbers = {"points": float(len(leads)), "broken": float(len(broken))}
    return _conclude(claim, table, measured, f"worst: {worst}" if worst else "", numbers)


def _conclude(claim: Claim, table: Table, measured: str, reason: str, numbers: Mapping[str, float]) -> Judgement:
    if numbers["broken"]:
        return Judgement(Status.DIFFERS, measured, expected(claim), reason, numbers)
    absent = [name for name in series_of(claim) if not table.numbers(name, claim.at, claim.column)]
    if absent:
        return untestable(claim, f"no number here for {', '.join(absent)}", measured)
    if not numbers["points"]:
        return untestable(claim, reason or "nothing to compare at these points", "-")
    return Judgement(Status.REPRODUCED, measured, expected(claim), reason, numbers)
