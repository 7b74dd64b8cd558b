"""Tasklets as CUDA graphs: one graph each, captured once per shape of batch, so that launching one costs a few microseconds.

A step is captured tasklet by tasklet: kernels of `next()` go into a graph of their own, and what passes between tasklets
stays where the capture put it. All graphs of a step share one memory pool and are replayed in the order of their capture, so
memory that one of them freed may serve a later one, and only a later one. Adapters and optimiser state are outside the pool
and shared by all shapes; capturing leaves them as they were.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from systems.llmstation.training import Tasklet
from systems.llmstation.training.samples import PlannedSample, quietly
from systems.llmstation.training.trainer import Batch, Trainer, TrainingSample

Replay = Callable[[], None]


class Recorder(Protocol):
    """Turns work into something that can be launched again."""

    def session(self, warm: Callable[[], None]) -> AbstractContextManager[None]:
        """Around the recordings of one step. Runs `warm` first: what must happen once (compiling, planning) happens there."""
        ...

    def record(self, work: Callable[[], object]) -> Replay:
        """Record `work`, which leaves its results where every replay will."""
        ...


class CudaRecorder:
    """CUDA graphs that share a pool, recorded on a stream that nobody else has.

    cuBLAS keeps one workspace per stream, which a graph's products go on using, and torch deals its 32 streams out again and
    again: on one of them a replay could share its workspace with another graph or stream that runs at the same time.
    """

    def __init__(self) -> None:
        handle = ctypes.c_void_p()
        torch.cuda.check_error(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle)))
        self._stream = torch.cuda.ExternalStream(handle.value)

    @contextmanager
    def session(self, warm: Callable[[], None]) -> Iterator[None]:
        """See `Recorder`."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            warm()
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what warming left cached for this stream serves no other
            self._pool = torch.cuda.graph_pool_handle()
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], object]) -> Replay:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # serving threads may go on
        try:
            work()
        finally:
            graph.capture_end()
        replay: Replay = graph.replay
        return replay


@dataclass(slots=True)
class Captured:
    """The graphs of one shape of batch; `batch` is what they read, `loss` what they leave."""

    batch: Batch
    plan: tuple[Tasklet, ...]
    replays: list[Replay]
    loss: Tensor


FUSED = Tasklet("forward", 0, "fused")
"""All forward tasklets of a step in one, beside a decode step."""


@quietly
def capture(
    recorder: Recorder, trainer: Trainer, sequences: int, length: int, first: Callable[[TrainingSample], None] | None = None
) -> Captured:
    """Record a step of `trainer`, tasklet by tasklet; its adapters, optimiser and losses end up as they were.

    Args:
        recorder: what records.
        trainer: whose step; an eager one.
        sequences: of a batch.
        length: tokens of each.
        first: does the whole forward phase of a sample, as the tasklet `FUSED`; None leaves it to the trainer.
    """
    tokens = torch.zeros(sequences, length, dtype=torch.int64, device=trainer.device)
    batch = Batch(tokens, tokens.clone())
    state, known = trainer.adapters.state(), len(trainer.losses)
    plan = trainer.plan(sequences, length)

    def warm() -> None:
        sample = trainer.steps(batch)
        if first is not None:
            first(sample)
        for _ in sample:
            pass

    with recorder.session(warm):
        sample, replays = trainer.steps(batch), []
        if first is not None:
            replays.append(recorder.record(lambda: first(sample)))
            plan = (FUSED, *(tasklet for tasklet in plan if tasklet.phase != "forward"))
        while sample.upcoming is not None:
            replays.append(recorder.record(lambda: next(sample)))
    loss = trainer.losses[-1]
    del trainer.losses[known:]
    trainer.adapters.restore(state)
    return Captured(batch, plan, replays, loss)


class GraphedTrainer:
    """A trainer whose tasklets are replayed (see `Trains`). For decode steps beside them see `fused_graphs`.

    Attributes:
        trainer: the eager trainer underneath, whose adapters and losses these are.
    """

    def __init__(self, trainer: Trainer, recorder: Recorder | None = None) -> None:
        assert recorder is not None or trainer.device.type == "cuda", "CUDA graphs need a GPU"
        self.trainer, self.losses = trainer, trainer.losses
        self._recorder = recorder or CudaRecorder()
        self._captured: dict[tuple[int, ...], Captured] = {}

    def plan(self, batch: int, length: int) -> tuple[Tasklet, ...]:
        """See `Trains`."""
        return self.trainer.plan(batch, length)

    def warm(self, batch: int, length: int) -> None:
        """Capture the tasklets for this shape, unless done: runs a step and takes it back.

        Waits for the GPU; until it returns nothing else may use the default stream.
        """
        if (batch, length) not in self._captured:
            self._captured[batch, length] = capture(self._recorder, self.trainer, batch, length)

    def steps(self, batch: Batch) -> GraphedSample:
        """See `Trains`. The first step of a shape captures it."""
        self.trainer.check(batch)
        sequences, length = batch.tokens.shape
        self.warm(sequences, length)
        return GraphedSample(self.trainer, self._captured[sequences, length], batch)


class GraphedSample(PlannedSample):
    """One step under way by replay (see `Sample`)."""

    def __init__(self, trainer: Trainer, captured: Captured, batch: Batch) -> None:
        super().__init__(captured.plan, trainer.turn)
        self.trainer, self.batch, self._captured = trainer, batch, captured

    def _run(self, tasklet: Tasklet) -> None:
        if self._at == 0:
            self._fill()
        self._captured.replays[self._at]()
        if self.remaining == 1:
            with torch.inference_mode(False):
                self.trainer.losses.append(self._captured.loss.clone())

    def _fill(self) -> None:
        """Copy the batch to where the graphs read it."""
        static, batch = self._captured.batch, self.batch
        assert static.labels is not None
        static.tokens.copy_(batch.tokens, non_blocking=True)
        static.labels.copy_(batch.tokens if batch.labels is None else batch.labels, non_blocking=True)
