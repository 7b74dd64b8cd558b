"""Tuning in chunks of a sequence: the baselines that make tuning preemptible without a suspendable backward pass (sheet 3).

* `ChunkedTrainer`, precise (FlexLLM's way, Figure 4): chunks forward in order over growing keys and values, then backward in
  reverse, gradients of earlier keys gathered on the way. Gradients equal the whole sequence's; every weight is read twice per
  chunk.
* `lossy` (Figures 8, 9, 10, 13): each chunk is a sequence of its own, without attention across chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.numerics import Numerics
from systems.common.torch_engine.weights import Weights
from systems.llmstation.training import Tasklet
from systems.llmstation.training.blocks import Kept, PastKeys, Span, Stream
from systems.llmstation.training.samples import EagerSample
from systems.llmstation.training.trainer import DEFAULTS, PARTS, Batch, Options, Trainer, targets


class ChunkedTrainer(Trainer):
    """Precise chunked training, `chunk` tokens of every sequence at a time; so the loss goes, whatever `loss_tokens` says."""

    def __init__(
        self, shape: ModelShape, weights: Weights, chunk: int, options: Options = DEFAULTS, given: Numerics | None = None
    ) -> None:  # fmt: skip
        if chunk < 1:
            raise InputError("training", "chunk", chunk, "use at least 1 token")
        super().__init__(shape, weights, options, given)
        self.chunk = chunk

    def spans(self, batch: int, length: int) -> list[Span]:
        """The chunks, in order."""
        return [Span(batch, min(self.chunk, length - start), start) for start in range(0, length, self.chunk)]

    def plan(self, batch: int, length: int) -> tuple[Tasklet, ...]:
        """See `Trains`."""
        layers, parts = range(self.shape.layers), self.options.parts
        plan = []
        chunks = range(len(self.spans(batch, length)))
        for chunk in chunks:
            plan += [Tasklet("forward", layer, part, chunk) for layer in layers for part in parts]
        for chunk in reversed(chunks):
            plan.append(Tasklet("loss", 0, "head", chunk))
            plan += [Tasklet("backward", layer, part, chunk) for layer in reversed(layers) for part in reversed(parts)]
        return (*plan, Tasklet("step", 0, "adamw"))

    def steps(self, batch: Batch) -> ChunkedSample:  # type: ignore[override]  # another kind of sample, same protocol
        """See `Trains`."""
        self.check(batch)
        return ChunkedSample(self, batch)


@dataclass(slots=True)
class _Chunk:
    """One chunk's state: its span, stream, kept activations, gradient."""

    span: Span
    stream: Stream
    kept: dict[tuple[int, str], Kept]
    grad: Tensor | None = None


class ChunkedSample(EagerSample):
    """One step of a `ChunkedTrainer` under way (see `Sample`)."""

    def __init__(self, trainer: ChunkedTrainer, batch: Batch) -> None:
        super().__init__(trainer.plan(*batch.tokens.shape), trainer.turn)
        self.trainer, self.batch = trainer, batch
        self._spans = trainer.spans(*batch.tokens.shape)
        self._chunks: list[_Chunk] = []
        self._past: list[PastKeys] = []

    def _begin(self) -> None:
        """Room for keys, values and their gradients of the whole sequences, and what the loss needs."""
        shape, tokens = self.trainer.shape, self.batch.tokens
        size = (shape.layers, len(tokens), shape.kv_heads, tokens.shape[1], shape.head_dim)
        keys, values = (
            torch.empty(size, dtype=self.trainer.blocks.weights.embedding.dtype, device=tokens.device) for _ in "kv"
        )
        grads = [torch.zeros(size, dtype=torch.float32, device=tokens.device) for _ in "kv"]
        self._past = [PastKeys(*four) for four in zip(keys, values, *grads, strict=True)]
        self._target, self._weight = (x.view(tokens.shape) for x in targets(self.batch))
        self._losses = torch.zeros_like(self._weight)

    def _forward(self, tasklet: Tasklet) -> None:
        blocks = self.trainer.blocks
        if not self._past:
            self._begin()
        if len(self._chunks) == tasklet.chunk:
            span = self._spans[tasklet.chunk]
            tokens = self.batch.tokens[:, span.start : span.start + span.length]
            self._chunks.append(_Chunk(span, blocks.embed(tokens), {}))
        chunk, past = self._chunks[-1], self._past[tasklet.layer]
        for part in PARTS[tasklet.part]:
            found = blocks.forward(tasklet.layer, part, chunk.stream, chunk.span, past)
            chunk.stream, chunk.kept[tasklet.layer, part] = found

    def _loss(self, tasklet: Tasklet) -> None:
        chunk = self._chunks[tasklet.chunk]
        own = slice(chunk.span.start, chunk.span.start + chunk.span.length)
        losses = torch.empty_like(self._weight[:, own].flatten())
        chunk.grad = torch.empty_like(chunk.stream.x)
        target, weight = self._target[:, own].flatten(), self._weight[:, own].flatten()
        self.trainer.blocks.loss(chunk.stream, slice(0, len(losses)), target, weight, losses, chunk.grad)
        self._losses[:, own] = losses.view(len(self.batch.tokens), -1)

    def _backward(self, tasklet: Tasklet) -> None:
        chunk, past = self._chunks[tasklet.chunk], self._past[tasklet.layer]
        assert chunk.grad is not None
        first = tasklet.chunk == len(self._spans) - 1
        for part in reversed(PARTS[tasklet.part]):
            kept = chunk.kept.pop((tasklet.layer, part))
            chunk.grad = self.trainer.blocks.backward(tasklet.layer, part, chunk.grad, kept, chunk.span, past, add=not first)

    def _step(self, tasklet: Tasklet) -> None:
        self._chunks, self._past = [], []
        self.trainer.adapters.step()
        self.trainer.losses.append(self._losses.sum())


def lossy(batch: Batch, chunk: int) -> list[Batch]:
    """The chunks of a batch as sequences that know nothing of each other, each a step of its own (torchtune's packing).

    A rest of one token, which could predict nothing, is left out.

    Raises:
        InputError: chunks of fewer than 2 tokens.
    """
    if chunk < 2:
        raise InputError("training", "chunk", chunk, "use at least 2 tokens: one predicts the other")
    pieces = zip(
        batch.tokens.split(chunk, 1),
        batch.tokens.split(chunk, 1) if batch.labels is None else batch.labels.split(chunk, 1),
        strict=True,
    )
    return [Batch(tokens.contiguous(), labels.contiguous()) for tokens, labels in pieces if tokens.shape[1] > 1]
