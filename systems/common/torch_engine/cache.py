"""The paged KV cache: the blocks on the device, and who holds which of them on the host.

The scheduler counts blocks (`state.free_blocks`); here each count gets an address. Block 0 belongs to nobody: rows that
only pad a CUDA graph write there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from systems.common.models import ModelShape
from systems.common.torch_engine.numerics import DTYPES

Ints = NDArray[np.int32]


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
        tables, lengths: the device's copies of `BlockTables`' (the last slot pads).
        last_token: newest token of each slot, the input of its next decode step.
    """

    def __init__(
        self, shape: ModelShape, slots: int, blocks: int, width: int, block_tokens: int = 16, device: torch.device | str = "cpu"
    ) -> None:
        size = (shape.layers, blocks + 1, shape.kv_heads, block_tokens, shape.head_dim)
        self.k = torch.zeros(size, dtype=DTYPES[shape.dtype], device=device)
        self.v = torch.zeros_like(self.k)
        self.tables = torch.zeros(slots + 1, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.pad_slot = slots
        self.block_tokens = block_tokens
