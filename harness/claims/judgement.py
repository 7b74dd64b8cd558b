"""What a judgement is, and the paper's number in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from harness.claims.models import AtLeast, Claim, Crossing, Equals, Monotone, Ordering, RatioBetween, ZeroAt


class Status(StrEnum):
    """What our table says about a claim of the paper."""

    REPRODUCED = "reproduced"
    DIFFERS = "differs"
    NOT_TESTABLE = "not testable here"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`measured` is our number and `expected` the paper's, as shown; `numbers` says ours again for programs."""

    status: Status
    measured: str
    expected: str
    reason: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


def untestable(claim: Claim, reason: str, measured: str = "-") -> Judgement:
    """The judgement of a claim about which our table says nothing, and why."""
    return Judgement(Status.NOT_TESTABLE, measured, expected(claim), reason)


def expected(claim: Claim) -> str:
    """The paper's number, as shown beside ours."""
    match claim:
        case RatioBetween():
            return f"{claim.low:g} to {claim.high:g}"
        case AtLeast():
            return f"at least {claim.value:g}"
        case Ordering():
            return (" >= " if claim.direction == "falling" else " <= ").join(claim.series)
        case ZeroAt():
            return "0"
        case Monotone():
            return f"{claim.direction} along {claim.along}"
        case Equals():
            return f"{claim.value:.6g}"
        case Crossing():
            return _crossing(claim)


def _crossing(claim: Crossing) -> str:
    parts = [f"before {', '.join(claim.before)}"] if claim.before else []
    parts += [f"together with {', '.join(claim.together_with)}"] if claim.together_with else []
    if claim.within:
        parts.append(" to ".join("any" if end is None else f"{end:g}" for end in (claim.within.min, claim.within.max)))
    return f"{claim.series} {'; '.join(parts)}"
