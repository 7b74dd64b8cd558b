"""Fused decode steps in the driver: the whole forward phase of a sample inside one decode step (paper section 5; sheet 2.6).

A `Fuser` makes samples whose first tasklet is also a decode step of the engine. On a GPU they are CUDA graphs, one set per
decode batch of `ROWS`, since each keeps a sample's activations of its own; on a CPU they run eagerly. Layers cannot go along
one by one here: an engine's decode step is one graph, and so is the fused one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from systems.common.torch_engine.device import DeviceHalf
from systems.common.torch_engine.graphs import DecodeStep, Steps
from systems.llmstation.training import Tasklet
from systems.llmstation.training.fused import decode_with, fusable
from systems.llmstation.training.fused_graphs import FusedTrainer
from systems.llmstation.training.graphs import FUSED, Recorder
from systems.llmstation.training.samples import quietly
from systems.llmstation.training.trainer import Batch, Trainer, TrainingSample

ROWS = (16, 32, 64, 128)
"""Decode batches are padded to these when fused: two gigabytes of activations each (8B, 500 tokens)."""


class FusedSample(Protocol):
    """A `Sample` whose first tasklet also decodes; `decoded` holds from then on."""

    decoded: DecodeStep

    @property
    def upcoming(self) -> Tasklet | None:
        """See `Sample`."""
        ...

    @property
    def remaining(self) -> int:
        """See `Sample`."""
        ...

    def __iter__(self) -> Iterator[Tasklet]: ...

    def __next__(self) -> Tasklet: ...


class Fuser:
    """Fused samples of one shape over an engine's `Steps`.

    Attributes:
        seconds: by number of rows, what a fused step takes as timed when it was made, with no context to attend to.
    """

    def __init__(self, trainer: Trainer, steps: Steps, length: int, recorder: Recorder | None = None) -> None:
        self._trainer, self._steps, self._length = trainer, steps, length
        graphed = recorder is not None or trainer.device.type == "cuda"
        self._graphs = FusedTrainer(trainer, steps, recorder) if graphed else None
        self.sizes = tuple(size for size in sorted({*ROWS, steps.sizes[-1]}) if size in steps.sizes and size <= ROWS[-1])
        self.seconds: dict[int, float] = {}

    def warm(self) -> None:
        """Capture and time every size, on the current stream. Nothing may be served meanwhile."""
        batch = Batch(torch.zeros(1, self._length, dtype=torch.int64, device=self._trainer.device))
        kept = self._steps.slots.clone()
        self._steps.slots.fill_(self._steps.cache.pad_slot)
        for size in reversed(self.sizes):
            for _ in range(2):
                sample = self.steps(batch, size)
                self._settle()
                began = time.perf_counter()
                next(sample)
                self._settle()
                self.seconds[size] = time.perf_counter() - began
        self._steps.slots.copy_(kept)

    def _settle(self) -> None:
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize()

    def size(self, rows: int) -> int | None:
        """What `rows` are padded to; None for more than any."""
        return next((size for size in self.sizes if size >= rows), None)

    def steps(self, batch: Batch, rows: int) -> FusedSample:
        """A sample of `batch` that begins with a decode step of the first `rows` slots; `rows` is one of `sizes`."""
        if self._graphs is not None:
            return self._graphs.steps(batch, rows)
        return EagerFusedSample(self._trainer, self._steps, batch, rows)


class EagerFusedSample:
    """The same, kernel by kernel."""

    decoded: DecodeStep

    def __init__(self, trainer: Trainer, steps: Steps, batch: Batch, rows: int) -> None:
        self._sample: TrainingSample = trainer.steps(batch)
        self._serving, self._rows, self._first = steps, rows, True

    @property
    def upcoming(self) -> Tasklet | None:
        """See `Sample`."""
        return FUSED if self._first else self._sample.upcoming

    @property
    def remaining(self) -> int:
        """See `Sample`."""
        left = self._sample.remaining
        return left - fusable(self._sample) + 1 if self._first else left

    def __iter__(self) -> Iterator[Tasklet]:
        return self

    def __next__(self) -> Tasklet:
        if not self._first:
            return next(self._sample)
        self._first = False
        self._decode()
        return FUSED

    @quietly
    def _decode(self) -> None:
        serving = self._serving
        slots = serving.slots[: self._rows]
        newest = serving.cache.last_token[slots]
        logits = decode_with(serving.model, newest, slots, self._sample, serving.model.shape.layers)
        tokens = logits.argmax(-1)
        serving.commit(slots, tokens)
        self.decoded = DecodeStep(slots, logits, tokens)


class FusingHalf:
    """A device half whose decode steps may come from somewhere else: `fused` gives a step's tokens, or None."""

    def __init__(self, half: DeviceHalf, fused: Callable[[int], torch.Tensor | None]) -> None:
        self._half, self._fused = half, fused

    def __getattr__(self, name: str) -> object:
        return getattr(self._half, name)

    def decode(self, rows: int, greedy: bool, adapted: bool) -> torch.Tensor:
        """See `DeviceHalf`. Steps that sample or serve adapters are never fused."""
        if greedy and not adapted and (tokens := self._fused(rows)) is not None:
            return tokens
        return self._half.decode(rows, greedy, adapted)
