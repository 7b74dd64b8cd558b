"""Block tables and lengths as the device has them, known on the host too: for backends that plan their kernels there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


class Mirror:
    """What the device's tables hold once all that was launched has run.

    Attributes:
        tables: blocks by slot, in order of position; [slots + 1, width].
        lengths: tokens that each slot has in the cache.
        rows: slots of the decoding rows, padded with the padding slot.
        block_tokens: tokens per block.
    """

    def __init__(self, slots: int, width: int, block_tokens: int) -> None:
        self.tables: Ints = np.zeros((slots + 1, width), np.int32)
        self.lengths: Ints = np.zeros(slots + 1, np.int32)
        self.rows: NDArray[np.int64] = np.full(slots, slots, np.int64)
        self.block_tokens = block_tokens

    @property
    def pad_slot(self) -> int:
        """The slot of rows that only pad: one block, that of nobody."""
        return len(self.lengths) - 1

    def stepped(self, rows: int) -> None:
        """A decode step of the first `rows` rows has been launched."""
        slots = self.rows[:rows]
        self.lengths[slots[slots != self.pad_slot]] += 1

    def moved(self, slots: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """A batch with prompts has been launched, after which `slots` have `lengths`."""
        self.lengths[slots] = lengths
        self.lengths[-1] = 0

    def pages(self, slots: NDArray[np.int64], tokens: Ints) -> tuple[Ints, Ints, Ints]:
        """The first blocks of each slot, as many as hold `tokens` (at least one).

        Returns:
            Where each slot's blocks begin in the list of all, and its end; that list; tokens in each slot's last block.
        """
        tokens = np.maximum(tokens, 1)
        counts = -(-tokens // self.block_tokens)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        place = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        blocks = self.tables[np.repeat(slots, counts), place]
        return starts, blocks, (tokens - (counts - 1) * self.block_tokens).astype(np.int32)
