"""The paged KV cache: the blocks on the device, and who holds which of them on the host.

The scheduler counts blocks (`state.free_blocks`); here each count gets an address. Block 0 belongs to nobody: rows that
only pad a CUDA graph write there.

The cache holds the model's own number format, or int8 with a float16 scale for each token and head (`rounded`): per token and
head head_dim + 2 bytes instead of 2 head_dim. A token attends to itself, and to its prompt, as the cache holds them, so that
prompts whole or in chunks, decode steps and recomputed prompts see the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from systems.common.models import ModelShape
from systems.common.torch_engine.numerics import DTYPES

Ints = NDArray[np.int32]
SCALE = torch.float16
"""Format of int8's scales: they are rounded before the numbers are divided by them, so a short format costs nothing."""


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [..., head_dim] as int8, and the scale [...] of each row: its largest number becomes 127."""
    scale = (x.float().abs().amax(-1) / 127).clamp_max(torch.finfo(SCALE).max).to(SCALE)
    step = scale.float()[..., None]
    whole = (x.float() / torch.where(step > 0, step, 1.0) + 0.5).floor_().clamp_(-127, 127)
    return whole.to(torch.int8), scale


def unrounded(whole: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that `rounded` gave, in `dtype`."""
    return (whole.float() * scale.float()[..., None]).to(dtype)


def token_bytes(shape: ModelShape, kv_dtype: str = "auto") -> int:
    """Bytes of the cache for one token over all layers of `shape` (a rank's own), scales included."""
    if kv_dtype == "auto":
        return shape.kv_bytes_per_token
    return 2 * shape.layers * shape.kv_heads * (shape.head_dim + SCALE.itemsize)


class BlockTables:
    """Which blocks each slot (a place for one running sequence) holds. Never gives one block to two slots.

    Attributes:
        tables: blocks by slot, in order of position; [slots + 1, width]. The last slot is the padding rows'.
        lengths: tokens that each slot has in the cache; the caller moves them.
        held: blocks that each slot holds.
    """

    def __init__(self, slots: int, blocks: int, width: int, block_tokens: int = 16) -> None:
        self.block_tokens = block_tokens
        self.blocks = blocks
        self.tables: Ints = np.zeros((slots + 1, width), np.int32)
        self.lengths: Ints = np.zeros(slots + 1, np.int32)
        self.held: Ints = np.zeros(slots + 1, np.int32)
        self._free = list(range(blocks, 0, -1))
        self._free_slots = list(range(slots - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        """Blocks that no slot holds."""
        return len(self._free)

    def take_slot(self) -> int:
        """A slot for one more sequence."""
        return self._free_slots.pop()

    def grow(self, slot: int, tokens: int) -> None:
        """Give `slot` the blocks that `tokens` tokens need in all. Raises IndexError when the pool is dry."""
        have, need = int(self.held[slot]), -(-tokens // self.block_tokens)
        if need > have:
            self.tables[slot, have:need] = [self._free.pop() for _ in range(need - have)]
            self.held[slot] = need

    def grow_one(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], Ints]:
        """Room for one more token in each of `slots`: flat places in `tables` that changed, and their new blocks."""
        full = slots[self.lengths[slots] == self.held[slots] * self.block_tokens]
        places = full * self.tables.shape[1] + self.held[full]
        blocks = np.array([self._free.pop() for _ in range(len(full))], np.int32)
        self.tables.reshape(-1)[places] = blocks
        self.held[full] += 1
        return places, blocks

    def release(self, slot: int) -> None:
        """Take back the slot and its blocks."""
        self._free.extend(self.tables[slot, : self.held[slot]].tolist())
        self.held[slot] = self.lengths[slot] = 0
        self._free_slots.append(slot)


class KVCache:
    """Keys and values of all layers on the device, with what decode steps read and move there.

    Attributes:
        k, v: [layers, blocks + 1, kv_heads, block_tokens, head_dim].
        k_scale, v_scale: their scales [layers, blocks + 1, kv_heads, block_tokens] where they are int8, else None.
        dtype: the model's number format.
        tables, lengths: the device's copies of `BlockTables`' (the last slot pads).
        last_token: newest token of each slot, the input of its next decode step.
    """

    def __init__(
        self,
        shape: ModelShape,
        slots: int,
        blocks: int,
        width: int,
        block_tokens: int = 16,
        device: torch.device | str = "cpu",
        kv_dtype: str = "auto",
    ) -> None:
        size = (shape.layers, blocks + 1, shape.kv_heads, block_tokens, shape.head_dim)
        self.dtype = DTYPES[shape.dtype]
        self.k = torch.zeros(size, dtype=self.dtype if kv_dtype == "auto" else torch.int8, device=device)
        self.v = torch.zeros_like(self.k)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if kv_dtype != "auto":
            self.k_scale = torch.zeros(size[:-1], dtype=SCALE, device=device)
            self.v_scale = torch.zeros_like(self.k_scale)
        self.tables = torch.zeros(slots + 1, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.pad_slot = slots
        self.block_tokens = block_tokens

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The scales of one layer's keys and values; None where there are none."""
        if self.k_scale is None or self.v_scale is None:
            return None
        return self.k_scale[layer], self.v_scale[layer]
