"""Requests inside a replica: `LoraSequence`, and the queue that policies look at.

The common engine's `DecodingGroup` gives every decoding sequence one token per step, so it cannot express what dLoRA does at
every iteration: choose which of the running sequences run and which pause. Hence a sequence and a queue of our own.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from enum import StrEnum

from systems.common.core import Request


class Place(StrEnum):
    """Where a request's KV cache is."""

    WAITING = "waiting"
    READY = "ready"
    SWAPPED = "swapped"


class LoraSequence:
    """One request with its progress. Mutable; belongs to one replica at a time.

    `prompt_tokens` is what a prefill has to compute: the prompt, and after a migration also what had been generated.
    """

    __slots__ = (
        "adapter", "arrival_s", "context", "executed_s", "finish_s", "first_token_s", "generated", "index", "migrations",
        "output_tokens", "place", "preemptions", "prompt_tokens", "replica", "request", "scheduled_s",
    )  # fmt: skip

    def __init__(self, request: Request, adapter: int) -> None:
        self.request = request
        self.index = request.index
        self.arrival_s = request.arrival_s
        self.adapter = adapter
        self.prompt_tokens = request.input_tokens
        self.output_tokens = request.output_tokens
        self.place = Place.WAITING
        self.context = 0
        """Tokens in the KV cache, on the GPU or swapped out."""
        self.generated = 0
        self.scheduled_s = math.nan
        self.first_token_s = math.nan
        self.finish_s = math.nan
        self.executed_s = 0.0
        """Seconds spent in executed iterations: what is left of its latency is queueing."""
        self.preemptions = 0
        self.migrations = 0
        self.replica = -1

    @property
    def remaining(self) -> int:
        """Output tokens still to come."""
        return self.output_tokens - self.generated

    def forget_cache(self) -> None:
        """Drop the KV cache: prompt and generated tokens will be prefilled again."""
        if self.place is not Place.WAITING:
            self.prompt_tokens = self.request.input_tokens + self.generated
            self.context = 0
            self.place = Place.WAITING


def _key(sequence: LoraSequence) -> tuple[float, int]:
    return sequence.arrival_s, sequence.index


class RequestQueue:
    """All unfinished requests of a replica, first come first, as a whole and by adapter.

    Attributes:
        order: every request, by arrival; equal arrivals by number.
        by_adapter: the same per adapter; adapters without requests are absent.
        outstanding: how many requests each of these adapters has. All three change with the queue: copy what is to stay.
    """

    __slots__ = ("by_adapter", "order", "outstanding")

    def __init__(self) -> None:
        self.order: list[LoraSequence] = []
        self.by_adapter: dict[int, list[LoraSequence]] = {}
        self.outstanding: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[LoraSequence]:
        return iter(self.order)

    def add(self, sequence: LoraSequence) -> None:
        """Insert in order of arrival, so that a migrated request keeps its turn."""
        for queue in (self.order, self.by_adapter.setdefault(sequence.adapter, [])):
            if not queue or _key(queue[-1]) < _key(sequence):
                queue.append(sequence)
            else:
                insort(queue, sequence, key=_key)
        self.outstanding[sequence.adapter] = self.outstanding.get(sequence.adapter, 0) + 1

    def remove(self, sequence: LoraSequence) -> None:
        """Take out a request. Raises ValueError when it is not here."""
        mine = self.by_adapter.get(sequence.adapter, [])
        for queue in (self.order, mine):
            place = bisect_left(queue, _key(sequence), key=_key)
            if place == len(queue) or queue[place] is not sequence:
                raise ValueError(f"request {sequence.index} is not in this queue")
            del queue[place]
        self.outstanding[sequence.adapter] = len(mine)
        if not mine:
            del self.by_adapter[sequence.adapter], self.outstanding[sequence.adapter]
