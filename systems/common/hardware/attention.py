"""How FlashAttention-2 spreads a prefill over the GPU, in as much detail as its time needs.

The kernel that reads a paged KV cache cuts the new tokens of each head into tiles of 64 rows, and one thread block on
one streaming multiprocessor (SM) walks all keys that a tile sees. So a chunk of 16 tokens costs as much as one of 64, and a
small chunk behind a long past leaves most SMs idle. Both follow from counting tiles; a plain FLOP count misses them.
"""

from __future__ import annotations

from collections.abc import Sequence

from systems.common.hardware.cost import Chunk

TILE_ROWS = 64  # kBlockM of flash_fwd_splitkv, the kernel that FlashAttention-2 uses for paged KV


def keys_walked(chunks: Sequence[Chunk], heads: int, sms: int) -> int:
    """Keys that the busiest SM walks, one tile after another, when tiles are handed out in waves, longest first.

    Never less with one more chunk or one more token: the k-th longest tile only grows.
    """
    tiles = _tiles(chunks)
    if len(chunks) > 1:
        tiles.sort(reverse=True)
    return sum(tiles[first // heads] for first in range(0, len(tiles) * heads, sms))


def _tiles(chunks: Sequence[Chunk]) -> list[int]:
    """Keys seen by the last row of each tile of one head; each chunk's tiles from its end, where most keys are seen."""
    return [keys for chunk in chunks for keys in range(chunk.past + chunk.tokens, chunk.past, -TILE_ROWS)]
