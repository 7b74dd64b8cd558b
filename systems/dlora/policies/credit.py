"""dLoRA's credit-based batching with thresholds that tune themselves (sheet, 2.6; the paper's Algorithm 2).

A batch that leaves the FCFS order takes turns from others: for every request of the FCFS batch that it displaces, the adapter
that displaced it pays credit and the displaced request's adapter receives it. So credits sum to a constant. An adapter
without credit is no longer merged for; one that has been displaced for long (credit at least `scale` above the start) is served
first, unmerged, until half of that is worked off.

A replica merges adapter m when n_m >= alpha |F| and stays merged while n_m >= beta |F|, F being the FCFS batch. Both thresholds
move by additive and multiplicative steps whenever the mode changes, by comparing the work that each mode did or would have done
per second: merging that paid off makes merging easier.

Credits are whole numbers of `1 / UNIT` credits, so that they are conserved exactly and many iterations can be booked at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain

from systems.common.errors import InputError
from systems.dlora.policies import FOREVER, Plan, within_slots
from systems.dlora.requests import LoraSequence, RequestQueue

UNIT = 10**9


@dataclass(frozen=True, slots=True)
class CreditRules:
    """Constants of the algorithm; defaults are the artifact's for Llama-2-7B.

    Attributes:
        merged_s, unmerged_s: time of an iteration in either mode (t_m, t_u), seconds.
        switch_s: time of one change of mode (c_sw), seconds.
        scale: credit that an adapter must gain to be served first; the artifact's 1e4 takes minutes to reach.
        additive, multiplicative: steps of the thresholds.
    """

    merged_s: float = 0.015
    unmerged_s: float = 0.027
    switch_s: float = 0.020
    scale: float = 1e4
    additive: float = 0.05
    multiplicative: float = 1.1

    def __post_init__(self) -> None:
        """Raises InputError for a constant that is not above 0."""
        for key in ("merged_s", "unmerged_s", "switch_s", "scale", "additive"):
            if not getattr(self, key) > (-1 if key == "switch_s" else 0):
                raise InputError("dlora", key, getattr(self, key), "give a number above 0")
        if not self.multiplicative > 1:
            raise InputError("dlora", "multiplicative", self.multiplicative, "give a factor above 1")

    @property
    def speed_ratio(self) -> float:
        """Rho: t_m / t_u, at most 1."""
        return min(1.0, self.merged_s / self.unmerged_s)


@dataclass(frozen=True, slots=True)
class CreditPlan(Plan):
    """A plan with what it costs whom.

    Attributes:
        transfers: credit that each adapter receives per iteration, in units; they sum to 0.
        prioritised: adapters whose turn is overdue.
        target: the adapter that would be merged for (m*), or None in the branch that serves overdue adapters.
        merged_work, unmerged_work: requests that either mode would run in this iteration.
    """

    transfers: tuple[tuple[int, int], ...] = ()
    prioritised: frozenset[int] = frozenset()
    target: int | None = None
    merged_work: int = 0
    unmerged_work: int = 0


class Credit:
    """The policy of one replica.

    Attributes:
        credits: per adapter, in units.
        alpha: merge from n >= alpha |F| on. `beta`: stay merged from n >= beta |F| on.
        merged: the adapter that is merged now, or None.
    """

    def __init__(self, adapters: int, slots: int, batch: int = 16, rules: CreditRules | None = None) -> None:
        """`adapters` of the whole system; at most `slots` of them in one unmerged batch of at most `batch` requests."""
        self.rules = rules if rules is not None else CreditRules()
        self.slots, self.batch = slots, batch
        scale = round(self.rules.scale * UNIT)
        self._start = scale * (adapters - 1)
        self._right, self._left = scale * adapters, scale * adapters - scale // 2
        self._mixed_unit = UNIT // batch
        self._merged_unit = round(UNIT / (self.rules.speed_ratio * batch))
        self.credits: dict[int, int] = {}
        self.alpha, self.beta = 1.0, self.rules.speed_ratio
        self.merged: int | None = None
        self._prioritised: frozenset[int] = frozenset()
        self._iterations = 0
        self._merged_work = self._unmerged_work = 0
        self._virtual_switches = 0
        self._last_target: int | None = None

    def credit(self, adapter: int) -> int:
        """Credit of `adapter`, in units."""
        return self.credits.get(adapter, self._start)

    def plan(self, queue: RequestQueue) -> CreditPlan:
        """The next iteration."""
        fcfs = within_slots(queue.order[: self.batch], self.slots, self.batch)
        prioritised = self._overdue()
        overdue = [adapter for adapter in prioritised if adapter in queue.by_adapter] if prioritised else []
        if overdue:
            overdue.sort(key=lambda adapter: (-self.credit(adapter), adapter))
            first = chain.from_iterable(queue.by_adapter[adapter][: self.batch] for adapter in overdue)
            chosen = within_slots(list(dict.fromkeys(chain(first, fcfs))), self.slots, self.batch)
            return CreditPlan(chosen, None, self._swapped(fcfs, chosen), prioritised)
        return self._by_mode(queue, fcfs, prioritised)

    def _by_mode(self, queue: RequestQueue, fcfs: list[LoraSequence], prioritised: frozenset[int]) -> CreditPlan:
        credits, start = self.credits, self._start
        counts = {m: count for m, count in queue.outstanding.items() if credits.get(m, start) >= 0}
        now, size = self.merged, len(fcfs)
        target = max(counts, key=counts.__getitem__) if counts else None
        most = counts[target] if target is not None else 0
        into = None
        if now is not None and now in counts and counts[now] >= self.beta * size:
            into = now
        elif target is not None and most >= self.alpha * size:
            into = target
        work = min(most if into is None else counts[into], self.batch), size
        if into is None:
            return CreditPlan(fcfs, None, (), prioritised, target, *work)
        chosen = queue.by_adapter[into][: self.batch]
        return CreditPlan(chosen, into, self._displaced(fcfs, chosen, into), prioritised, target, *work)

    def _overdue(self) -> frozenset[int]:
        left, right, last = self._left, self._right, self._prioritised
        if not self.credits or max(self.credits.values()) < left:
            return frozenset()
        return frozenset(m for m, credit in self.credits.items() if credit >= right or (m in last and credit >= left))

    def _displaced(self, fcfs: list[LoraSequence], chosen: list[LoraSequence], payer: int) -> tuple[tuple[int, int], ...]:
        """Everybody whom the merged adapter displaces is paid by it; half where the batches differ in size."""
        others = [sequence.adapter for sequence in fcfs if sequence.adapter != payer]
        if not others:
            return ()
        displaced = Counter(others)
        unit = self._merged_unit if len(chosen) == len(fcfs) else self._merged_unit // 2
        paid = len(others) * unit
        return ((payer, -paid), *((adapter, count * unit) for adapter, count in displaced.items()))

    def _swapped(self, fcfs: list[LoraSequence], chosen: list[LoraSequence]) -> tuple[tuple[int, int], ...]:
        """Each displaced request of the FCFS batch is paid by the one that took its place."""
        inside, before = set(chosen), set(fcfs)
        pairs = zip([s for s in fcfs if s not in inside], [s for s in chosen if s not in before], strict=False)
        gains: Counter[int] = Counter()
        for displaced, displacer in pairs:
            gains[displaced.adapter] += self._mixed_unit
            gains[displacer.adapter] -= self._mixed_unit
        return tuple((adapter, gain) for adapter, gain in gains.items() if gain)

    def repeats(self, plan: Plan, queue: RequestQueue) -> int:
        """Until a credit crosses a threshold; once, where the mode changes."""
        assert isinstance(plan, CreditPlan)
        if plan.merged != self.merged or plan.prioritised != self._prioritised or len(plan.prioritised) > 1:
            return 1
        steps = FOREVER
        for adapter, gain in plan.transfers:
            credit = self.credit(adapter)
            overdue = adapter in plan.prioritised
            if gain < 0:  # until it falls below a floor
                for floor in (0, self._left) if overdue else (0,):
                    if credit >= floor:
                        steps = min(steps, (credit - floor) // -gain + 1)
            else:  # until it reaches a mark
                for mark in (0,) if overdue else (0, self._right):
                    if credit < mark:
                        steps = min(steps, -((credit - mark) // gain))
        return max(1, steps)

    def ran(self, plan: Plan, queue: RequestQueue, steps: int) -> None:
        """Book the transfers, the work of both modes, and a change of mode."""
        assert isinstance(plan, CreditPlan)
        changed = plan.merged != self.merged
        if changed:
            self._tune(leaving_merged=self.merged is not None)
        for adapter, gain in plan.transfers:
            self.credits[adapter] = self.credit(adapter) + gain * steps
        self._prioritised = plan.prioritised
        if plan.merged is None and plan.target is not None and plan.target != self._last_target:
            self._virtual_switches += 1
        if plan.target is not None:
            self._last_target = plan.target
        self._merged_work += plan.merged_work * steps
        self._unmerged_work += plan.unmerged_work * steps
        self._iterations = steps if changed else self._iterations + steps
        self.merged = plan.merged

    def _tune(self, leaving_merged: bool) -> None:
        """Compare what both modes did, or would have done, since the last change, and move one threshold."""
        rules, steps = self.rules, self._iterations
        virtual = rules.switch_s * (1 if leaving_merged else self._virtual_switches)
        merged_s = rules.merged_s * steps + virtual
        unmerged_s = rules.unmerged_s * steps + (0.0 if leaving_merged else rules.switch_s)
        if steps:
            gain_m, gain_u = self._merged_work / merged_s, self._unmerged_work / unmerged_s
            step, factor = rules.additive, rules.multiplicative
            if leaving_merged:
                if gain_m > gain_u and self.alpha - step > self.beta:
                    self.alpha -= step
                elif gain_m < gain_u:
                    self.alpha *= factor
            elif gain_u > gain_m and self.beta + step < self.alpha:
                self.beta += step
            elif gain_u < gain_m:
                self.beta /= factor
        self._merged_work = self._unmerged_work = 0
        self._virtual_switches = 0
