"""Policies with one mode: `fcfs` (unmerged), `merge` (merged), and the baselines' `one_adapter` (sheet, 2.5)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from systems.dlora.policies import FOREVER, Plan, within_slots
from systems.dlora.requests import RequestQueue


class Stateless:
    """A policy that decides by the queue alone, and so decides alike while it stays as it is."""

    __slots__ = ()

    def repeats(self, plan: Plan, queue: RequestQueue) -> int:
        """For ever."""
        return FOREVER

    def ran(self, plan: Plan, queue: RequestQueue, steps: int) -> None:
        """Nothing to book."""


@dataclass(frozen=True, slots=True)
class Fcfs(Stateless):
    """Unmerged-only: the FCFS prefix, up to the first request of one adapter more than there are slots."""

    slots: int
    batch: int = 16

    def plan(self, queue: RequestQueue) -> Plan:
        """The oldest requests."""
        return Plan(within_slots(queue.order, self.slots, self.batch, stop=True))


@dataclass(frozen=True, slots=True)
class Merge(Stateless):
    """Merged-only: the oldest request's adapter, all of its requests first come first served."""

    batch: int = 16

    def plan(self, queue: RequestQueue) -> Plan:
        """The requests of the oldest one's adapter."""
        adapter = queue.order[0].adapter
        return Plan(queue.by_adapter[adapter][: self.batch], adapter)


@dataclass(frozen=True, slots=True)
class OneAdapter(Stateless):
    """One adapter per batch: the FCFS prefix up to the first request of another one (exec types 1 and 2).

    The `kinder` variant, which the artifact does not have, passes over requests of other adapters instead of stopping there.
    """

    batch: int = 16
    kinder: bool = False

    def plan(self, queue: RequestQueue) -> Plan:
        """Requests of the oldest one's adapter."""
        adapter = queue.order[0].adapter
        if self.kinder:
            return Plan(queue.by_adapter[adapter][: self.batch], adapter)
        return Plan(list(takewhile(lambda sequence: sequence.adapter == adapter, queue.order[: self.batch])), adapter)
