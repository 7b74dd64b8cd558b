"""What a figure file may claim: seven kinds of statement about a figure's table.

Every claim points at rows by data alone: `series` names rows, `at` narrows them by factor, `column` is the
number that is looked at (the figure's objective where it is absent). Nothing is evaluated as code. Unknown keys are
refused. `tolerance` is relative to the number that the paper gives, except in `zero_at`, where it is absolute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, NonNegativeFloat, model_validator

Level = str | bool | FiniteFloat


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Strict):
    """Both ends belong to it; an end that is absent is open."""

    min: FiniteFloat | None = None
    max: FiniteFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self

    def holds(self, number: float) -> bool:
        """Whether `number` lies in it."""
        return (self.min is None or number >= self.min) and (self.max is None or number <= self.max)


At = Mapping[str, Range | Level]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("names the same series twice")
    return names


#: One series or a list of them: `over: fineinfer` is `over: [fineinfer]`.
Series = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]


class Statement(_Strict):
    """What every claim has.

    `text` is the paper's statement in our words, `source` the section of the paper or the file of its artifact that
    makes it, `note` how we read it where it can be read in several ways.
    """

    id: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$", description="unique in its figure, e.g. C2a")
    text: str = Field(min_length=1)
    source: str = Field(min_length=1)
    note: str = ""
    at: At = Field(default_factory=dict, description="which rows: factor to a value or to {min, max}")
    column: str | None = Field(default=None, description="which number; absent: the figure's objective")
    tolerance: NonNegativeFloat = 0.0


class RatioBetween(Statement):
    """`series` / each of `over`, at every point of `at` where the latter is not 0, lies in [`low`, `high`]."""

    kind: Literal["ratio_between"]
    series: str
    over: Series
    low: FiniteFloat
    high: FiniteFloat

    @model_validator(mode="after")
    def _check(self) -> RatioBetween:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self


class AtLeast(Statement):
    """Every number of `series` is at least `value`; with `over`, its ratio to each of them is."""

    kind: Literal["at_least"]
    series: Series
    over: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    value: FiniteFloat


class Ordering(Statement):
    """At every point the `series` come in this order: falling (largest first) or rising; equal ones do not break it."""

    kind: Literal["ordering"]
    series: Annotated[Series, Field(min_length=2)]
    direction: Literal["falling", "rising"] = "falling"

    @model_validator(mode="after")
    def _check(self) -> Ordering:
        _distinct(self.series)
        return self


class ZeroAt(Statement):
    """Every number of every one of `series` is 0 (within `tolerance`, absolute)."""

    kind: Literal["zero_at"]
    series: Series


class Monotone(Statement):
    """Along a factor each of `series` never falls (`rising`) or never rises (`falling`), the other factors held."""

    kind: Literal["monotone"]
    series: Series
    along: str
    direction: Literal["rising", "falling"]


class Crossing(Statement):
    """Where `series` first comes down, along a numeric factor, to `level` or to below the series `under`.

    The crossing is the first level of the factor at which that holds. It must lie in `within` and be at a smaller
    level than that of each of `before`, and at the same level as that of each of `together_with`.
    """

    kind: Literal["crossing"]
    series: str
    along: str
    level: FiniteFloat | None = None
    under: str | None = None
    within: Range | None = None
    before: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    together_with: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()

    @model_validator(mode="after")
    def _check(self) -> Crossing:
        if (self.level is None) == (self.under is None):
            raise ValueError("give either level or under")
        if self.within is None and not self.before and not self.together_with:
            raise ValueError("give within, before or together_with")
        return self


class Equals(Statement):
    """Every number of `series` at `at` is `value`, within `tolerance`."""

    kind: Literal["equals"]
    series: str
    value: FiniteFloat


Claim = Annotated[
    RatioBetween | AtLeast | Ordering | ZeroAt | Monotone | Crossing | Equals,
    Field(discriminator="kind"),
]


def check_claims(claims: Sequence[Claim], series: Sequence[str], factors: Sequence[str]) -> None:
    """Check claims against the figure that makes them: a typing mistake must not end as "not testable here".

    Raises:
        ValueError: two claims share an id, or one names a series or a factor that the figure does not have.
    """
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise ValueError(f"claim id {claim.id} is used twice")
        seen.add(claim.id)
        for name in series_of(claim):
            if name not in series:
                raise ValueError(f"claim {claim.id} names series {name!r}; the figure has {', '.join(series)}")
        for name in (*claim.at, *([claim.along] if isinstance(claim, Monotone | Crossing) else [])):
            if name not in factors:
                raise ValueError(f"claim {claim.id} names factor {name!r}; the figure has {', '.join(factors)}")


def series_of(claim: Claim) -> tuple[str, ...]:
    """Every series that `claim` names, in the order in which it names them."""
    named: list[str] = []
    for field in ("series", "over", "under", "before", "together_with"):
        value = getattr(claim, field, None) or ()
        named += [value] if isinstance(value, str) else value
    return tuple(dict.fromkeys(named))
