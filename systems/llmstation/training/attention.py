"""Causal attention forward and backward, outside autograd, behind one interface.

q [batch, heads, queries, head_dim] are the last positions of k, v [batch, kv_heads, keys, head_dim]: query i sees the first
keys - queries + i + 1 keys, so a whole sequence (queries = keys) and a chunk with what came before it are the same call. All
may be views into the joined projection.

* `reference`: softmax by hand, float32 scores; any device. `flash`: FlashAttention-2. `cudnn`: fastest on Hopper, whole
  sequences only (chunks go to flash). Half precision for the last two, whose kernels torch brings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.llmstation.training.ops import wide


@dataclass(frozen=True, slots=True)
class Attended:
    """What an attention left for its backward pass: `out` as q is laid out; `rest` is the backend's own."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    rest: tuple[Any, ...]


class CausalAttention(Protocol):
    """A backend. `name` is recorded with every measurement."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Attention of the last `queries` positions."""
        ...

    def backward(self, dout: Tensor, kept: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from that of the output."""
        ...


class Reference:
    """The formula itself: the CPU's backend, and what the others are held against."""

    name = "reference"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """See `CausalAttention`."""
        group = q.shape[1] // k.shape[1]
        (queries, head_dim), keys = q.shape[2:], k.shape[2]
        scores = wide(q) @ wide(k).repeat_interleave(group, 1).transpose(2, 3) / math.sqrt(head_dim)
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
        out = weights @ wide(v).repeat_interleave(group, 1)
        return Attended(q, k, v, out.to(q.dtype), (weights,))

    def backward(self, dout: Tensor, kept: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """See `CausalAttention`."""
        (weights,), q, k, v = kept.rest, kept.q, kept.k, kept.v
        kv_heads, group, scale = k.shape[1], q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[3])
        grad = wide(dout)
        dweights = grad @ wide(v).repeat_interleave(group, 1).transpose(2, 3)
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
        dq = dscores @ wide(k).repeat_interleave(group, 1)
        dk = (dscores.transpose(2, 3) @ wide(q)).unflatten(1, (kv_heads, group)).sum(2)
        dv = (weights.transpose(2, 3) @ grad).unflatten(1, (kv_heads, group)).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class Flash:
    """FlashAttention-2 as torch ships it; aligned to the last key, so chunks are served too."""

    name = "flash"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """See `CausalAttention`."""
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
        return Attended(q, k, v, found[0], tuple(found[1:8]))

    def backward(self, dout: Tensor, kept: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """See `CausalAttention`."""
        sums, starts_q, starts_k, most_q, most_k, seed, offset = kept.rest
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, kept.q, kept.k, kept.v, kept.out, sums, starts_q, starts_k, most_q, most_k, 0.0, True, seed, offset
        )
        return dq, dk, dv


class Cudnn:
    """cuDNN's attention for whole sequences, flash for chunks."""

    name = "cudnn"

    def __init__(self) -> None:
        self._flash = Flash()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """See `CausalAttention`."""
        if q.shape[2] != k.shape[2]:
            return self._flash.forward(q, k, v)
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
        return Attended(q, k, v, found[0], tuple(found[1:8]))

    def backward(self, dout: Tensor, kept: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """See `CausalAttention`."""
        if kept.q.shape[2] != kept.k.shape[2]:
            return self._flash.backward(dout, kept)
        sums, starts_q, starts_k, most_q, most_k, seed, offset = kept.rest
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, kept.q, kept.k, kept.v, kept.out, sums, seed, offset, None, starts_q, starts_k, most_q, most_k, 0.0, True
        )
        return dq, dk, dv


BACKENDS: dict[str, type[CausalAttention]] = {"cudnn": Cudnn, "flash": Flash, "reference": Reference}


def choose(name: str, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> CausalAttention:
    """The backend called `name`; `auto`: the first of cudnn, flash and reference with the reference's gradients here.

    Raises:
        InputError: there is none of that name, or it does not work on this device.
    """
    if name != "auto" and name not in BACKENDS:
        raise InputError("training", "attention", name, f"use auto or one of {', '.join(BACKENDS)}")
    for candidate in BACKENDS if name == "auto" else (name,):
        if candidate == "reference" or _works(BACKENDS[candidate](), shape, device, dtype):
            return BACKENDS[candidate]()
    raise InputError("training", "attention", name, "does not work on this device and number format: use auto")


@torch.no_grad()
def _works(backend: CausalAttention, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the backend runs here and agrees with the reference, for a whole sequence and for a chunk of one."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator(device).manual_seed(0)
    for queries, keys in ((128, 128), (64, 128)):
        width = shape.heads + 2 * shape.kv_heads
        joined = torch.randn(2, keys, width, shape.head_dim, dtype=dtype, device=device, generator=generator).transpose(1, 2)
        q, k, v = joined.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        q = q[:, :, keys - queries :]
        dout = torch.randn(2, queries, shape.heads, shape.head_dim, dtype=dtype, device=device, generator=generator)
        dout = dout.transpose(1, 2)
        try:
            kept, expected = backend.forward(q, k, v), Reference().forward(q, k, v)
            grads = backend.backward(dout, kept), Reference().backward(dout, expected)
        except (RuntimeError, TypeError, NotImplementedError):  # no such kernel in this build, or not for these shapes
            return False
        for mine, theirs in zip((kept.out, *grads[0]), (expected.out, *grads[1]), strict=True):
            if not (mine.float() - theirs.float()).norm() < 0.02 * theirs.float().norm():
                return False
    return True
