# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Attention over the paged cache behind one interface, with two backends: plain PyTorch (any device) and our Triton kernels.

`decode` serves one new token for each of the given slots, `prefill` the tokens of prompt chunks. Both take the raw product
q | k | v, apply the rotary embedding, store the new keys and values, and return what the output projection reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.cache import KVCache
from systems.common.torch_engine.kernels import triton_guard
from systems.common.torch_engine.kernels.paged_decode import Plan, paged_decode, plan
from systems.common.torch_engine.kernels.paged_prefill import TILE_Q, paged_prefill
from systems.common.torch_engine.kernels.rope_write import rope_write

CUDNN_TOKENS, CUDNN_STEP = 384, 128
"""Whole prompts of at least so many tokens go to cuDNN's attention, in steps of so many."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Prompt chunks laid end to end, as tensors on the device.

    Attributes:
        table: per chunk its first token, tokens already cached, new tokens, slot; [chunks, 4].
        host: the same on the host; None in a CUDA graph, which must serve any chunks.
        starts: where each chunk begins, and the end; [chunks + 1] int32.
        positions, slots: of every token.
        tiles: chunk and first query of every tile of queries; [tiles, 2].
    """

    table: Tensor
    host: NDArray[np.int32] | None
    starts: Tensor
    positions: Tensor
    slots: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, past: list[int], new: list[int], slots: list[int], device: torch.device | str = "cpu") -> Chunks:
        """The chunks of sequences in `slots`, copied to the device in one piece."""
        starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        host = np.stack([starts[:-1], np.array(past), np.array(new), np.array(slots)], 1).astype(np.int32)
        owner = np.repeat(np.arange(len(new)), new)
        positions = np.arange(starts[-1]) - starts[owner] + host[owner, 1]
        tiles = np.array([(c, q) for c, n in enumerate(new) for q in range(0, n, TILE_Q)], np.int32)
        parts = [host.ravel(), starts, positions.astype(np.int32), host[owner, 3], tiles.ravel()]
        packed = torch.from_numpy(np.concatenate(parts))
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        table, begin, place, slot, tile = packed.split([len(part) for part in parts])
        return cls(table.view(-1, 4), host, begin, place, slot, tile.view(-1, 2))


class Attention(Protocol):
    """A backend. `name` is recorded with every measurement."""

    name: str

    def warm(self, tokens: int) -> None:
        """Make ready for batches of up to `tokens` prompt tokens."""
        ...

    def decode(self, qkv: Tensor, layer: int, slots: Tensor) -> Tensor:
        """One new token for each of `slots`; `cache.lengths` are the tokens before it. [rows, heads * head_dim]."""
        ...

    def prefill(self, qkv: Tensor, layer: int, chunks: Chunks) -> Tensor:
        """The tokens of `chunks`; [tokens, heads * head_dim]. May overwrite `qkv`."""
        ...


class ReferenceAttention:
    """PyTorch's scaled_dot_product_attention, one sequence after another. The yardstick, and the CPU's backend."""

    name = "reference"

    def __init__(self, shape: ModelShape, cache: KVCache, rope: Tensor | None) -> None:
        self.shape, self.cache, self.rope = shape, cache, rope

    def warm(self, tokens: int) -> None:
        """Nothing to make ready."""

    def decode(self, qkv: Tensor, layer: int, slots: Tensor) -> Tensor:
        """See `Attention`."""
        past = self.cache.lengths[slots].tolist()
        return self.prefill(qkv, layer, Chunks.of(past, [1] * len(past), slots.tolist(), qkv.device))

    def prefill(self, qkv: Tensor, layer: int, chunks: Chunks) -> Tensor:
        """See `Attention`."""
        shape, cache = self.shape, self.cache
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        positions, slots = chunks.positions.long(), chunks.slots.long()
        if self.rope is not None:
            q, k = rotate(q, self.rope[positions]), rotate(k, self.rope[positions])
        blocks = cache.tables[slots, positions // cache.block_tokens].long()
        cache.k[layer][blocks, :, positions % cache.block_tokens] = k
        cache.v[layer][blocks, :, positions % cache.block_tokens] = v
        out = torch.empty(len(qkv), shape.heads, shape.head_dim, dtype=qkv.dtype, device=qkv.device)
        assert chunks.host is not None
        for start, past, new, slot in chunks.host.tolist():
            keys, values = (self._gather(x[layer], slot, past + new) for x in (cache.k, cache.v))
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

    def _gather(self, cached: Tensor, slot: int, tokens: int) -> Tensor:
        """The first `tokens` of a slot, contiguous; [kv_heads, tokens, head_dim]."""
        blocks = self.cache.tables[slot, : -(-tokens // self.cache.block_tokens)].long()
        return cached[blocks].transpose(0, 1).flatten(1, 2)[:, :tokens]


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of x [tokens, heads, head_dim] by `rope` [tokens, head_dim] (cosines | sines)."""
    half = x.shape[-1] // 2
    cos, sin = rope[:, None, :half], rope[:, None, half:]
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class TritonAttention:
    """Our kernels. Whole prompts in half precision go through torch's flash attention, which reads q, k, v where they are."""

    name = "triton"

    def __init__(self, shape: ModelShape, cache: KVCache, rope: Tensor | None, flash: bool = True) -> None:
        self.shape, self.cache, self.rope = shape, cache, rope
        self.scale = shape.head_dim**-0.5
        self.flash = flash and shape.dtype != "fp32"
        self._arrived = torch.zeros(len(cache.lengths), shape.kv_heads, dtype=torch.int32, device=cache.k.device)
        self._plan: Plan | None = None

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
        )

    def prefill(self, qkv: Tensor, layer: int, chunks: Chunks) -> Tensor:
        """See `Attention`."""
        shape, cache = self.shape, self.cache
        k, v = cache.k[layer], cache.v[layer]
        rope_write(qkv, k, v, cache.tables, chunks.positions, chunks.slots, self.rope, shape.heads)
        if self.flash and chunks.host is not None and not chunks.host[:, 1].any():
            return self._flash(qkv, chunks, chunks.host[:, 2])
        return paged_prefill(qkv, k, v, cache.tables, chunks.tiles, chunks.table, shape.heads, self.scale)

    def warm(self, tokens: int) -> None:
        """Have cuDNN plan every size of whole prompt up to `tokens`: a plan costs far more than its use."""
        for size in range(CUDNN_TOKENS, tokens + 1, CUDNN_STEP) if self.flash and self.cache.k.device.type == "cuda" else ():
            self._cudnn(
                torch.zeros(
                    size, self.shape.q_width + 2 * self.shape.kv_width, dtype=self.cache.k.dtype, device=self.cache.k.device
                )
            )

    def _flash(self, qkv: Tensor, chunks: Chunks, new: NDArray[np.int32]) -> Tensor:
        """Whole prompts: one long one by cuDNN (fastest on Hopper; planned by size, so padded), else FlashAttention-2."""
        tokens, most = len(qkv), int(new.max())
        if len(new) == 1 and tokens >= CUDNN_TOKENS:
            if surplus := -tokens % CUDNN_STEP:
                qkv = functional.pad(qkv, (0, 0, 0, surplus))  # causal: what follows a token does not reach it
            return self._cudnn(qkv)[:tokens]
        q, k, v = self._heads(qkv)
        starts = chunks.starts
        out = torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, most, most, 0.0, True, False, scale=self.scale)[
            0
        ]
        return out.reshape(tokens, -1)

    def _cudnn(self, qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in self._heads(qkv))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            grouped = self.shape.heads != self.shape.kv_heads
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out[0].transpose(0, 1).reshape(len(qkv), -1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        shape = self.shape
        return qkv.view(len(qkv), -1, shape.head_dim).split([shape.heads, shape.kv_heads, shape.kv_heads], 1)


BACKENDS = {"reference": ReferenceAttention, "triton": TritonAttention}


def choose(name: str, shape: ModelShape, cache: KVCache, rope: Tensor | None) -> Attention:
    """The backend called `name`; `auto` takes the best that this machine has.

    Raises InputError for a name that there is none of, or that cannot run here.
    """
    usable = triton_guard.AVAILABLE and cache.k.device.type == "cuda" and shape.head_dim & (shape.head_dim - 1) == 0
    if name == "auto":
        name = "triton" if usable else "reference"
    if name not in BACKENDS:
        raise InputError("engine", "attention", name, f"use auto or one of {', '.join(BACKENDS)}")
    if name == "triton" and not usable:
        raise InputError("engine", "attention", name, "needs Triton, a GPU and heads of a power of two: use reference")
    return BACKENDS[name](shape, cache, rope)
