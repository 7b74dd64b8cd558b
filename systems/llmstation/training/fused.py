"""One decode step with forward tasklets of a tuning sample batched into its layers (paper section 5, sheet 2.6).

A fused layer multiplies each weight once, for the decoding rows and the sample's tokens together: one product of [rows +
tokens, hidden] instead of two. Attention, rotary embedding and adapters stay apart: decoding rows go through serving's paged
attention and its bank of adapters, the sample through its own. A sample whose next forward tasklet is layer j can only join
at layer j, so the step runs the layers before j and after the last fused one for the decoding rows alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.torch_engine.model import Transformer
from systems.common.torch_engine.weights import Layer, Linear
from systems.llmstation.training import ops
from systems.llmstation.training.blocks import Blocks, Kept, Stream, flat
from systems.llmstation.training.samples import quietly
from systems.llmstation.training.trainer import PARTS, TrainingSample


def fusable(sample: TrainingSample) -> int:
    """Forward tasklets that the next decode step could take along; 0 past the forward phase."""
    upcoming = sample.upcoming
    if upcoming is None or upcoming.phase != "forward" or upcoming.part == "mlp":
        return 0
    return len(sample.trainer.options.parts) * (sample.trainer.shape.layers - upcoming.layer)


@quietly
def decode_with(model: Transformer, tokens: Tensor, slots: Tensor, sample: TrainingSample, layers: int) -> Tensor:
    """Logits [rows, vocab] of one decode step, `sample` advanced by up to `layers` forward layers on the way.

    As `Transformer.decode` does, this stores the rows' new keys and values; committing the chosen tokens is the caller's. Where
    nothing can be fused it is a decode step. Call it on the stream of the sample's other tasklets: their tensors belong to it.

    Args:
        model: the serving model; its `weights` must be the sample's.
        tokens: newest token of each row; [rows].
        slots: the decoding sequences; [rows].
        sample: a training step whose forward phase is (or is not) under way. Its next tasklet must begin a layer.
        layers: how many of the sample's layers to take along at most.
    """
    assert model.weights is sample.trainer.blocks.weights, "fusing needs one set of weights"
    joined = _Joined(model, sample, slots)
    upcoming = sample.upcoming
    first = upcoming.layer if upcoming is not None and fusable(sample) else model.shape.layers
    rows = Stream(functional.embedding(tokens, model.weights.embedding))
    for index in range(model.shape.layers):
        rows = joined.layer(index, rows) if first <= index < first + layers else joined.alone(index, rows)
    _, h = ops.norm_forward(rows.x, rows.delta, model.weights.norm.gain, model.numerics.eps)
    return functional.linear(h, model.weights.head)


class _Joined:
    """A decode step's layers, with or without the sample's tokens behind the rows.

    The joined stream is made when the sample joins and cut when it leaves; meanwhile the sample's own tensors are views of it.
    """

    def __init__(self, model: Transformer, sample: TrainingSample, slots: Tensor) -> None:
        self.model, self.sample, self.slots = model, sample, slots
        self.blocks: Blocks = sample.trainer.blocks
        self.rows = len(slots)
        self._held: Stream | None = None

    def alone(self, index: int, rows: Stream) -> Stream:
        """One layer for the decoding rows."""
        layer, eps = self.model.weights.layers[index], self.model.numerics.eps
        x, h = ops.norm_forward(rows.x, rows.delta, layer.norm1.gain, eps)
        attended = self.model.attention.decode(self._serve(index, "qkv", layer.qkv, h), index, self.slots)
        x, h = ops.norm_forward(x, self._serve(index, "o", layer.o, attended), layer.norm2.gain, eps)
        return Stream(x, self._serve(index, "down", layer.down, ops.swiglu(self._serve(index, "up", layer.up, h))))

    def layer(self, index: int, rows: Stream) -> Stream:
        """One layer for both; advances the sample by it."""
        layer, blocks, sample = self.model.weights.layers[index], self.blocks, self.sample
        both = self._held or _join(rows, sample.entered())
        x, h = ops.norm_forward(both.x, both.delta, layer.norm1.gain, blocks.eps)
        delta, attention = self._attention(index, layer, x, h)
        x, h = ops.norm_forward(x, delta, layer.norm2.gain, blocks.eps)
        delta, mlp = self._mlp(index, layer, x, h)
        kept = {(index, "attention"): attention, (index, "mlp"): mlp}
        if blocks.recompute:
            kept = {key: Kept(value.x) for key, value in kept.items()}
        for part in sample.trainer.options.parts:
            sample.advance(
                Stream(x[self.rows :], delta[self.rows :]), {(index, name): kept[index, name] for name in PARTS[part]}
            )
        self._held = Stream(x, delta)
        return Stream(x[: self.rows], delta[: self.rows])

    def _attention(self, index: int, layer: Layer, x: Tensor, h: Tensor) -> tuple[Tensor, Kept]:
        n, blocks = self.rows, self.blocks
        qkv, low = self._both(index, "qkv", layer.qkv, h)
        served = self.model.attention.decode(qkv[:n], index, self.slots)
        attended = blocks.attend(qkv[n:], self.sample.span)
        delta, low_out = self._both(index, "o", layer.o, torch.cat([served, flat(attended.out)]))
        return delta, Kept(x[n:], blocks.keep(index, "qkv", h[n:]), low, low_out, attended, full=True)

    def _mlp(self, index: int, layer: Layer, x: Tensor, h: Tensor) -> tuple[Tensor, Kept]:
        n, blocks = self.rows, self.blocks
        both, low = self._both(index, "up", layer.up, h)
        delta, low_out = self._both(index, "down", layer.down, ops.swiglu(both))
        return delta, Kept(x[n:], blocks.keep(index, "up", h[n:]), low, low_out, both=both[n:], full=True)

    def _both(self, index: int, site: str, linear: Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """One product for all tokens; to each part its own adapters."""
        y = functional.linear(x, linear.weight, linear.bias)
        self._adapt_rows(index, site, y[: self.rows], x[: self.rows])
        return y, self.blocks.adapt(index, site, y[self.rows :], x[self.rows :])

    def _serve(self, index: int, site: str, linear: Linear, x: Tensor) -> Tensor:
        y = functional.linear(x, linear.weight, linear.bias)
        self._adapt_rows(index, site, y, x)
        return y

    def _adapt_rows(self, index: int, site: str, y: Tensor, x: Tensor) -> None:
        if self.model.adapted and self.model.adapters is not None:
            self.model.adapters.add(y, x, index, site, self.slots, None)


def _join(rows: Stream, sample: Stream) -> Stream:
    """The rows before the sample's tokens. A stream without a delta (embeddings) counts as one with zeros."""
    x = torch.cat([rows.x, sample.x])
    if rows.delta is None and sample.delta is None:
        return Stream(x)
    deltas = [torch.zeros_like(s.x) if s.delta is None else s.delta for s in (rows, sample)]
    return Stream(x, torch.cat(deltas))
