"""The transformer: tokens in, logits out, keys and values into the paged cache on the way.

A batch is decoding rows first (one token each), prompt chunks after them. Two bodies compute the same function: `forward`, any
batch, products by cuBLAS and the rest by fused kernels (or plain PyTorch on a CPU); and `forward_skinny`, few decoding rows on
a GPU, where reading the weights is all the time there is: five kernels a layer, norms and activations inside the products.

With several ranks (`links`) the model is one rank's part: products by output give this rank's columns, products by input are
summed over the stage's ranks (two sums a layer, one for the embedding), and a stage hands its residual stream to the next.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.models import ModelShape
from systems.common.torch_engine.attention import Attention, Chunks
from systems.common.torch_engine.comm import Links
from systems.common.torch_engine.kernels.add_norm import add_norm
from systems.common.torch_engine.kernels.quant_linear import quant_linear
from systems.common.torch_engine.kernels.skinny_linear import Tiling, skinny_linear
from systems.common.torch_engine.kernels.swiglu import swiglu
from systems.common.torch_engine.lora import AdapterBank
from systems.common.torch_engine.numerics import Numerics, numerics
from systems.common.torch_engine.quantised import Quantised, linear
from systems.common.torch_engine.weights import Linear, Norm, Weights

SKINNY_TILINGS = {
    "qkv": Tiling(4, 1024, stages=1, dot=False),
    "o": Tiling(8, 512, stages=1, dot=False),
    "up": Tiling(4, 1024, stages=1, dot=False),
    "down": Tiling(8, 512, stages=1, dot=False),
    "head": Tiling(4, 1024, stages=1, dot=False),
}
KERNELS = ("triton", "flashinfer")
"""Attention backends of machines that run our kernels."""
LEAST_INNER = 128
"""Narrower steps leave too little in flight: such widths go to cuBLAS."""
SKINNY_ROWS = 1
"""Fastest of those tried on an H200 for Llama-3.1-8B's matrices and one row (docs/engine.md has the table)."""


def fitted(tiling: Tiling, inner: int) -> Tiling:
    """`tiling` with steps that divide `inner`, and as many more columns as the steps are narrower."""
    step = min(tiling.bk, inner & -inner)
    return replace(tiling, bn=tiling.bn * (tiling.bk // step), bk=step)


class Transformer:
    """A model that runs. `shape` is what this rank computes (`Place.local`), its vocabulary the whole model's.

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
        links: Links | None = None,
    ) -> None:
        self.shape, self.weights, self.attention, self.adapters = shape, weights, attention, adapters
        self.links = links or Links()
        self.adapted = False
        self.numerics = given or numerics(shape)
        self.fused = attention.name in KERNELS and not shape.biases and shape.gated
        inner = {"o": shape.q_width, "down": shape.mlp}
        self.tilings = {site: fitted(tiling, inner.get(site, shape.hidden)) for site, tiling in SKINNY_TILINGS.items()}
        first = weights.layers[0].qkv
        sites = {"head": self.tilings["head"]} if isinstance(first, Quantised) else self.tilings
        ours = not (isinstance(first, Quantised) and first.library)
        self.skinny = self.fused and ours and all(tiling.bk >= LEAST_INNER for tiling in sites.values())

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Token embeddings, plus those of `positions` where the model has them."""
        table, links = self.weights.embedding, self.links
        if links.tp == 1:
            x = functional.embedding(tokens, table)
        else:
            mine = tokens - links.tp_rank * len(table)
            here = (mine >= 0) & (mine < len(table))
            x = links.reduce(functional.embedding(torch.where(here, mine, 0), table) * here[:, None])
        if self.weights.positions is not None:
            assert positions is not None
            x = x + functional.embedding(positions + self.numerics.position_offset, self.weights.positions)
        return x

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        slots: Tensor,
        chunks: Chunks | None,
        rows: Tensor | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits [rows, vocab] of a batch: decoding rows of `slots`, then `chunks`.

        Args:
            tokens: all input tokens; [len(slots) + chunk tokens].
            positions: of all tokens; only models with learned positions read them.
            slots: the decoding sequences.
            chunks: prompt chunks, or None.
            rows: tokens whose logits are wanted, or None for all.
            hidden: on a later stage the residual stream of all tokens instead of `tokens`; overwritten.

        Returns:
            On a stage before the last the residual stream; with tp ranks the logits of this rank's part of the vocabulary.
        """
        weights, links = self.weights, self.links
        x = self.embed(tokens, positions) if hidden is None else hidden
        h = self._add_norm(x, None, weights.layers[0].norm1)
        following = [layer.norm1 for layer in weights.layers[1:]] + [weights.norm if links.last else None]
        for i, (layer, norm) in enumerate(zip(weights.layers, following, strict=True)):
            where = (i, slots, chunks)
            attended = self._attend(self._linear(h, layer.qkv, "qkv", *where), *where)
            h = self._add_norm(x, links.reduce(self._linear(attended, layer.o, "o", *where)), layer.norm2)
            active = self._activate(self._linear(h, layer.up, "up", *where))
            delta = links.reduce(self._linear(active, layer.down, "down", *where))
            if norm is None:
                return x.add_(delta)
            h = self._add_norm(x, delta, norm)
        return self._masked(functional.linear(h if rows is None else h[rows], weights.head))

    def decode(self, tokens: Tensor, lengths: Tensor, slots: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Logits [rows, vocab] of one decode step, by the faster body. `lengths` is the cache's, by slot; else as `forward`."""
        if self.skinny and not self.adapted and len(slots) <= SKINNY_ROWS:
            return self.forward_skinny(tokens, slots, hidden)
        positions = lengths[slots] if self.shape.positions else None
        return self.forward(tokens, positions, slots, None, None, hidden)

    def forward_skinny(self, tokens: Tensor, slots: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Logits [rows, vocab] of decoding rows only; else as `forward`. Needs a fused model."""
        weights, eps, links = self.weights, self.numerics.eps, self.links
        lead = links.tp_rank == 0  # the residual stream joins the ranks' sums once
        x = self.embed(tokens, None) if hidden is None else hidden
        for i, layer in enumerate(weights.layers):
            qkv = self._few(x, layer.qkv, "qkv", norm=layer.norm1.gain, eps=eps)
            attended = self.attention.decode(qkv, i, slots)
            x = links.reduce(self._few(attended, layer.o, "o", residual=x if lead else None, out=x if lead else None))
            h = self._few(x, layer.up, "up", norm=layer.norm2.gain, gated=True, eps=eps)
            x = links.reduce(self._few(h, layer.down, "down", residual=x if lead else None, out=x if lead else None))
        if not links.last:
            return x
        return self._masked(skinny_linear(x, weights.head, self.tilings["head"], norm=weights.norm.gain, eps=eps))

    def _few(self, x: Tensor, layer: Linear, site: str, **fused: Any) -> Tensor:  # noqa: ANN401 - the kernels' own options
        if isinstance(layer, Quantised):
            return quant_linear(x, layer.weight, layer.scale, layer.group, bias=layer.bias, **fused)
        return skinny_linear(x, layer.weight, self.tilings[site], bias=layer.bias, **fused)

    # ---- logits of tp ranks

    def _masked(self, logits: Tensor) -> Tensor:
        """No token beyond the vocabulary, whose padding the last ranks may hold."""
        held = logits.shape[-1]
        mine = min(held, max(0, self.shape.vocab - self.links.tp_rank * held))
        if mine < held:
            logits[:, mine:] = float("-inf")
        return logits

    def likeliest(self, logits: Tensor) -> Tensor:
        """The likeliest token of each row, the same on every rank: each gives its best, and all compare."""
        links = self.links
        if links.tp == 1:
            return logits.argmax(-1)
        best, token = logits.float().max(-1)  # token numbers are exact in float32 up to 2^24
        pairs = links.gather(torch.stack([best, (token + links.tp_rank * logits.shape[-1]).float()], -1))
        winner = pairs[..., 0].argmax(0)
        return pairs[..., 1].gather(0, winner[None])[0].long()

    def whole(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary, on every rank."""
        if self.links.tp == 1:
            return logits
        return self.links.gather(logits).permute(1, 0, 2).flatten(1)[:, : self.shape.vocab]

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
        if not self.adapted or self.adapters is None:
            return linear(x, layer)
        self.adapters.before(x, index, site, slots, chunks)
        y = linear(x, layer)
        self.adapters.add(y, x, index, site, slots, chunks)
        return y
