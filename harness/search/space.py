"""What a knob search may do, and the words it speaks.

`Knob`, `Target`, `SearchRules` and `SearchSpace` are what users write (validated, unknown keys refused); `Probe`,
`Answer` and `Verdict` are what `harness.search.propose` takes and gives. Everything is immutable.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from harness.validation import Model, Wrong, validate


def _not_bool(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bool):
        raise ValueError("give a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]


class Knob(Model):
    """One thing to turn, between `low` and `high` (both are allowed settings), or one of `values`."""

    low: Number
    """The smallest setting; leave it out when there are `values`."""
    high: Number
    """The largest setting; leave it out when there are `values`."""
    integer: bool = False
    """Whole numbers only."""
    scale: Literal["log", "linear"] = "log"
    """Whether the tolerance and the steps of the search go by ratio or by difference."""
    direction: Literal["up", "down"] = "up"
    """`up`: the objective and the limits' metrics grow with the knob. `down`: they fall as it grows."""
    values: tuple[Number, ...] | None = None
    """The only allowed settings, rising."""
    start: Number | None = None
    """A setting thought to be near the answer, such as the one that the simulator found: the search begins there."""

    @model_validator(mode="before")
    @classmethod
    def _ends_of_values(cls, data: Any) -> Any:  # noqa: ANN401
        if isinstance(data, Mapping) and isinstance(values := data.get("values"), list | tuple) and values:
            return {"low": values[0], "high": values[-1], **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Knob:
        if self.values is not None:
            self._check_values(self.values)
        elif not self.low < self.high:
            raise Wrong("low", self.low, f"must be below high ({self.high:g})")
        elif self.scale == "log" and self.low <= 0:
            raise Wrong("low", self.low, "must be above 0 on a log scale; or use `scale: linear`")
        for key, value in (("low", self.low), ("high", self.high), *(("values", v) for v in self.values or ())):
            if self.integer and not value.is_integer():
                raise Wrong(key, value, "must be whole when `integer: true`")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise Wrong("start", self.start, f"must lie between {self.low:g} and {self.high:g}")
        return self

    def _check_values(self, values: tuple[float, ...]) -> None:
        if not values or any(b <= a for a, b in itertools.pairwise(values)):
            raise Wrong("values", values, "must be a list of rising numbers, at least one")
        if (self.low, self.high) != (values[0], values[-1]):
            raise Wrong("low", self.low, "leave low and high out when values are given")


class Target(Model):
    """Instead of the best under limits: where `metric` comes closest to `value` (LLMStation's Figure 10)."""

    metric: str
    value: Annotated[Number, Field(gt=0)]


class SearchRules(Model):
    """The `search` block of a figure file: what to maximise, under which limits, and how hard to look."""

    maximise: str
    """The metric to make as large as possible."""
    limits: Mapping[str, Number] = Field(default_factory=dict)
    """The most that each named metric may be; all must hold."""
    infeasible: Number = 0.0
    """The objective reported when no setting meets the limits."""
    tolerance: Annotated[Number, Field(gt=0, lt=1)] = 0.05
    """Relative width of the final bracket (0.05: the knee is known to 5 %)."""
    repeats: Count = 5
    """Most seeds asked for one setting that noise leaves undecided."""
    budget: Count = 40
    """Most trials per point."""
    target: Target | None = None
    """Tune a metric to a value instead of maximising under limits (one knob only)."""

    @field_validator("limits")
    @classmethod
    def _positive(cls, limits: Mapping[str, float]) -> Mapping[str, float]:
        for name, limit in limits.items():
            if limit <= 0:
                raise Wrong(name, limit, "a limit must be above 0; leave it out to have none")
        return limits

    @model_validator(mode="after")
    def _limits_or_target(self) -> SearchRules:
        if self.target and self.limits:
            raise Wrong("target", self.target.metric, "give either limits or a target, not both")
        return self

    @property
    def bounds(self) -> Mapping[str, float]:
        """The metrics that the search compares, with the value of each: the limits, or the target."""
        return {self.target.metric: self.target.value} if self.target else self.limits


class SearchSpace(SearchRules):
    """The rules and the knobs of one series: all that `propose` needs besides the history."""

    knobs: Mapping[str, Knob] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _target_has_one_knob(self) -> SearchSpace:
        if self.target and len(self.knobs) != 1:
            raise Wrong("target", self.target.metric, f"needs exactly one knob, not {len(self.knobs)}")
        return self


def read_space(where: str | Path, data: Mapping[str, Any]) -> SearchSpace:
    """`data` as a search space; InputError naming file (`where`), key, value and mend when it is not one."""
    return validate(SearchSpace, data, where)


@dataclass(frozen=True, slots=True)
class Probe:
    """The next question: run these knobs (`{}` when there are none) with the figure's seed plus `seed`."""

    knobs: Mapping[str, float]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a trial said: the objective, and every metric that `SearchRules.bounds` names.

    NaN and inf, in the objective or in a metric, count as violated.
    """

    probe: Probe
    objective: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a search ended.

    Attributes:
        outcome: "precision reached", "no limit in range", "nothing feasible", "cliff", "limited by noise", "budget
        spent" or
            "single trial" (docs/search.md says what each means).
        knobs: the chosen setting; None when none was found feasible.
        objective: the objective of `answer`; `infeasible` when there is none.
        answer: a representative answer at the chosen setting.
        bracket: for one knob, the last setting that meets the limits and the first that does not.
        beyond: a representative answer at that first setting that does not.
        note: the numbers on both sides, as text for a log or a footer.
    """

    outcome: str
    knobs: Mapping[str, float] | None
    objective: float
    answer: Answer | None = None
    bracket: tuple[float, float] | None = None
    beyond: Answer | None = None
    note: str = ""

    @property
    def feasible(self) -> bool:
        """Whether a setting was found that meets the limits."""
        return self.knobs is not None
