"""The configuration search (2.7): from an intent and the state of the GPUs to a configuration, its map and its GPUs.

Every configuration that can run is estimated at once, placed by water filling, and those that keep SLO and accuracy compete
under the intent's cost. Where nothing keeps the SLO the fastest is taken and called best effort; where nothing fits the
answer is a `Refusal` with the reason. Pure: estimates come from an `Estimator`, the GPUs' state from the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from systems.common.errors import InputError
from systems.maveriq.configuration import (
    MOST,
    Configuration,
    Estimate,
    Estimates,
    Estimator,
    ModelFacts,
    Question,
    facts_of,
)
from systems.maveriq.intents import INTENTS
from systems.maveriq.models import Support
from systems.maveriq.placement import GpuState, NoRoom, Placement, most_free_first, place_on
from systems.maveriq.strategies import STRATEGIES, THRESHOLD, assign

OUTPUT_LENGTH = 20
"""Output tokens where none are asked for: those of all the authors' end-to-end runs (sheet, 4)."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks for. `slo_s` of 0 or less is no limit, `accuracy` of 0 no floor (percent of fp16's MMLU)."""

    model: str
    intent: str = "min_cost"
    slo_s: float = 0.0
    accuracy: float = 0.0
    fp16_only: bool = False
    batch: int = 1
    output_length: int = OUTPUT_LENGTH
    strategy: str = "llf"
    threshold: float = THRESHOLD

    def check(self) -> Wish:
        """Itself. Raises InputError for a name or a number that means nothing."""
        for key, value, known in (("intent", self.intent, tuple(INTENTS)), ("strategy", self.strategy, STRATEGIES)):
            if value not in known:
                raise InputError("request", key, value, f"use one of {', '.join(known)}")
        for key, number in (("batch", self.batch), ("output_length", self.output_length)):
            if not 1 <= number <= MOST:
                raise InputError("request", key, number, f"use a whole number from 1 to {MOST}")
        for key, limit in (("slo", self.slo_s), ("accuracy", self.accuracy), ("packing_threshold", self.threshold)):
            if not np.isfinite(limit) or (key != "slo" and limit < 0):
                raise InputError("request", key, limit, "use a finite number that is not negative")
        return self


@dataclass(frozen=True, slots=True)
class Decision:
    """How to deploy. `cost` is in the intent's unit; `candidates` and `placeable` say how many were looked at and would fit."""

    wish: Wish
    configuration: Configuration
    placement: Placement
    estimate: Estimate
    cost: float
    best_effort: bool
    candidates: int
    placeable: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing can be deployed, and why."""

    wish: Wish
    reason: str
    candidates: int = 0


@dataclass(frozen=True, slots=True)
class _Table:
    """All configurations of one model on up to some number of GPUs, with their estimates, as arrays."""

    configurations: tuple[Configuration, ...]
    estimates: Estimates
    gpus: np.ndarray


@dataclass(frozen=True)
class Search:
    """Answers wishes for the models of one estimator. Estimates are kept, so that later decisions only place.

    `facts` and `support` say what is known of each model: depth, width, what can't run, accuracy.
    """

    estimator: Estimator
    facts: Mapping[str, ModelFacts]
    support: Support
    _tables: dict[tuple[str, int, int, int], _Table] = field(default_factory=dict, repr=False)

    def configurations(self, model: str, gpus: int) -> tuple[Configuration, ...]:
        """Every configuration of `model` on at most `gpus` GPUs that can run, by TP, PP and precision.

        Raises InputError for a model that has no facts or no fingerprints.
        """
        precisions = self.estimator.precisions(model)
        facts = facts_of(model, self.facts)
        if facts.tensor_parallel and not facts.hidden:
            mend = "the degrees of tensor parallelism divide it: give it in a file for --models, or tensor_parallel: false"
            raise InputError("models", f"{model}.hidden", facts.hidden, mend)
        found = (
            Configuration(tp, pp, dtype, int8_kv)
            for tp in degrees(facts, gpus)
            for pp in range(1, min(gpus // tp, facts.layers) + 1)
            for dtype, int8_kv in precisions
        )
        return tuple(one for one in found if self.support.reason(model, one) is None)

    def decide(self, wish: Wish, gpus: Sequence[GpuState]) -> Decision | Refusal:
        """The best configuration for `wish` on `gpus`, or why there is none.

        Raises InputError for a wish that means nothing: unknown model, intent or strategy, an accuracy floor for a model
        without an accuracy table.
        """
        wish.check()
        table = self._table(wish, len(gpus))
        if not table.configurations:
            return Refusal(wish, f"no configuration of {wish.model} can run on {len(gpus)} GPUs")
        allowed = self._allowed(wish, table)
        if not allowed.any():
            return Refusal(wish, self._nothing_allowed(wish), len(allowed))
        placements = self._placements(wish, table, allowed, gpus)
        placed = [place for place, found in enumerate(placements) if isinstance(found, Placement)]
        if not placed:
            return Refusal(wish, f"out of memory: {_closest(table, placements)}", len(allowed))
        return self._best(wish, table, placements, np.array(placed), int(allowed.sum()))

    def _table(self, wish: Wish, gpus: int) -> _Table:
        key = (wish.model, gpus, wish.batch, wish.output_length)
        if key not in self._tables:
            configurations = self.configurations(wish.model, gpus)
            asked = [Question(wish.model, one, wish.batch, wish.output_length) for one in configurations]
            self._tables[key] = _Table(
                configurations, self.estimator.estimate_many(asked), np.array([float(one.gpus) for one in configurations])
            )
        return self._tables[key]

    def _allowed(self, wish: Wish, table: _Table) -> np.ndarray:
        """Which configurations keep the accuracy floor and the fp16 flag and have estimates that mean something."""
        latency, memory = table.estimates.latency_s, table.estimates.memory_gib
        allowed = (latency > 0) & (memory > 0) & np.isfinite(latency) & np.isfinite(memory)
        if wish.fp16_only:
            allowed &= np.array([one.dtype == "float16" for one in table.configurations])
        if wish.accuracy > 0:
            accuracy = self.support.accuracy_of(wish.model)
            # a precision without a number promises nothing, so it can't keep a floor
            allowed &= np.array([accuracy.get(one.precision, 0.0) >= wish.accuracy for one in table.configurations])
        return np.asarray(allowed)

    def _nothing_allowed(self, wish: Wish) -> str:
        asked = [f"accuracy of at least {wish.accuracy:g} %"] if wish.accuracy > 0 else []
        asked += ["float16 only"] if wish.fp16_only else []
        return f"no configuration of {wish.model} keeps: {', '.join(asked) or 'a positive estimate'}"

    def _placements(
        self, wish: Wish, table: _Table, allowed: np.ndarray, gpus: Sequence[GpuState]
    ) -> list[Placement | NoRoom | None]:
        layers = self.facts[wish.model].layers
        order = most_free_first(gpus)
        memory = table.estimates.memory_gib.tolist()
        return [
            place_on(layers, memory[place] / (one.tp * layers), one.tp, one.pp, order) if allowed[place] else None
            for place, one in enumerate(table.configurations)
        ]

    def _best(
        self, wish: Wish, table: _Table, placements: Sequence[Placement | NoRoom | None], placed: np.ndarray, candidates: int
    ) -> Decision | Refusal:
        latency = table.estimates.latency_s[placed]
        memory = table.estimates.memory_gib[placed]
        cost = INTENTS[wish.intent](latency, memory, table.gpus[placed])
        keeps = latency < wish.slo_s if wish.slo_s > 0 else np.ones(len(placed), bool)
        best_effort = not bool(keeps.any())
        at = int(np.argmin(latency if best_effort else np.where(keeps, cost, np.inf)))
        return self._decision(wish, table, int(placed[at]), placements, float(cost[at]), best_effort, candidates, len(placed))

    def _decision(
        self, wish: Wish, table: _Table, chosen: int, placements: Sequence[Placement | NoRoom | None],
        cost: float, best_effort: bool, candidates: int, placeable: int,
    ) -> Decision:  # fmt: skip
        placement = placements[chosen]
        assert isinstance(placement, Placement)
        return Decision(
            wish, table.configurations[chosen], placement, table.estimates[chosen], cost, best_effort, candidates, placeable
        )

    def deploy(self, wish: Wish, gpus: Sequence[GpuState]) -> Decision | Refusal:
        """`decide`, and then the GPUs that the wish's load strategy picks (2.9)."""
        decision = self.decide(wish, gpus)
        if isinstance(decision, Refusal):
            return decision
        placed = assign(wish.strategy, decision.placement, gpus, wish.threshold)
        if isinstance(placed, NoRoom):
            return Refusal(wish, placed.reason, decision.candidates)
        return Decision(
            wish, decision.configuration, placed, decision.estimate, decision.cost,
            decision.best_effort, decision.candidates, decision.placeable,
        )  # fmt: skip


@lru_cache(maxsize=256)
def degrees(facts: ModelFacts, gpus: int) -> tuple[int, ...]:
    """Tensor-parallel degrees to try: divisors of the hidden size up to `gpus`; 1 where the model can't be split."""
    if not facts.tensor_parallel:
        return (1,)
    return tuple(tp for tp in range(1, gpus + 1) if facts.hidden % tp == 0)


def _closest(table: _Table, placements: Sequence[Placement | NoRoom | None]) -> str:
    """Why the configuration that needs least memory does not fit: what stands for all of them."""
    refused = [place for place, found in enumerate(placements) if isinstance(found, NoRoom)]
    least = min(refused, key=lambda place: table.estimates.memory_gib[place])
    one, found = table.configurations[least], placements[least]
    assert isinstance(found, NoRoom)
    kv = ", int8 KV" if one.int8_kv else ""
    need = table.estimates.memory_gib[least]
    word = f"TP {one.tp}, PP {one.pp}, {one.dtype}{kv}, {need:.2f} GiB"
    return f"the smallest of {len(refused)} configurations ({word}): {found.reason}"
