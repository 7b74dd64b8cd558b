"""Batching policies: which requests run in the next iteration, and in which mode. Pure: they see a queue, read no clock.

| name | module | mode |
| --- | --- | --- |
| `fcfs` | `static` | unmerged only |
| `merge` | `static` | merged only |
| `one_adapter` | `static` | the FCFS prefix of one adapter: what the baselines vLLM and PEFT can do |
| `credit` | `credit` | dLoRA's: changes between both |

Not a `BatchingPolicy` of the common engine: that one takes all decoding sequences or none, while here an iteration chooses
among them, pauses the others, and also chooses a mode. `Policy.plan` decides, `Policy.ran` books, `Policy.repeats` says how
often the same decision would be taken again, which lets a driver advance many iterations at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from systems.dlora.requests import LoraSequence, RequestQueue

FOREVER = 1 << 40


@dataclass(frozen=True, slots=True)
class Plan:
    """What one iteration should run.

    Attributes:
        order: requests in order of preference; the first that fit run.
        merged: the adapter that is merged, or None for an unmerged batch.
    """

    order: Sequence[LoraSequence]
    merged: int | None = None


class Policy(Protocol):
    """Who runs next. A policy belongs to one replica."""

    def plan(self, queue: RequestQueue) -> Plan:
        """The next iteration; nothing changes. The queue is not empty."""
        ...

    def repeats(self, plan: Plan, queue: RequestQueue) -> int:
        """Iterations, at least 1, for which `plan` (just given) would be given again while the queue stays as it is."""
        ...

    def ran(self, plan: Plan, queue: RequestQueue, steps: int) -> None:
        """`plan` ran for `steps` iterations on this queue, at most `repeats` of them."""
        ...


def within_slots(order: Sequence[LoraSequence], slots: int, most: int, stop: bool = False) -> list[LoraSequence]:
    """The first `most` requests of at most `slots` distinct adapters; with `stop`, up to the first one more."""
    head = order[:most]
    if len(head) <= slots or len({sequence.adapter for sequence in head}) <= slots:  # mostly
        return list(head)
    adapters: set[int] = set()
    chosen: list[LoraSequence] = []
    for sequence in order:
        if sequence.adapter not in adapters:
            if len(adapters) == slots:
                if stop:
                    break
                continue
            adapters.add(sequence.adapter)
        chosen.append(sequence)
        if len(chosen) == most:
            break
    return chosen
