"""A decoder layer forward and backward, in two blocks (attention, MLP), over the weights that serve.

Each block begins with the residual add and the norm, so what passes between blocks forward is the pair `Stream` (residual
stream, what is still to be added to it); what passes backward is one gradient, of the stream. No autograd: frozen weights
have no gradient, so the backward pass of a product is one product, and what must be kept is known exactly.

    attention   x = x + delta;  qkv = site(norm(x));  rotate;  attend;  delta = site_o(attended)
    mlp         x = x + delta;  both = site(norm(x));  delta = site_down(swiglu(both))

With `recompute` a block keeps its input stream alone and runs forward again before its backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.numerics import DTYPES, Numerics, numerics, rope_table
from systems.common.torch_engine.weights import Layer, Linear, Norm, Weights
from systems.llmstation.training import ops
from systems.llmstation.training.adapters import Adapters
from systems.llmstation.training.attention import Attended, CausalAttention


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream between blocks: `x` and what the block before has still to add to it; [tokens, hidden]."""

    x: Tensor
    delta: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a pass: of `batch` sequences each the `length` tokens from `start` on, one sequence after the other."""

    batch: int
    length: int
    start: int = 0


@dataclass(slots=True)
class PastKeys:
    """Keys and values of one layer, and their gradients, for training in chunks; [batch, kv_heads, tokens, head_dim]."""

    k: Tensor
    v: Tensor
    grad_k: Tensor
    grad_v: Tensor

    def extend(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Keep a chunk's keys and values; all up to its end."""
        end = span.start + span.length
        self.k[:, :, span.start : end], self.v[:, :, span.start : end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]

    def collect(self, dk: Tensor, dv: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Add gradients of all keys up to the chunk's end; the chunk's own, now complete (later chunks came before)."""
        end = span.start + span.length
        self.grad_k[:, :, :end] += dk
        self.grad_v[:, :, :end] += dv
        return self.grad_k[:, :, span.start : end], self.grad_v[:, :, span.start : end]


@dataclass(slots=True)
class Kept:
    """What a block's backward pass reads.

    Attributes:
        x: input stream of the block, after the add.
        h: its norm, where the first product has an adapter. `low`, `low_out`: x A.T of the first and of the last product.
        attended: of the attention block. `both`: gate | up of the MLP block.
        full: whether all is there, or `x` alone (recomputed before the backward pass).
    """

    x: Tensor
    h: Tensor | None = None
    low: Tensor | None = None
    low_out: Tensor | None = None
    attended: Attended | None = None
    both: Tensor | None = None
    full: bool = False


class Blocks:
    """The blocks of one model with its adapters.

    Attributes:
        weights: the very object that serves.
        recompute: keep less, run each block forward twice.
    """

    def __init__(
        self, shape: ModelShape, weights: Weights, adapters: Adapters, attention: CausalAttention, positions: int,
        given: Numerics | None = None, recompute: bool = False,
    ) -> None:  # fmt: skip
        if not shape.gated or shape.biases or shape.positions or shape.dtype not in ("bf16", "fp32"):
            mend = "only LLaMA-shaped models (RMSNorm, gated MLP, rotary) in bf16 or fp32 can be tuned"
            raise InputError("training", "model", f"{shape.name} in {shape.dtype}", mend)
        _check(shape, weights)
        self.shape, self.weights, self.adapters, self.attention = shape, weights, adapters, attention
        self.recompute = recompute
        given = given or numerics(shape)
        self.eps, self.positions = given.eps, positions
        with torch.inference_mode(False):
            self.rope = rope_table(shape.head_dim, positions, given, weights.embedding.device)

    def embed(self, tokens: Tensor) -> Stream:
        """Embeddings of all tokens, flattened; [tokens, hidden]."""
        return Stream(functional.embedding(tokens.flatten(), self.weights.embedding))

    # ---- whole layers

    def forward(self, index: int, part: str, stream: Stream, span: Span, past: PastKeys | None = None) -> tuple[Stream, Kept]:
        """One block (`attention` or `mlp`) of layer `index`: the stream after it, and what its backward pass needs."""
        site, norm, last = self._ends(index, part)
        x, h = ops.norm_forward(stream.x, stream.delta, norm.gain, self.eps)
        middle, kept = self._inside(index, part, x, h, span, past)
        delta, kept.low_out = self.linear(index, site, last, middle)
        return Stream(x, delta), Kept(x) if self.recompute else kept

    def _ends(self, index: int, part: str) -> tuple[str, Norm, Linear]:
        """The site of a block's last product, its norm, and that product's weight."""
        layer = self.weights.layers[index]
        return ("o", layer.norm1, layer.o) if part == "attention" else ("down", layer.norm2, layer.down)

    def backward(
        self, index: int, part: str, grad: Tensor, kept: Kept, span: Span, past: PastKeys | None = None, add: bool = False
    ) -> Tensor:
        """Gradient of the block's input stream from that of its output; the adapters' gradients on the way.

        The stream before the first block is the embeddings, which nothing trains: there `grad` comes back as it is.

        Args:
            index: the layer.
            part: `attention` or `mlp`.
            grad: gradient of the stream after the block.
            kept: what `forward` gave.
            span: as in `forward`.
            past: as in `forward`.
            add: add to the adapters' gradients instead of storing them.
        """
        site, norm, _ = self._ends(index, part)
        if not kept.full:
            _, h = ops.norm_forward(kept.x, None, norm.gain, self.eps)
            middle, kept = self._inside(index, part, kept.x, h, span, past)
            if (lora := self.adapters.sites[index].get(site)) is not None:
                kept.low_out = middle @ lora.a.T
        back = self._attention_backward if part == "attention" else self._mlp_backward
        dh = back(index, self.weights.layers[index], grad, kept, span, past, add)
        return grad if dh is None else ops.norm_backward(kept.x, norm.gain, dh, grad, self.eps)

    def _inside(self, index: int, part: str, x: Tensor, h: Tensor, span: Span, past: PastKeys | None) -> tuple[Tensor, Kept]:
        """A block from its first product up to the last one's input."""
        layer = self.weights.layers[index]
        if part == "attention":
            qkv, low = self.linear(index, "qkv", layer.qkv, h)
            attended = self.attend(qkv, span, past)
            return flat(attended.out), Kept(x, self.keep(index, "qkv", h), low, attended=attended, full=True)
        both, low = self.linear(index, "up", layer.up, h)
        return ops.swiglu(both), Kept(x, self.keep(index, "up", h), low, both=both, full=True)

    def keep(self, index: int, site: str, h: Tensor) -> Tensor | None:
        """`h` where an adapter's backward pass reads it."""
        return h if site in self.adapters.sites[index] else None

    # ---- attention

    def attend(self, qkv: Tensor, span: Span, past: PastKeys | None = None) -> Attended:
        """Rotate q and k of `qkv` in place and attend within each sequence."""
        shape = self.shape
        ops.rope_forward(qkv, self.rope, span.length, span.start, shape.heads + shape.kv_heads)
        heads = qkv.view(span.batch, span.length, -1, shape.head_dim).transpose(1, 2)
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        if past is not None:
            k, v = past.extend(k, v, span)
        return self.attention.forward(q, k, v)

    def _attention_backward(
        self, index: int, layer: Layer, grad: Tensor, kept: Kept, span: Span, past: PastKeys | None, add: bool
    ) -> Tensor | None:
        shape, attended = self.shape, kept.attended
        assert attended is not None
        dout = self.linear_backward(index, "o", layer.o, grad, flat(attended.out), kept.low_out, add)
        assert dout is not None
        dq, dk, dv = self.attention.backward(
            dout.view(span.batch, span.length, shape.heads, shape.head_dim).transpose(1, 2), attended
        )
        if past is not None:
            dk, dv = past.collect(dk, dv, span)
        dqkv = ops.rope_backward(dq, dk, dv, self.rope, span.start, grad.dtype)
        return self.linear_backward(index, "qkv", layer.qkv, dqkv, kept.h, kept.low, add, wanted=index > 0)

    def _mlp_backward(
        self, index: int, layer: Layer, grad: Tensor, kept: Kept, span: Span, past: PastKeys | None, add: bool
    ) -> Tensor | None:
        assert kept.both is not None
        adapted = "down" in self.adapters.sites[index]
        middle = ops.swiglu(kept.both) if adapted else None  # cheaper computed again than kept
        dmiddle = self.linear_backward(index, "down", layer.down, grad, middle, kept.low_out, add)
        assert dmiddle is not None
        dboth = ops.swiglu_backward(kept.both, dmiddle)
        return self.linear_backward(index, "up", layer.up, dboth, kept.h, kept.low, add)

    # ---- products

    def linear(self, index: int, site: str, linear: Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A site's product with its adapters' part; x A.T too where there are any."""
        y = functional.linear(x, linear.weight, linear.bias)
        return y, self.adapt(index, site, y, x)

    def adapt(self, index: int, site: str, y: Tensor, x: Tensor) -> Tensor | None:
        """Add the adapters' part of a site to `y` in place; x A.T, or None where the site has no adapter."""
        if (lora := self.adapters.sites[index].get(site)) is None:
            return None
        low = x @ lora.a.T
        y.addmm_(low, lora.b.T)
        return low

    def linear_backward(
        self, index: int, site: str, linear: Linear, dy: Tensor, x: Tensor | None, low: Tensor | None, add: bool,
        wanted: bool = True,
    ) -> Tensor | None:  # fmt: skip
        """Gradient of a site's input (None unless `wanted`); stores the gradients of its A and B, or adds to them."""
        dx = dy @ linear.weight if wanted else None
        if (lora := self.adapters.sites[index].get(site)) is None:
            return dx
        assert x is not None and low is not None
        dlow = dy @ lora.b
        ops.product_into(lora.grad_b, dy.T, low, add)
        ops.product_into(lora.grad_a, dlow.T, x, add)
        if dx is not None:
            dx.addmm_(dlow, lora.a)
        return dx

    # ---- loss

    def loss(self, stream: Stream, rows: slice, target: Tensor, weight: Tensor, losses: Tensor, grad: Tensor) -> None:
        """Head and loss of some rows: their losses into `losses`, the gradient of their stream into `grad`."""
        weights = self.weights
        delta = None if stream.delta is None else stream.delta[rows]
        x, h = ops.norm_forward(stream.x[rows], delta, weights.norm.gain, self.eps)
        logits = functional.linear(h, weights.head)
        losses[rows] = ops.cross_entropy_(logits, target[rows], weight[rows])
        grad[rows] = ops.norm_backward(x, weights.norm.gain, logits @ weights.head, None, self.eps)


def flat(out: Tensor) -> Tensor:
    """An attention output [batch, heads, length, head_dim] as rows [batch * length, heads * head_dim]."""
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _check(shape: ModelShape, weights: Weights) -> None:
    """Raises InputError for quantised weights, or a rank's part of a model."""
    qkv = weights.layers[0].qkv.weight
    sizes = (shape.q_width + 2 * shape.kv_width, shape.hidden), (shape.vocab, shape.hidden)
    expected = (shape.layers, *sizes, number_format(shape))
    found = (len(weights.layers), tuple(qkv.shape), tuple(weights.head.shape), qkv.dtype)
    if found != expected:
        mend = f"layers, q k v, head and format must be {expected}: tuning needs {shape.name} whole and not quantised"
        raise InputError("training", "weights", found, mend)


def number_format(shape: ModelShape) -> torch.dtype:
    """The weights' number format."""
    return DTYPES[shape.dtype]
