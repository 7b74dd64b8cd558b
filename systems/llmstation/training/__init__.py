"""LoRA tuning for real, on the weights that serve, suspendable between tasklets (paper section 4; sheet 2.3-2.6).

A training step (one batch: forward, loss, backward, optimiser) is an iterator of tasklets. `next()` puts one tasklet's
kernels on the current stream, waits for nothing, and returns; between two calls serving may do what it likes. How a driver
uses it:

    trainer = Trainer(shape, weights)                     # the engine's own `Weights`, never a copy
    sample = trainer.steps(Batch(tokens, labels))         # nothing has run yet
    ahead = RunAhead(2, weights.embedding.device)
    for tasklet in sample:                                # or next(sample) whenever there is room
        ahead.launched()
        ahead.admit()                                     # waits until fewer than 2 tasklets are unfinished
    loss = float(trainer.losses[-1])                      # the only host synchronisation, made by whoever reads it

Contents (this file imports no torch; the others do):

* here: `Tasklet`, and the protocols `Sample` and `Trains` that every trainer keeps.
* `trainer`: `Trainer`, `Batch`. `graphs`: `GraphedTrainer`, the same tasklets as CUDA graphs. `chunked`: the two chunked
  baselines.
* `fused`: one decode step with forward tasklets of a sample batched into its layers; `fused_graphs`: with all of them, as a
  graph.
* `run_ahead`: `RunAhead`. Below them `blocks` (a layer forward and backward), `adapters`, `attention`, `ops` and `kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from systems.llmstation.training.trainer import Batch

__all__ = ["Sample", "Tasklet", "Trains"]


@dataclass(frozen=True, slots=True)
class Tasklet:
    """A piece of a training step that is launched as a whole.

    Attributes:
        phase: `forward`, `loss`, `backward` or `step`.
        layer: decoder layer; of a `loss` tasklet its place among them; 0 of a `step`.
        part: `layer`, or `attention` or `mlp` where segments are finer; `head` for the loss, `adamw` for the step.
        chunk: chunk of the sequence (precise chunked training only).
    """

    phase: str
    layer: int
    part: str
    chunk: int = 0


class Sample(Protocol):
    """One training step under way: an iterator over its tasklets that runs one at every `next()`."""

    @property
    def upcoming(self) -> Tasklet | None:
        """What the next `next()` will run; None when all is done."""
        ...

    @property
    def remaining(self) -> int:
        """Tasklets left."""
        ...

    def __iter__(self) -> Iterator[Tasklet]: ...

    def __next__(self) -> Tasklet: ...


class Trains(Protocol):
    """A trainer: makes samples. One sample may be under way at a time; begin the next when it is exhausted.

    Attributes:
        losses: mean next-token cross entropy of each finished step, in nats: scalars on the device, oldest first.
    """

    losses: list[Tensor]

    def plan(self, batch: int, length: int) -> tuple[Tasklet, ...]:
        """The tasklets of a step over `batch` sequences of `length` tokens, in order."""
        ...

    def steps(self, batch: Batch) -> Sample:
        """A new step; runs nothing yet. Abandoning it leaves adapters and optimiser as they were before it."""
        ...
