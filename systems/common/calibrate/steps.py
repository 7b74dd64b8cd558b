"""Whole steps, from which the simulator takes all but attention, and what the host adds when the engine serves.

Steps with prompts are timed as they come in serving, behind decode steps. Back to back they may draw all the power that the GPU
is allowed, and its clock falls: timed so on an H200, steps bound by arithmetic took 5 to 8 % longer than the same steps in a
served workload (docs/results.md). `sustained` measures both ways, with the clocks, and writes them down.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from systems.common.calibrate.bench import Bench
from systems.common.calibrate.clock import Clock, Work
from systems.common.core import Request
from systems.common.torch_engine.mixed import Inputs, mixed_step, pack

Batch = tuple[int, int, int, int, int]
"""Decoding rows, context of each, tokens of each prompt chunk, tokens before it, prompt chunks."""
RESTED = 2.0
"""Decode steps before a step with prompts last so many times as long as it does."""
MOST_DECODES = 12
TOKEN_S, DECODE_S = 23e-6, 5e-3
"""Roughly, of a prompt's token and of a decode step, to count them by: an 8B model on an H200."""


@dataclass(frozen=True, slots=True)
class Step:
    """One whole step: `rows` decoding sequences of `context` tokens, `prompts` chunks of `chunk` behind `past`; seconds."""

    rows: int
    context: int
    chunk: int
    past: int
    took_s: float
    prompts: int = 1


def decode_steps(bench: Bench, clock: Clock, rows: Iterable[int], contexts: Sequence[int]) -> Iterator[Step]:
    """Decode steps by graph, embedding to committed tokens."""
    for count in rows:
        for context in contexts:
            if count * (context + 8) > bench.cached_tokens:
                continue
            yield Step(count, context, 0, 0, clock.call_s(*decode_work(bench, count, context)))


def decode_work(bench: Bench, rows: int, context: int) -> tuple[Work, Work]:
    """A decode step, and what makes ready for it again."""
    bench.fill(rows, context)
    return partial(bench.live.executor.steps.decode, rows), partial(bench.rewind, rows, context)


def mixed_steps(bench: Bench, clock: Clock, batches: Iterable[Batch], rested: bool = True) -> Iterator[Step]:
    """Steps with prompts, by graph where there is one; the array's copy to the device included.

    `rested`: behind decode steps.
    """
    for batch in batches:
        rows, context, chunk, past, prompts = batch
        work, before = prompts_work(bench, batch, rested)
        yield Step(rows, context, chunk, past, clock.call_s(work, before), prompts)


def _decodes(tokens: int) -> int:
    return min(MOST_DECODES, max(1, round(RESTED * (tokens * TOKEN_S + DECODE_S) / DECODE_S)))


def decode_before(bench: Bench, rows: int, rewind: Work, count: int) -> None:
    """Some decode steps of the same sequences; then everything as it was."""
    for _ in range(count if bench.device.type == "cuda" else 1):
        bench.live.executor.steps.decode(max(1, rows))
        rewind()


def prompts_work(bench: Bench, batch: Batch, rested: bool = True) -> tuple[Work, Work]:
    """A step with prompts, and what makes ready for it again; with some decode steps where it is to be `rested`."""
    rows, context, chunk, past, prompts = batch
    executor = bench.live.executor
    cache, steps = executor.cache, executor.steps
    bench.fill(rows, context, chunk, past, prompts)
    bucket, graphed = steps.bucket(rows, prompts * chunk, prompts)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, bench.shape.vocab, chunk) for _ in range(prompts)]
    slots, before = np.arange(rows, rows + prompts), np.full(prompts, past)
    host = np.array([[i * chunk, past, chunk, slot] for i, slot in enumerate(slots)], np.int32)
    packed = torch.from_numpy(
        pack(
            bucket, tokens, np.arange(rows), np.full(rows, context + 1), before, slots, np.ones(prompts, np.bool_),
            cache.pad_slot,
        )
    ).to(bench.device)  # fmt: skip

    def work() -> object:
        if graphed:
            return steps.mixed(packed, bucket)
        return mixed_step(executor.model, cache, Inputs.of(packed, bucket, host), True)

    rewind = partial(bench.rewind, rows, context, chunk, past, prompts)
    return work, partial(decode_before, bench, rows, rewind, _decodes(prompts * chunk)) if rested else rewind


def served_period_s(bench: Bench, rows: int, context: int = 512, steps: int = 48) -> float:
    """Median period of the decode steps of `rows` sequences as served, contexts around `context`, seconds."""
    executor = bench.live.executor
    first = len(executor.flights.ended_s)
    bench.live.generate([Request(i, 0.0, context - steps // 2, steps) for i in range(rows)])
    return float(np.median(np.diff(executor.flights.ended_s[first:])[-steps + 4 :]))


def host_s(bench: Bench, clock: Clock, rows: Iterable[int], context: int) -> dict[int, float]:
    """By rows, seconds by which a decode step's period as served is longer than the same step back to back; 0 at least."""
    length, found = 8 if context < 100 else 48, {}
    for count in rows:
        served_period_s(bench, count, context, length)  # once to warm
        alone = next(decode_steps(bench, clock, (count,), (context,)))
        found[count] = max(0.0, served_period_s(bench, count, context, length) - alone.took_s)
    return found


def sustained(bench: Bench, clock: Clock, batch: Batch, seconds: float = 1.2) -> dict[str, object]:
    """A step with prompts behind decode steps and back to back for `seconds`: microseconds, SM clock (MHz) and power (W)."""
    found: dict[str, object] = dict(zip(("rows", "context", "chunk", "past", "prompts"), batch, strict=True))
    for name, rested in (("behind_decode", True), ("back_to_back", False)):
        step = next(mixed_steps(bench, clock, (batch,), rested))
        found[f"{name}_us"] = round(step.took_s * 1e6, 3)
        if bench.device.type == "cuda":
            busy_s = step.took_s + (_decodes(batch[2] * batch[4]) * DECODE_S if rested else 0.0)
            found[f"{name}_mhz_watt"] = _clock_under(*prompts_work(bench, batch, rested), seconds / busy_s)
            if not rested:
                found["back_to_back_us"] = round(next(mixed_steps(bench, clock, (batch,), False)).took_s * 1e6, 3)
    return found


@torch.inference_mode()
def _clock_under(work: Callable[[], object], before: Work, times: float) -> str:
    """The SM clock and power that nvidia-smi tells while the GPU does `work` so many times."""
    for _ in range(max(1, int(times))):
        before()
        work()
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-i", "0"]
    told = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    torch.cuda.synchronize()
    return told
