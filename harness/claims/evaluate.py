"""One claim and one table give one judgement. Pure: no files, no clock, and the same table always gives the same words.

Three rules hold for every kind. A point whose number is missing or not finite counts as absent. A statement about
several points or series differs as soon as one of them breaks it; where none does but a whole series is absent it is
not testable here. A ratio over 0 says nothing: it is left out, and the judgement says how many were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import singledispatch
from itertools import pairwise

from harness.claims.data import Point, Table
from harness.claims.models import (
    AtLeast,
    Claim,
    Crossing,
    Equals,
    Monotone,
    Ordering,
    Range,
    RatioBetween,
    Statement,
    ZeroAt,
    series_of,
)


class Status(StrEnum):
    """What our table says about a claim of the paper."""

    REPRODUCED = "reproduced"
    DIFFERS = "differs"
    NOT_TESTABLE = "not testable here"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`measured` is our number and `expected` the paper's, as shown; `numbers` are the same for programs."""

    status: Status
    measured: str
    expected: str
    reason: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Value:
    """One number that a claim speaks about, and where it stands."""

    where: str
    number: float


def evaluate(claim: Claim, table: Table) -> Judgement:
    """What `table` says about `claim`."""
    column = claim.column or table.objective
    if all(column not in row for row in table.rows):
        return Judgement(Status.NOT_TESTABLE, "-", expected(claim), f"the table has no column {column}")
    return _judge(claim, table)


def expected(claim: Claim) -> str:
    """The paper's number, as shown beside ours."""
    match claim:
        case RatioBetween():
            text = f"{claim.low:g} to {claim.high:g}"
        case AtLeast():
            text = f"at least {claim.value:g}"
        case Ordering():
            text = (" >= " if claim.direction == "falling" else " <= ").join(claim.series)
        case ZeroAt():
            text = "0"
        case Monotone():
            text = f"{claim.direction} along {claim.along}"
        case Equals():
            text = f"{claim.value:g}" if claim.value == round(claim.value, 4) else repr(claim.value)
        case Crossing():
            text = _expected_crossing(claim)
    return text


def _expected_crossing(claim: Crossing) -> str:
    parts = [f"before {', '.join(claim.before)}"] if claim.before else []
    parts += [f"together with {', '.join(claim.together_with)}"] if claim.together_with else []
    if claim.within:
        ends = (claim.within.min, claim.within.max)
        parts.append(" to ".join("any" if end is None else f"{end:g}" for end in ends))
    return f"{claim.series} {'; '.join(parts)}"


@singledispatch
def _judge(claim: Statement, table: Table) -> Judgement:
    raise NotImplementedError(type(claim))


@_judge.register
def _(claim: RatioBetween, table: Table) -> Judgement:
    values, left_out = _ratios(table, claim, (claim.series,), claim.over)
    low, high = claim.low - claim.tolerance * abs(claim.low), claim.high + claim.tolerance * abs(claim.high)
    return _judge_all(claim, table, values, lambda value: low <= value <= high, left_out)


@_judge.register
def _(claim: AtLeast, table: Table) -> Judgement:
    if claim.over:
        values, left_out = _ratios(table, claim, claim.series, claim.over)
    else:
        values, left_out = _numbers(table, claim, claim.series), ""
    floor = claim.value - claim.tolerance * abs(claim.value)
    return _judge_all(claim, table, values, lambda value: value >= floor, left_out)


@_judge.register
def _(claim: ZeroAt, table: Table) -> Judgement:
    return _judge_all(claim, table, _numbers(table, claim, claim.series), lambda value: abs(value) <= claim.tolerance)


@_judge.register
def _(claim: Equals, table: Table) -> Judgement:
    slack = claim.tolerance * (abs(claim.value) or 1.0)
    return _judge_all(
        claim, table, _numbers(table, claim, (claim.series,)), lambda value: abs(value - claim.value) <= slack
    )


@_judge.register
def _(claim: Ordering, table: Table) -> Judgement:
    sign = 1 if claim.direction == "falling" else -1
    values = []
    for first, second in pairwise(claim.series):
        ours, theirs = (table.numbers(name, claim.at, claim.column) for name in (first, second))
        for point in _common(ours, theirs):
            lead = sign * (ours[point] - theirs[point]) + claim.tolerance * abs(theirs[point])
            where = f"{first} {ours[point]:.4g}, {second} {theirs[point]:.4g} at {table.say(point)}"
            values.append(_Value(where, lead))
    broken = [value for value in values if value.number < 0]
    measured = f"holds for {len(values) - len(broken)} of {len(values)} pairs"
    numbers = {"pairs": float(len(values)), "broken": float(len(broken))}
    reason = f"e.g. {min(broken, key=lambda value: value.number).where}" if broken else ""
    return _conclude(claim, table, bool(broken), bool(values), measured, reason, numbers)


@_judge.register
def _(claim: Monotone, table: Table) -> Judgement:
    sign = 1 if claim.direction == "rising" else -1
    steps, broken = 0, []
    for name in claim.series:
        for line in _lines(table, claim, name, claim.along).values():
            for (x0, y0), (x1, y1) in pairwise(line.items()):
                steps += 1
                if sign * (y1 - y0) < -claim.tolerance * abs(y0):
                    broken.append(f"{name} from {y0:.4g} at {claim.along}={x0:g} to {y1:.4g} at {x1:g}")
    measured = f"holds for {steps - len(broken)} of {steps} steps"
    numbers = {"steps": float(steps), "broken": float(len(broken))}
    reason = f"e.g. {broken[0]}" if broken else ""
    return _conclude(claim, table, bool(broken), steps > 0, measured, reason, numbers)


@_judge.register
def _(claim: Crossing, table: Table) -> Judgement:
    lines = {name: _lines(table, claim, name, claim.along) for name in series_of(claim)}
    groups = list(dict.fromkeys(group for by_group in lines.values() for group in by_group))
    if not groups:
        return _untestable(claim, f"no numbers for {', '.join(lines)} along {claim.along}")
    judged = [_judge_crossing(claim, {name: by_group.get(group, {}) for name, by_group in lines.items()}) for group in groups]
    # one group that differs decides; otherwise one that cannot be tested does
    worst = [j for status in (Status.DIFFERS, Status.NOT_TESTABLE) for j in judged if j.status is status]
    return (worst or judged)[0]


def _judge_crossing(claim: Crossing, lines: Mapping[str, Mapping[float, float]]) -> Judgement:
    """`lines` gives, by series, the numbers by level of the factor, levels rising; the other factors are held."""
    levels = sorted({level for line in lines.values() for level in line})
    gaps = [f"{name} at {claim.along}={level:g}" for name, line in lines.items() for level in levels if level not in line]
    if gaps:
        return _untestable(claim, f"no number for {', '.join(gaps[:3])}{' and more' if len(gaps) > 3 else ''}")
    compared = [claim.series, *claim.before, *claim.together_with]
    found = {name: _first_crossing(claim, lines[name], lines.get(claim.under or "", {})) for name in dict.fromkeys(compared)}
    measured = "; ".join(f"{name} {'never' if x is None else f'at {x:g}'}" for name, x in found.items())
    numbers = {name: x for name, x in found.items() if x is not None}
    beyond = claim.within is not None and (claim.within.max is None or claim.within.max > levels[-1])
    if found[claim.series] is None and len(numbers) == 0 and (claim.within is None or beyond):
        return _untestable(claim, f"none comes down by {claim.along}={levels[-1]:g}, the last level here", measured)
    reason = _why_not(claim, found)
    return Judgement(Status.DIFFERS if reason else Status.REPRODUCED, measured, expected(claim), reason, numbers)


def _first_crossing(claim: Crossing, line: Mapping[float, float], other: Mapping[float, float]) -> float | None:
    for x, y in line.items():
        if y < other[x] if claim.level is None else y <= claim.level + claim.tolerance * abs(claim.level):
            return x
    return None


def _why_not(claim: Crossing, found: Mapping[str, float | None]) -> str:
    """Why the crossings `found` break the claim; empty where they do not."""
    own = found[claim.series]
    if own is None:
        return f"{claim.series} does not come down"
    if claim.within and not _inside(own, claim.within):
        return f"{claim.series} comes down outside the range"
    for name in claim.before:
        other = found[name]
        if other is not None and other <= own:
            return f"{name} comes down {'at the same level' if other == own else 'earlier'}"
    for name in claim.together_with:
        if found[name] != own:
            return f"{name} comes down at another level"
    return ""


def _inside(x: float, within: Range) -> bool:
    return (within.min is None or x >= within.min) and (within.max is None or x <= within.max)


def _judge_all(
    claim: Claim, table: Table, values: Sequence[_Value], holds: Callable[[float], bool], left_out: str = ""
) -> Judgement:
    """A statement that must hold for each of `values`."""
    broken = [value for value in values if not holds(value.number)]
    numbers = {"points": float(len(values)), "broken": float(len(broken))}
    measured = "-"
    if values:
        low, high = min(value.number for value in values), max(value.number for value in values)
        numbers |= {"min": low, "max": high}
        measured = _span(low, high)
    worst = max(broken, key=lambda value: _outside(value.number, broken), default=None)
    reason = f"{len(broken)} of {len(values)} break it, e.g. {worst.where}: {worst.number:.6g}" if worst else ""
    reason = "; ".join(part for part in (reason, left_out) if part)
    return _conclude(claim, table, bool(broken), bool(values), measured, reason, numbers)
