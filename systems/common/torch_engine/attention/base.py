# mypy: disable-error-code="no-untyped-call"
"""The interface of attention backends, and prompt chunks as they take them.

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

from systems.common.models import ModelShape
from systems.common.torch_engine.attention.mirror import Mirror
from systems.common.torch_engine.kernels.paged_prefill import TILE_Q


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
    """A backend.

    Attributes:
        name: recorded with every measurement.
        graphs: whether CUDA graphs can hold it in decode steps, and in batches with prompts.
        mirror: what the backend must know on the host before each step, kept by the caller; None where it plans on the device.
    """

    name: str
    graphs: tuple[bool, bool]
    mirror: Mirror | None

    def warm(self, tokens: int) -> None:
        """Make ready for batches of up to `tokens` prompt tokens."""
        ...

    def plan(self, rows: int, graph: bool) -> None:
        """Before a decode step of the first `rows` of `mirror.rows`, those that pad included; only with a mirror."""
        ...

    def decode(self, qkv: Tensor, layer: int, slots: Tensor) -> Tensor:
        """One new token for each of `slots`; `cache.lengths` are the tokens before it. [rows, heads * head_dim]."""
        ...

    def prefill(self, qkv: Tensor, layer: int, chunks: Chunks) -> Tensor:
        """The tokens of `chunks`; [tokens, heads * head_dim]. May overwrite `qkv`."""
        ...


def heads_of(qkv: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """Views of q, k and v, each [tokens, its heads, head_dim]."""
    return qkv.view(len(qkv), -1, shape.head_dim).split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
