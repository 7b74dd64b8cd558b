# mypy: disable-error-code="no-any-return"
"""PyTorch's scaled_dot_product_attention, one sequence after another: the yardstick, and the CPU's backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.models import ModelShape
from systems.common.torch_engine.attention.base import Chunks, heads_of
from systems.common.torch_engine.attention.mirror import Mirror
from systems.common.torch_engine.cache import KVCache, rounded, unrounded


class SdpaAttention:
    """See the module. Reads lengths back from the device, so no CUDA graph can hold it."""

    name = "sdpa"
    graphs = (False, False)
    mirror: Mirror | None = None

    def __init__(self, shape: ModelShape, cache: KVCache, rope: Tensor | None) -> None:
        self.shape, self.cache, self.rope = shape, cache, rope

    @staticmethod
    def lacks(shape: ModelShape, cache: KVCache) -> str | None:  # noqa: ARG004 - as the other backends
        """It runs everywhere."""
        return None

    def warm(self, tokens: int) -> None:
        """Nothing to make ready."""

    def plan(self, rows: int, graph: bool) -> None:
        """Nothing to plan."""

    def decode(self, qkv: Tensor, layer: int, slots: Tensor) -> Tensor:
        """See `Attention`."""
        past = self.cache.lengths[slots].tolist()
        return self.prefill(qkv, layer, Chunks.of(past, [1] * len(past), slots.tolist(), qkv.device))

    def prefill(self, qkv: Tensor, layer: int, chunks: Chunks) -> Tensor:
        """See `Attention`."""
        shape = self.shape
        q, k, v = heads_of(qkv, shape)
        positions, slots = chunks.positions.long(), chunks.slots.long()
        if self.rope is not None:
            q, k = rotate(q, self.rope[positions]), rotate(k, self.rope[positions])
        self._store(k, v, layer, positions, slots)
        out = torch.empty(len(qkv), shape.heads, shape.head_dim, dtype=qkv.dtype, device=qkv.device)
        assert chunks.host is not None
        for start, past, new, slot in chunks.host.tolist():
            keys, values = self._cached(layer, slot, past + new)
            mask = torch.ones(new, past + new, dtype=torch.bool, device=qkv.device).tril(past)
            part = functional.scaled_dot_product_attention(
                q[start : start + new].transpose(0, 1)[None],
                keys[None],
                values[None],
                mask,
                enable_gqa=shape.heads != shape.kv_heads,
            )
            out[start : start + new] = part[0].transpose(0, 1)
        return out.view(len(qkv), -1)

    def _store(self, k: Tensor, v: Tensor, layer: int, positions: Tensor, slots: Tensor) -> None:
        cache = self.cache
        blocks = cache.tables[slots, positions // cache.block_tokens].long()
        place = positions % cache.block_tokens
        if (scales := cache.scales(layer)) is not None:
            (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
            scales[0][blocks, :, place], scales[1][blocks, :, place] = k_scale, v_scale
        cache.k[layer][blocks, :, place] = k
        cache.v[layer][blocks, :, place] = v

    def _cached(self, layer: int, slot: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The first `tokens` keys and values of a slot, contiguous; [kv_heads, tokens, head_dim] each."""
        cache = self.cache
        blocks = cache.tables[slot, : -(-tokens // cache.block_tokens)].long()
        k, v = cache.k[layer][blocks], cache.v[layer][blocks]
        if (scales := cache.scales(layer)) is not None:
            k, v = (unrounded(x, scale[blocks], cache.dtype) for x, scale in zip((k, v), scales, strict=True))
        return k.transpose(0, 1).flatten(1, 2)[:, :tokens], v.transpose(0, 1).flatten(1, 2)[:, :tokens]


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of x [tokens, heads, head_dim] by `rope` [tokens, head_dim] (cosines | sines)."""
    half = x.shape[-1] // 2
    cos, sin = rope[:, None, :half], rope[:, None, half:]
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
