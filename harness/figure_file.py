"""A figure file, `figures/<system>/<figure>.yaml`: what to run, what to search, what to plot, what the paper claims.

`load_figure` reads and checks one; `FigureFile.points` expands a series of it to its points. What a key means is said
beside it here, and `workflows/schemas/figure.schema.json` (generated from this file) says it to editors.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from figures import KINDS
from harness.claims.models import Claim, check_claims
from harness.search.space import Knob, SearchRules, SearchSpace
from harness.validation import ABSENT, Model, Wrong, load, suggest
from systems.registry import SYSTEMS, InputError, Scalar

#: A plain cell of YAML; its type is kept (`1` stays whole, "1" stays text).
Cell = StrictBool | StrictInt | StrictFloat | StrictStr | None
Value = Cell | list[Cell] | dict[str, Cell]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
RESERVED = frozenset({"series", "feasible", "outcome", "probes", "trial"})


class Paper(Model):
    """Where the paper shows it."""

    figure: StrictStr
    section: StrictStr | None = None
    note: str = ""


class Smoke(Model):
    """What `scale: smoke` puts over the figure."""

    parameters: dict[Name, Value] = Field(default_factory=dict)


class Measured(Model):
    """What the `measured` backend puts over the figure: there a trial lasts as long as its workload."""

    parameters: dict[Name, Value] = Field(default_factory=dict)
    """Put over the figure's parameters; null leaves one of them out."""
    levels: dict[Name, list[Cell]] = Field(default_factory=dict)
    """Per factor, the levels that it keeps, by value; absent: all."""
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    """Instead of the search's own; and so with the next two."""
    repeats: int | None = Field(default=None, ge=1)
    budget: int | None = Field(default=None, ge=1)


class Level(Model):
    """One level of a factor; a plain value is short for `{value: ...}`."""

    value: Cell
    """The cell in table.csv, and the trial's parameter of the factor's name."""
    label: str | None = None
    """What the x axis says instead of the value."""
    set: dict[Name, Value] = Field(default_factory=dict)
    """Further parameters of the trials at this level."""


def _as_level(given: object) -> object:
    return given if isinstance(given, Mapping) else {"value": given}


class Factor(Model):
    """Something that is varied; the first factor of a figure is its x axis."""

    label: str | None = None
    levels: list[Annotated[Level, BeforeValidator(_as_level, json_schema_input_type=Cell | Level)]] = Field(min_length=1)
    smoke: list[Cell] | None = None
    """The levels that `scale: smoke` keeps, by value; absent: the first and the last."""

    @model_validator(mode="after")
    def _check(self) -> Factor:
        values = [level.value for level in self.levels]
        for place, value in enumerate(values):
            if value in values[:place]:
                raise Wrong("levels", value, "is there twice: keep one")
        for value in self.smoke or []:
            if value not in values:
                raise Wrong("smoke", value, f"use some of the levels: {', '.join(map(str, values))}")
        return self

    def levels_at(self, smoke: bool) -> list[Level]:
        """The levels at either scale, in the order of the file."""
        kept = [self.levels[0].value, self.levels[-1].value] if self.smoke is None else self.smoke
        return [level for level in self.levels if not smoke or level.value in kept]


class Series(Model):
    """One colour of the legend."""

    name: Name
    label: str
    parameters: dict[Name, Value] = Field(default_factory=dict)
    knobs: dict[Name, Knob] = Field(default_factory=dict)


class TableColumn(Model):
    """One column of a plot of kind `table`: a `column` of table.csv, or the paper's own values (`published`) of one."""

    column: str | None = None
    published: str | None = None
    label: str | None = None
    format: str | None = None
    """A Python format such as `"{:.1f}"`."""


class Plot(Model):
    """How to draw it. The keys from `cdf` on belong to some kinds only; the kinds' modules in figures/plots say more."""

    kind: str
    y: str
    y_label: str = ""
    title: str = ""
    width: Literal["column", "page"] = "column"
    height_in: float | None = Field(default=None, gt=0)
    cdf: bool = False
    x_scale: Literal["linear", "log"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"
    zero: bool = True
    columns: list[TableColumn] = Field(default_factory=list)
    limit_labels: dict[str, str] = Field(default_factory=dict)
    knob_labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of plot{suggest(kind, list(KINDS))}")
        return kind


class Published(Model):
    """A value that the paper printed, drawn hollow behind ours."""

    series: str
    at: dict[str, Cell] = Field(default_factory=dict)
    value: float
    source: str
    column: str | None = None
    """Which number of the table it is; absent: the objective."""


class RescaleRules(Model):
    """How the figure moves to other hardware (`config: hardware`); harness/rescale.py finds the two kinds of factor."""

    experiment: str
    """What is run to find the factors: serving alone."""
    parameters: dict[Name, Value] = Field(default_factory=dict)
    """Put over the figure's parameters for these runs; null leaves one of them out."""
    measured: dict[Name, Value] = Field(default_factory=dict)
    """Put over those where they are measured: to check what the simulator found, or to search."""
    rate: Name
    """The parameter of these runs that is the request rate."""
    low: float = Field(gt=0)
    """A rate, requests/s, at which every testbed is as good as unloaded."""
    high: float = Field(gt=0)
    """A rate, requests/s, at which no testbed holds the limits."""
    within: dict[str, float] = Field(min_length=1)
    """On the paper's testbed, the rate is sustained while these metrics are at most this."""
    latencies: dict[str, str] = Field(default_factory=dict)
    """The limits to rescale: each one's metric, to the metric of an unloaded run whose ratio rescales it."""
    rates: list[Name] = Field(default_factory=list)
    """The factors and parameters that are request rates and are rescaled."""

    @model_validator(mode="after")
    def _check(self) -> RescaleRules:
        if self.low >= self.high:
            raise Wrong("low", self.low, f"must be below high ({self.high:g})")
        return self


@dataclass(frozen=True, slots=True)
class Point:
    """One x of a series: the levels it stands at, and all parameters of its trials but the knobs."""

    at: Mapping[str, Scalar]
    parameters: Mapping[str, Any]


class FigureFile(Model):
    """A whole figure file."""

    title: str
    paper: Paper
    experiment: str
    """A key of `EXPERIMENTS` in systems/<system>/experiments.py."""
    testbed: str
    """The paper's own hardware, as `<gpu>x<how many>`."""
    backends: list[Literal["simulated", "measured", "recorded"]] = Field(default=["simulated"], min_length=1)
    datasets: list[str] = Field(default_factory=list)
    """Names in datasets/registry.yaml."""
    parameters: dict[Name, Value] = Field(default_factory=dict)
    smoke: Smoke = Smoke()
    measured: Measured = Measured()
    factors: dict[Name, Factor] = Field(default_factory=dict)
    search: SearchRules | None = None
    """Absent: one trial per point."""
    columns: list[str] = Field(default_factory=list)
    """Metrics that table.csv shows besides the objective."""
    series: list[Series] = Field(min_length=1)
    plot: Plot
    published: list[Published] = Field(default_factory=list)
    claims: list[Claim] = Field(default_factory=list)
    rescale: RescaleRules | None = None
    portable: bool = False
    """No rates and limits that would have to be rescaled: any hardware runs it as it is, and its claims are judged there."""
    limits_from: dict[str, Name] = Field(default_factory=dict)
    """Limits that vary over the figure: each one's metric, to the factor whose levels they are. No trial depends on it."""
    target_from: Name | None = None
    """The factor whose levels are the target of the search. No trial depends on it."""

    def on(self, backend: str) -> FigureFile:
        """The figure as `backend` runs it."""
        if backend != "measured":
            return self
        rules = self.measured
        given = {key: getattr(rules, key) for key in ("tolerance", "repeats", "budget") if getattr(rules, key) is not None}
        kept = {name: _keeping(self.factors[name], values) for name, values in rules.levels.items()}
        search = self.search.model_copy(update=given) if self.search else None
        told: dict[str, Any] = {
            "parameters": without_nulls({**self.parameters, **rules.parameters}),
            "factors": {**self.factors, **kept},
            "search": search,
        }
        told["smoke"] = Smoke(parameters=without_nulls({**self.smoke.parameters, **rules.parameters}))
        return self.model_copy(update=told)

    @property
    def objective(self) -> str:
        """The metric that the figure is about: what the search maximises, or else what the plot shows."""
        return self.search.maximise if self.search else self.plot.y

    @property
    def knobs(self) -> list[str]:
        """The names of all knobs of all series, each once."""
        return list(dict.fromkeys(name for series in self.series for name in series.knobs))

    @field_validator("testbed")
    @classmethod
    def _named_and_counted(cls, testbed: str) -> str:
        if not re.fullmatch(r"[a-z0-9_.-]+x[1-9][0-9]*", testbed):
            raise ValueError("write <gpu>x<how many>, such as rtx3090x2")
        return testbed

    @model_validator(mode="after")
    def _check(self) -> FigureFile:
        names = [series.name for series in self.series]
        _refuse_twice("series", names)
        _refuse_twice("columns", [*sorted(RESERVED), *self.factors, self.objective, *self.columns])
        if self.knobs and not self.search:
            raise Wrong("search", ABSENT, f"some series have knobs ({', '.join(self.knobs)}): add a search, or set them")
        for knob in self.knobs:
            if knob in self.factors:
                raise Wrong("series", knob, "is both a factor and a knob: keep one")
        self._check_from()
        for name, values in self.measured.levels.items():
            _check_kept(name, values, self.factors)
        for place, value in enumerate(self.published):
            self._check_published(f"published.{place}", value)
        try:
            check_claims(self.claims, names, list(self.factors))
        except ValueError as error:
            raise Wrong("claims", [claim.id for claim in self.claims], str(error)) from error
        return self

    def _check_from(self) -> None:
        named = {f"limits_from.{metric}": factor for metric, factor in self.limits_from.items()}
        for key, factor in {**named, **({"target_from": self.target_from} if self.target_from else {})}.items():
            if factor not in self.factors:
                raise Wrong(key, factor, f"no such factor{suggest(factor, list(self.factors))}")
            if not all(type(level.value) in (int, float) and level.value for level in self.factors[factor].levels):
                raise Wrong(key, factor, "its levels must be numbers above 0")
        if self.target_from and not (self.search and self.search.target):
            raise Wrong("target_from", self.target_from, "add a `target` to the search: its metric is what the levels are of")
        if self.limits_from and (not self.search or self.search.target):
            raise Wrong("limits_from", list(self.limits_from), "belongs to a search under limits")

    @property
    def judging(self) -> frozenset[str]:
        """The factors that say what is asked of a trial and not what it is."""
        return frozenset({*self.limits_from.values(), *([self.target_from] if self.target_from else [])})

    def rules_at(self, at: Mapping[str, Scalar]) -> SearchRules:
        """The search's rules where the figure's factors stand at `at`."""
        assert self.search
        limits = {**self.search.limits, **{metric: float(at[name]) for metric, name in self.limits_from.items()}}  # type: ignore[arg-type]
        target = self.search.target
        if target and self.target_from:
            target = target.model_copy(update={"value": float(at[self.target_from])})  # type: ignore[arg-type]
        return self.search.model_copy(update={"limits": limits, "target": target})

    def _check_published(self, key: str, published: Published) -> None:
        names = [series.name for series in self.series]
        if published.series not in names:
            raise Wrong(f"{key}.series", published.series, f"no such series{suggest(published.series, names)}")
        for factor, value in published.at.items():
            if factor not in self.factors:
                raise Wrong(f"{key}.at", factor, f"no such factor{suggest(factor, list(self.factors))}")
            levels = [level.value for level in self.factors[factor].levels]
            if value not in levels:
                raise Wrong(f"{key}.at.{factor}", value, f"use a level of this factor: {', '.join(map(str, levels))}")

    def series_named(self, name: str) -> Series:
        """The series `name`; raises KeyError when there is none."""
        return {series.name: series for series in self.series}[name]

    def space(self, series: str, at: Mapping[str, Scalar] | None = None) -> SearchSpace | None:
        """What the search may do for `series` (at the point `at`); None where the figure has no search."""
        if self.search is None:
            return None
        chosen = self.search if at is None else self.rules_at(at)
        rules = {name: getattr(chosen, name) for name in SearchRules.model_fields}
        return SearchSpace(**rules, knobs=self.series_named(series).knobs)

    def points(self, series: str, smoke: bool = False) -> list[Point]:
        """The points of `series`: every combination of levels, the first factor slowest."""
        chosen = self.series_named(series)
        fixed = {**self.parameters, **(self.smoke.parameters if smoke else {}), **chosen.parameters}
        levels = [factor.levels_at(smoke) for factor in self.factors.values()]
        combinations = [dict(zip(self.factors, chosen, strict=True)) for chosen in itertools.product(*levels)]
        return [_point(fixed, combination, self.judging) for combination in combinations]


def without_nulls(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`parameters` without those that are null."""
    return {name: value for name, value in parameters.items() if value is not None}


def _keeping(factor: Factor, values: Sequence[Scalar]) -> Factor:
    kept = [level for level in factor.levels if level.value in values]
    smoke = None if factor.smoke is None else [value for value in factor.smoke if value in values]
    return factor.model_copy(update={"levels": kept, "smoke": smoke or None})


def _check_kept(name: str, values: Sequence[Scalar], factors: Mapping[str, Factor]) -> None:
    if name not in factors:
        raise Wrong("measured.levels", name, f"no such factor{suggest(name, list(factors))}")
    known = [level.value for level in factors[name].levels]
    for value in values or [None]:
        if value not in known:
            raise Wrong(f"measured.levels.{name}", value, f"use some of the levels: {', '.join(map(str, known))}")


def _point(fixed: Mapping[str, Any], levels: Mapping[str, Level], judging: frozenset[str]) -> Point:
    at = {name: level.value for name, level in levels.items()}
    extra = {key: value for level in levels.values() for key, value in level.set.items()}
    return Point(at, {**fixed, **extra, **{name: value for name, value in at.items() if name not in judging}})


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise Wrong(what, name, "is there twice: keep one")


def load_figure(path: Path) -> FigureFile:
    """The figure file `path`, checked. Raises InputError for the first thing wrong with it."""
    system_of(path)
    return load(FigureFile, path)


def system_of(path: Path) -> str:
    """The system whose figure `path` is: the name of its folder. Raises InputError when there is no such system."""
    system = path.parent.name
    if system not in SYSTEMS:
        raise InputError(path, "folder", system, f"no such system{suggest(system, sorted(SYSTEMS))}")
    return system


def same_level(a: Scalar, b: Scalar) -> bool:
    """Whether two cells are the same level: equal, and numbers also when they differ in the last bits."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9)
    return a == b
