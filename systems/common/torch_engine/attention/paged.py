# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Our Triton kernels over the paged cache; whole prompts in half precision go through torch's flash attention."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from systems.common.models import ModelShape
from systems.common.torch_engine.attention.base import Chunks, heads_of
from systems.common.torch_engine.attention.mirror import Mirror
from systems.common.torch_engine.cache import KVCache
from systems.common.torch_engine.kernels import triton_guard
from systems.common.torch_engine.kernels.paged_decode import Plan, paged_decode, plan
from systems.common.torch_engine.kernels.paged_prefill import paged_prefill
from systems.common.torch_engine.kernels.rope_write import rope_write

CUDNN_TOKENS, CUDNN_STEP = 384, 128
"""Whole prompts of at least so many tokens go to cuDNN's attention, in steps of so many."""


class TritonAttention:
    """See the module. Flash attention reads q, k, v where they are, as the cache holds them."""

    name = "triton"
    graphs = (True, True)
    mirror: Mirror | None = None

    def __init__(self, shape: ModelShape, cache: KVCache, rope: Tensor | None, flash: bool = True) -> None:
        self.shape, self.cache, self.rope = shape, cache, rope
        self.scale = shape.head_dim**-0.5
        self.flash = flash and shape.dtype != "fp32"
        self._arrived = torch.zeros(len(cache.lengths), shape.kv_heads, dtype=torch.int32, device=cache.k.device)
        self._plan: Plan | None = None

    @staticmethod
    def lacks(shape: ModelShape, cache: KVCache) -> str | None:
        """What it would need; None where it can run."""
        usable = triton_guard.AVAILABLE and cache.k.device.type == "cuda" and shape.head_dim & (shape.head_dim - 1) == 0
        return None if usable else "Triton, a GPU and heads of a power of two"

    def plan(self, rows: int, graph: bool) -> None:
        """Plans are made on the device (`decode`)."""

    def decode(self, qkv: Tensor, layer: int, slots: Tensor) -> Tensor:
        """See `Attention`."""
        shape, cache = self.shape, self.cache
        if layer == 0:  # the layers of one step have the same contexts
            self._plan = plan(cache.lengths, slots, shape.kv_heads, self._arrived)
        assert self._plan is not None, "layers are run in order"
        return paged_decode(
            qkv,
            cache.k[layer],
            cache.v[layer],
            cache.tables,
            cache.lengths,
            slots,
            self.rope,
            shape.heads,
            self.scale,
            self._plan,
            cache.scales(layer),
        )

    def prefill(self, qkv: Tensor, layer: int, chunks: Chunks) -> Tensor:
        """See `Attention`."""
        shape, cache = self.shape, self.cache
        k, v, scales = cache.k[layer], cache.v[layer], cache.scales(layer)
        rope_write(qkv, k, v, cache.tables, chunks.positions, chunks.slots, self.rope, shape.heads, scales)
        if self.flash and chunks.host is not None and not chunks.host[:, 1].any():
            return self._flash(qkv, chunks, chunks.host[:, 2])
        return paged_prefill(qkv, k, v, cache.tables, chunks.tiles, chunks.table, shape.heads, self.scale, scales=scales)

    def warm(self, tokens: int) -> None:
        """Have cuDNN plan every size of whole prompt up to `tokens`: a plan costs far more than its use."""
        shape, device = self.shape, self.cache.k.device
        for size in range(CUDNN_TOKENS, tokens + 1, CUDNN_STEP) if self.flash and device.type == "cuda" else ():
            self._cudnn(torch.zeros(size, shape.q_width + 2 * shape.kv_width, dtype=self.cache.dtype, device=device))

    def _flash(self, qkv: Tensor, chunks: Chunks, new: NDArray[np.int32]) -> Tensor:
        """Whole prompts: one long one by cuDNN (fastest on Hopper; planned by size, so padded), else FlashAttention-2."""
        tokens, most = len(qkv), int(new.max())
        if len(new) == 1 and tokens >= CUDNN_TOKENS:
            if surplus := -tokens % CUDNN_STEP:
                qkv = functional.pad(qkv, (0, 0, 0, surplus))  # causal: what follows a token does not reach it
            return self._cudnn(qkv)[:tokens]
        q, k, v = heads_of(qkv, self.shape)
        starts = chunks.starts
        out = torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, most, most, 0.0, True, False, scale=self.scale)[
            0
        ]
        return out.reshape(tokens, -1)

    def _cudnn(self, qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in heads_of(qkv, self.shape))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            grouped = self.shape.heads != self.shape.kv_heads
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out[0].transpose(0, 1).reshape(len(qkv), -1)
