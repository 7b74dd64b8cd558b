"""The transformer: tokens in, logits out, keys and values into the paged cache on the way.

A batch is decoding rows first (one token each), prompt chunks after them. Two bodies compute the same function: `forward`, any
batch, products by cuBLAS and the rest by fused kernels (or plain PyTorch on a CPU); and `forward_skinny`, few decoding rows on
a GPU, where reading the weights is all the time there is: five kernels a layer, norms and activations inside the products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.models import ModelShape
from systems.common.torch_engine.attention import Attention, Chunks
from systems.common.torch_engine.kernels.add_norm import add_norm
from systems.common.torch_engine.kernels.skinny_linear import Tiling, skinny_linear
from systems.common.torch_engine.kernels.swiglu import swiglu
from systems.common.torch_engine.lora import AdapterBank
from systems.common.torch_engine.numerics import Numerics, numerics
from systems.common.torch_engine.weights import Linear, Norm, Weights

SKINNY_TILINGS = {
    "qkv": Tiling(4, 1024, stages=1, dot=False),
    "o": Tiling(8, 512, stages=1, dot=False),
    "up": Tiling(4, 1024, stages=1, dot=False),
    "down": Tiling(8, 512, stages=1, dot=False),
    "head": Tiling(4, 1024, stages=1, dot=False),
}
SKINNY_ROWS = 1
"""Fastest of those tried on an H200 for Llama-3.1-8B's matrices and one row (docs/engine.md has the table)."""


class Transformer:
    """A model that runs.

    Attributes:
        adapted: whether batches apply the adapters of their sequences; a graph keeps what held when it was captured.
        skinny: whether `forward_skinny` can run it.
        fused: whether the Triton kernels for norms and activations are used (a GPU and an RMSNorm, gated model).
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        attention: Attention,
        given: Numerics | None = None,
        adapters: AdapterBank | None = None,
    ) -> None:
        self.shape, self.weights, self.attention, self.adapters = shape, weights, attention, adapters
        self.adapted = False
        self.numerics = given or numerics(shape)
        self.fused = attention.name == "triton" and not shape.biases and shape.gated
        self.tilings = SKINNY_TILINGS
        inner = (shape.hidden, shape.q_width, shape.mlp)
        self.skinny = self.fused and all(width % tiling.bk == 0 for width in inner for tiling in SKINNY_TILINGS.values())

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Token embeddings, plus those of `positions` where the model has them."""
        x = functional.embedding(tokens, self.weights.embedding)
        if self.weights.positions is not None:
            assert positions is not None
            x = x + functional.embedding(positions + self.numerics.position_offset, self.weights.positions)
        return x

    def forward(
        self, tokens: Tensor, positions: Tensor | None, slots: Tensor, chunks: Chunks | None, rows: Tensor | None
    ) -> Tensor:
        """Logits [rows, vocab] of a batch: decoding rows of `slots`, then `chunks`.

        Args:
            tokens: all input tokens; [len(slots) + chunk tokens].
            positions: of all tokens; only models with learned positions read them.
            slots: the decoding sequences.
            chunks: prompt chunks, or None.
            rows: tokens whose logits are wanted, or None for all.
        """
        weights, x = self.weights, self.embed(tokens, positions)
        h = self._add_norm(x, None, weights.layers[0].norm1)
        following = [layer.norm1 for layer in weights.layers[1:]] + [weights.norm]
        for i, (layer, norm) in enumerate(zip(weights.layers, following, strict=True)):
            where = (i, slots, chunks)
            attended = self._attend(self._linear(h, layer.qkv, "qkv", *where), *where)
            h = self._add_norm(x, self._linear(attended, layer.o, "o", *where), layer.norm2)
            h = self._add_norm(
                x, self._linear(self._activate(self._linear(h, layer.up, "up", *where)), layer.down, "down", *where), norm
            )
        return functional.linear(h if rows is None else h[rows], weights.head)

    def decode(self, tokens: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """Logits [rows, vocab] of one decode step, by the faster body. `lengths` is the cache's, by slot."""
        if self.skinny and not self.adapted and len(tokens) <= SKINNY_ROWS:
            return self.forward_skinny(tokens, slots)
        positions = lengths[slots] if self.shape.positions else None
        return self.forward(tokens, positions, slots, None, None)

    def forward_skinny(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Logits [rows, vocab] of decoding rows only. Needs a fused model."""
        weights, eps, tilings = self.weights, self.numerics.eps, self.tilings
        x = functional.embedding(tokens, weights.embedding)
        for i, layer in enumerate(weights.layers):
            qkv = skinny_linear(x, layer.qkv.weight, tilings["qkv"], norm=layer.norm1.gain, bias=layer.qkv.bias, eps=eps)
            attended = self.attention.decode(qkv, i, slots)
            skinny_linear(attended, layer.o.weight, tilings["o"], residual=x, out=x)
            h = skinny_linear(x, layer.up.weight, tilings["up"], norm=layer.norm2.gain, gated=True, eps=eps)
            skinny_linear(h, layer.down.weight, tilings["down"], residual=x, out=x)
        return skinny_linear(x, weights.head, tilings["head"], norm=weights.norm.gain, eps=eps)

    def _attend(self, qkv: Tensor, layer: int, slots: Tensor, chunks: Chunks | None) -> Tensor:
        decodes = len(slots)
        if chunks is None:
            return self.attention.decode(qkv, layer, slots)
        if not decodes:
            return self.attention.prefill(qkv, layer, chunks)
        parts = [self.attention.decode(qkv[:decodes], layer, slots), self.attention.prefill(qkv[decodes:], layer, chunks)]
        return torch.cat(parts)

    def _add_norm(self, x: Tensor, delta: Tensor | None, norm: Norm) -> Tensor:
        """Add `delta` to the residual stream in place; the norm of the sum."""
        if self.fused:
            return add_norm(x, delta, norm.gain, self.numerics.eps)
        if delta is not None:
            x += delta
        if norm.shift is not None:
            return functional.layer_norm(x, x.shape[-1:], norm.gain, norm.shift, self.numerics.eps)
        wide = x.float()
        return norm.gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.numerics.eps)).to(x.dtype)

    def _activate(self, both: Tensor) -> Tensor:
        if self.fused:
            return swiglu(both)
        if self.shape.gated:
            gate, up = both.chunk(2, -1)
            return functional.silu(gate) * up
        return functional.relu(both)

    def _linear(self, x: Tensor, layer: Linear, site: str, index: int, slots: Tensor, chunks: Chunks | None) -> Tensor:
        y = functional.linear(x, layer.weight, layer.bias)
        if self.adapted and self.adapters is not None:
            self.adapters.add(y, x, index, site, slots, chunks)
        return y
