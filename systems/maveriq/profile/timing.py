"""Whole requests of one engine, timed: through the engine as served, or with decode steps launched without it.

Through the engine a decode step of a one-layer model is bound by Python: its depth's share would vanish. So the same request
is also timed with its prompt through the engine and its decode steps (CUDA graphs) launched back to back. At full depth both
should agree.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.models import model
from systems.common.torch_engine.device import NONE
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.parallel.executor import ParallelExecutor, start
from systems.common.torch_engine.placement import layout
from systems.common.torch_engine.weights import random_weights
from systems.maveriq.profile.jobs import Job

SPARE_TOKENS = 16
"""Room in the KV cache behind the last token."""
STEP_TOKENS = 8192
"""Most prompt tokens of one step."""
WARM_S = 0.3
"""Least seconds of warm-up before timed requests on a GPU: an idle one may clock down, and one request of a layer takes 5 ms.
Two H200 runs without it (docs/results.md, 2026-11-21) differed by up to a quarter at one layer, by 1 % at full depth."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One way of timing. `host_share`: of that time, the share in which the host did not wait for the GPU; None on a CPU."""

    latency_s: float
    low_s: float
    high_s: float
    host_share: float | None


@contextlib.contextmanager
def engine(job: Job) -> Iterator[Live]:
    """The engine of `job` over random weights, on one rank or several. Raises InputError where it can't be built."""
    shape = replace(model(job.model).with_dtype(job.compute), layers=job.layers)  # the name stays: its numerics are looked up
    longest = job.prompt_tokens + max(job.output_lengths) + SPARE_TOKENS
    tokens = min(STEP_TOKENS, -(-job.batch * job.prompt_tokens // 128) * 128)
    config = EngineConfig(
        job.batch * -(-longest // 16) + 1,
        max_num_batched_tokens=max(tokens, 128, job.batch),
        max_num_seqs=job.batch,
        kv_dtype="int8" if job.int8_kv else "auto",
    )
    dtype = None if job.weights == "float16" else job.weights
    if job.gpus == 1:
        weights = random_weights(shape, 0, job.device, dtype=dtype)
        if job.device == "cuda":
            torch.cuda.empty_cache()  # what making them left, of which the cache would take a depth's part and hide it
        yield Live.build(shape, weights, config, max_tokens=longest)
        return
    split = layout(shape, job.tp, pp_map=job.pp_map)
    with start(shape, split, config, dtype=dtype, device=job.device, max_tokens=longest) as executor:
        live = Live(Engine(config, executor), executor)
        executor.attach(live.engine)
        yield live


class Asker:
    """Asks a built engine for whole requests."""

    def __init__(self, live: Live, job: Job) -> None:
        self.live, self.job = live, job
        prompt = np.random.default_rng(0).integers(0, live.executor.shape.vocab, job.prompt_tokens)
        live.executor.prompt = lambda _: prompt
        self._numbers = itertools.count()

    def served(self, length: int) -> tuple[float, float | None]:
        """Seconds of `batch` requests for `length` tokens through the engine, and the host's share."""
        flights = self.live.executor.flights
        first = len(flights.waited_s)
        self._wait()
        began = time.perf_counter()
        self.live.generate(self._requests(length))
        took_s = time.perf_counter() - began
        share = max(0.0, 1 - sum(flights.waited_s[first:]) / took_s) if self._on_gpu else None
        return took_s, share

    def launched(self, length: int) -> tuple[float, float | None]:
        """The same with decode steps launched one after the other; the host's share is that of the decode steps."""
        self._wait()
        with self._guard(), torch.inference_mode():
            began = time.perf_counter()
            sequences = [self.live.submit(request) for request in self._requests(length + 1)]
            while any(sequence.finish_clock < 0 for sequence in sequences):
                self.live.engine.step(0.0)
            self.live.executor.drain()
            self._wait()
            prompt_s = time.perf_counter() - began
            self._settle_rows(length)
            self._wait()
            began = time.perf_counter()
            for _ in range(length - 1):
                self.live.executor.half.decode(self.job.batch, True, False)
            launched_s = time.perf_counter() - began
            self._wait()
            steps_s = time.perf_counter() - began
            for sequence in sequences:
                self.live.engine.abort(sequence)
        return prompt_s + steps_s, (launched_s / steps_s if self._on_gpu and length > 1 else None)

    def median(self, ask: Callable[[int], tuple[float, float | None]], length: int, counts: bool) -> Timed:
        """Median and quartiles of the job's repeats after its warm-ups; of a quarter as many where it is not what counts."""
        warm_until = time.perf_counter() + (WARM_S if counts and self._on_gpu else 0)
        for i in itertools.count():
            if i >= (self.job.warmups if counts else min(1, self.job.warmups)) and time.perf_counter() >= warm_until:
                break
            ask(length)
        runs = [ask(length) for _ in range(self.job.repeats if counts else -(-self.job.repeats // 4))]
        times, shares = [took_s for took_s, _ in runs], [share for _, share in runs if share is not None]
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        return Timed(middle, low, high, statistics.median(shares) if shares else None)

    def _requests(self, length: int) -> list[Request]:
        return [Request(next(self._numbers), 0.0, self.job.prompt_tokens, length) for _ in range(self.job.batch)]

    def _settle_rows(self, length: int) -> None:
        """Give the decoding rows their slots, and blocks for all tokens to come, so that steps need nothing but a launch."""
        executor = self.live.executor
        tables, half = executor.tables, executor.half
        slots: NDArray[np.int64] = np.flatnonzero(tables.held[:-1]).astype(np.int64)
        for slot in slots.tolist():
            tables.grow(slot, self.job.prompt_tokens + length + SPARE_TOKENS)  # some have decoded beside others' prompts
        used = int(tables.held[slots].max())
        half.tables(slots, tables.tables[slots, :used].astype(np.int64).ravel(), NONE)
        padded = np.full(len(executor.steps.slots), executor.cache.pad_slot, np.int64)
        padded[: len(slots)] = slots
        half.rows(padded, NONE)

    @property
    def _on_gpu(self) -> bool:
        return self.job.device == "cuda"

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _guard(self) -> AbstractContextManager[None]:
        executor = self.live.executor
        return executor.cluster.guard() if isinstance(executor, ParallelExecutor) else contextlib.nullcontext()
