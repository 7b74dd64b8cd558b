# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Batches with prompt chunks: their inputs as one array, laid out the same way eagerly and in a CUDA graph.

A batch of `rows` decoding sequences and `chunks` prompt chunks of `tokens` tokens in all is described by one int64 array, so
one copy brings it to the device. For a graph the batch is padded to a bucket: padding rows and tokens belong to the padding
slot, padding chunks have no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from systems.common.torch_engine.attention import Chunks
from systems.common.torch_engine.cache import KVCache
from systems.common.torch_engine.kernels.paged_prefill import TILE_Q
from systems.common.torch_engine.model import Transformer

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of a batch: decoding rows, prompt tokens, chunks; `tiles` of queries are enough for any chunks of these sizes."""

    rows: int
    tokens: int
    chunks: int

    @property
    def tiles(self) -> int:
        """Tiles of queries: a chunk wastes less than one."""
        return self.tokens // TILE_Q + self.chunks

    @property
    def sizes(self) -> list[int]:
        """Lengths of the parts of the array, in the order of `Inputs`."""
        answers = self.rows + self.chunks
        return [
            self.tokens,
            self.rows,
            self.tokens,
            self.tokens,
            4 * (self.chunks + 1),
            self.chunks + 1,
            2 * self.tiles,
            *[answers] * 4,
        ]

    @property
    def length(self) -> int:
        """Length of the array: each part begins on a multiple of 16 bytes, lest Triton compile a kernel for every alignment."""
        return sum(_even(size) for size in self.sizes)


def _even(size: int) -> int:
    return size + size % 2


@dataclass(frozen=True, slots=True)
class Inputs:
    """The parts of the array on the device.

    Attributes:
        prompt: tokens of the chunks.
        row_slots: slots of the decoding rows.
        chunks: the chunks (see `attention.Chunks`).
        keep: tokens whose logits are wanted: the rows, then the last one of each chunk.
        answered: slot whose newest token each of them gives; the padding slot where the prompt goes on.
        moved, lengths: slots, and their lengths after the batch.
    """

    prompt: Tensor
    row_slots: Tensor
    chunks: Chunks
    keep: Tensor
    answered: Tensor
    moved: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, packed: Tensor, bucket: Bucket, host: NDArray[np.int32] | None) -> Inputs:
        """Views of `packed`; `host` is the chunk table where the batch is known on the host (not so in a graph)."""
        rooms = packed[: bucket.length].split([_even(size) for size in bucket.sizes])
        parts = [room[:size] for room, size in zip(rooms, bucket.sizes, strict=True)]
        prompt, rows, positions, slots, table, starts, tiles, keep, answered, moved, lengths = parts
        chunks = Chunks(table.view(-1, 4), host, starts.to(torch.int32), positions, slots, tiles.view(-1, 2))
        return cls(prompt, rows, chunks, keep, answered, moved, lengths.to(torch.int32))


def pack(
    bucket: Bucket,
    prompts: list[Ints],
    rows: Ints,
    row_lengths: Ints,
    past: Ints,
    slots: Ints,
    ended: NDArray[np.bool_],
    pad_slot: int,
) -> Ints:
    """The array of one batch.

    Args:
        bucket: sizes to pad to.
        prompts: new tokens of each chunk.
        rows: slots of the decoding sequences.
        row_lengths: their lengths after the batch.
        past: per chunk, tokens cached before.
        slots: per chunk, its sequence's slot.
        ended: per chunk, whether its prompt ends with it.
        pad_slot: slot of everything that pads.
    """
    new = np.array([len(prompt) for prompt in prompts], np.int64)
    count, total = len(prompts), int(new.sum())
    starts = np.full(bucket.chunks + 1, total, np.int64)
    starts[0], starts[1 : count + 1] = 0, np.cumsum(new)
    owner = np.repeat(np.arange(count), new)
    table = np.zeros((bucket.chunks + 1, 4), np.int64)
    table[:, 3] = pad_slot
    table[:count] = np.stack([starts[:count], past, new, slots], 1)
    pieces = -(-new // TILE_Q)
    tiles = np.zeros((bucket.tiles, 2), np.int64)
    tiles[:, 0] = bucket.chunks  # a chunk without tokens
    used = int(pieces.sum())
    tiles[:used, 0] = np.repeat(np.arange(count), pieces)
    tiles[:used, 1] = (np.arange(used) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * TILE_Q

    def padded(values: Ints, size: int, filler: int = 0) -> Ints:
        return np.concatenate([values, np.full(size - len(values), filler, np.int64)])

    def both(row_values: Ints, chunk_values: Ints, filler: int) -> Ints:
        return np.concatenate([padded(row_values, bucket.rows, filler), padded(chunk_values, bucket.chunks, filler)])

    parts = [
        padded(np.concatenate(prompts), bucket.tokens),
        padded(rows, bucket.rows, pad_slot),
        padded(np.arange(total) - starts[owner] + past[owner], bucket.tokens),
        padded(slots[owner], bucket.tokens, pad_slot),
        table.ravel(),
        starts,
        tiles.ravel(),
        both(np.arange(len(rows)), np.maximum(bucket.rows + starts[1 : count + 1] - 1, 0), 0),
        both(rows, np.where(ended, slots, pad_slot), pad_slot),
        both(rows, slots, pad_slot),
        both(row_lengths, past + new, 0),
    ]
    return np.concatenate([padded(part, _even(len(part))) for part in parts])


def nothing(bucket: Bucket, pad_slot: int) -> Ints:
    """The array of a batch of padding alone."""
    none = np.empty(0, np.int64)
    return pack(bucket, [none], none, none, np.zeros(1, np.int64), np.array([pad_slot]), np.zeros(1, np.bool_), pad_slot)


@dataclass(slots=True)
class MixedStep:
    """What a batch gives: `logits` and likeliest `tokens` of `keep`, and where each token belongs.

    On a pipeline stage before the last: `logits` is the residual stream of all tokens, `tokens` is empty.
    """

    logits: Tensor
    tokens: Tensor
    answered: Tensor


def mixed_step(model: Transformer, cache: KVCache, inputs: Inputs, greedy: bool, hidden: Tensor | None = None) -> MixedStep:
    """Run one batch; moves the lengths, and commits the tokens when `greedy`. `hidden` as in `Transformer.forward`."""
    tokens = torch.cat([cache.last_token[inputs.row_slots], inputs.prompt])
    positions = None
    if model.shape.positions:
        positions = torch.cat([cache.lengths[inputs.row_slots].long(), inputs.chunks.positions])
    out = model.forward(tokens, positions, inputs.row_slots, inputs.chunks, inputs.keep, hidden)
    cache.lengths.index_copy_(0, inputs.moved, inputs.lengths)
    if not model.links.last:
        return MixedStep(out, inputs.answered[:0], inputs.answered)
    chosen = model.likeliest(out)
    if greedy:
        cache.last_token.index_copy_(0, inputs.answered, chosen)
    return MixedStep(out, chosen, inputs.answered)
