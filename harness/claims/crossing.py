"""Where along a factor a series comes down, and whether it does so when the paper says."""

from __future__ import annotations

from collections.abc import Mapping

from harness.claims.data import Table
from harness.claims.judgement import Judgement, Status, expected, untestable
from harness.claims.models import Crossing, series_of


def judge_crossing(claim: Crossing, table: Table) -> Judgement:
    """Judge `claim` once for every combination of the other factors; the worst of these judgements counts."""
    lines = {name: table.lines(name, claim.at, claim.column, claim.along) for name in series_of(claim)}
    groups = list(dict.fromkeys(group for by_group in lines.values() for group in by_group))
    if not groups:
        return untestable(claim, f"no numbers for {', '.join(lines)} along {claim.along}")
    judged = [_judge(claim, {name: by_group.get(group, {}) for name, by_group in lines.items()}) for group in groups]
    order = (Status.DIFFERS, Status.NOT_TESTABLE, Status.REPRODUCED)
    return min(judged, key=lambda judgement: order.index(judgement.status))


def _judge(claim: Crossing, lines: Mapping[str, Mapping[float, float]]) -> Judgement:
    """`lines` gives each series' numbers by level of the factor, levels rising."""
    levels = sorted({level for line in lines.values() for level in line})
    gaps = [f"{name} at {claim.along}={level:g}" for name, line in lines.items() for level in levels if level not in line]
    if gaps:
        return untestable(claim, f"no number for {', '.join(gaps[:3])}{' and more' if len(gaps) > 3 else ''}")
    compared = dict.fromkeys((claim.series, *claim.before, *claim.together_with))
    found = {name: _first(claim, lines[name], lines.get(claim.under or "", {})) for name in compared}
    measured = "; ".join(f"{name} {'never' if x is None else f'at {x:g}'}" for name, x in found.items())
    numbers = {name: x for name, x in found.items() if x is not None}
    # where nothing comes down the range may just end too early, unless the paper names a level inside it
    ends_early = claim.within is None or claim.within.max is None or claim.within.max > levels[-1]
    if not numbers and ends_early:
        return untestable(claim, f"none comes down by {claim.along}={levels[-1]:g}, the last level here", measured)
    reason = _why_not(claim, found)
    return Judgement(Status.DIFFERS if reason else Status.REPRODUCED, measured, expected(claim), reason, numbers)


def _first(claim: Crossing, line: Mapping[float, float], other: Mapping[float, float]) -> float | None:
    """The first level at which `line` is down."""
    for x, y in line.items():
        if (y < other[x]) if claim.level is None else (y <= claim.level + claim.tolerance * abs(claim.level)):
            return x
    return None


def _why_not(claim: Crossing, found: Mapping[str, float | None]) -> str:
    """Why the levels `found` break the claim; empty where they do not.

    Two series that come down at one level break `before`: the paper reads the order off the same levels.
    """
    own = found[claim.series]
    if own is None:
        return f"{claim.series} does not come down"
    if claim.within and not claim.within.holds(own):
        return f"{claim.series} comes down outside the range"
    for name in claim.before:
        other = found[name]
        if other is not None and other <= own:
            return f"{name} comes down {'at the same level' if other == own else 'earlier'}"
    for name in claim.together_with:
        if found[name] != own:
            return f"{name} comes down at another level"
    return ""
