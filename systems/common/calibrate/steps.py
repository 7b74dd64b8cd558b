"""Whole steps, from which the simulator takes all but attention, and what the host adds when the engine serves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from systems.common.calibrate.bench import Bench
from systems.common.calibrate.clock import Clock
from systems.common.core import Request
from systems.common.torch_engine.mixed import Inputs, mixed_step, pack


@dataclass(frozen=True, slots=True)
class Step:
    """One whole step: `rows` decoding sequences of `context` tokens, a prompt chunk of `chunk` behind `past`; seconds."""

    rows: int
    context: int
    chunk: int
    past: int
    took_s: float


def decode_steps(bench: Bench, clock: Clock, rows: Iterable[int], contexts: Sequence[int]) -> list[Step]:
    """Decode steps by graph, embedding to committed tokens."""
    steps = bench.live.executor.steps
    found = []
    for count in rows:
        for context in contexts:
            if count * (context + 8) > bench.cached_tokens:
                continue
            bench.fill(count, context)
            took_s = clock.call_s(partial(steps.decode, count), partial(bench.rewind, count, context))
            found.append(Step(count, context, 0, 0, took_s))
    return found


def mixed_steps(bench: Bench, clock: Clock, batches: Iterable[tuple[int, int, int, int]]) -> list[Step]:
    """Steps of (rows, context, chunk, past), by graph where there is one; the array's copy to the device included."""
    return [Step(*batch, _mixed(bench, clock, batch)) for batch in batches]


def _mixed(bench: Bench, clock: Clock, batch: tuple[int, int, int, int]) -> float:
    rows, context, chunk, past = batch
    executor = bench.live.executor
    cache, steps = executor.cache, executor.steps
    bench.fill(rows, context, chunk, past)
    bucket, graphed = steps.bucket(rows, chunk, 1)
    prompt = np.random.default_rng(0).integers(0, bench.shape.vocab, chunk)
    slot = np.array([rows])
    host = np.array([[0, past, chunk, rows]], np.int32)
    packed = torch.from_numpy(
        pack(
            bucket, [prompt], np.arange(rows), np.full(rows, context + 1), np.array([past]), slot, np.ones(1, np.bool_),
            cache.pad_slot,
        )
    ).to(bench.device)  # fmt: skip

    def work() -> object:
        if graphed:
            return steps.mixed(packed, bucket)
        return mixed_step(executor.model, cache, Inputs.of(packed, bucket, host), True)

    return clock.call_s(work, partial(bench.rewind, rows, context, chunk, past))


def served_period_s(bench: Bench, rows: int, context: int = 512, steps: int = 48) -> float:
    """Median period of the decode steps of `rows` sequences as served, contexts around `context`, seconds."""
    executor = bench.live.executor
    first = len(executor.flights.ended_s)
    bench.live.generate([Request(i, 0.0, context - steps // 2, steps) for i in range(rows)])
    return float(np.median(np.diff(executor.flights.ended_s[first:])[-steps + 4 :]))
