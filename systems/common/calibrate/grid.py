"""The points that a calibration measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from systems.common.torch_engine.graphs import MIXED_ROWS, buckets

AttentionPoint = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes to measure at.

    Attributes:
        tokens: tokens of a step, for token-wise operators.
        sequences: rows of logits.
        decodes, contexts: decoding sequences, and tokens that each holds.
        chunks, pasts: prompt chunks, and tokens cached before them.
        mixed_chunks, mixed_pasts, mixed_decodes, mixed_contexts: the same where both run in one step.
        step_rows, step_chunks, step_context: whole steps: decoding rows of that context, each with a prompt chunk beside.
        check_rows, check_contexts, check_batches: whole steps between those, which nothing is taken from.
        cached_tokens: most tokens in the cache at once.
    """

    tokens: tuple[int, ...]
    sequences: tuple[int, ...]
    decodes: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    pasts: tuple[int, ...]
    mixed_chunks: tuple[int, ...]
    mixed_pasts: tuple[int, ...]
    mixed_decodes: tuple[int, ...]
    mixed_contexts: tuple[int, ...]
    step_rows: tuple[int, ...]
    step_chunks: tuple[int, ...]
    step_context: int
    check_rows: tuple[int, ...]
    check_contexts: tuple[int, ...]
    check_batches: tuple[tuple[int, int, int, int], ...]
    cached_tokens: int

    def attention(self) -> Iterator[AttentionPoint]:
        """(chunk, past, decodes, context of each decode) of every attention point that fits into the cache."""
        points = [(0, 0, n, c) for n in self.decodes for c in self.contexts]
        points += [(chunk, past, 0, 0) for chunk in self.chunks for past in self.pasts]
        points += [(chunk, past, 0, 0) for chunk in self.mixed_chunks for past in self.mixed_pasts]
        points += [
            (chunk, past, n, c)
            for chunk in self.mixed_chunks
            for past in self.mixed_pasts
            for n in self.mixed_decodes
            for c in self.mixed_contexts
        ]
        for chunk, past, n, c in dict.fromkeys(points):
            if chunk + past + n * c <= self.cached_tokens:
                yield chunk, past, n, c


def full(cached_tokens: int, max_num_seqs: int = 512) -> Grid:
    """The grid of a large GPU."""
    decode = tuple(buckets(max_num_seqs))
    fine = (*range(32, 1025, 32), 1152, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192)
    return Grid(
        tokens=tuple(sorted({*decode, *fine})),
        sequences=tuple(sorted({1, 2, 4, 8, 16, *range(32, 257, 32), 384, 512})),
        decodes=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
        contexts=(16, 128, 256, 512, 1024, 2048, 4096, 8192),
        chunks=(16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192),
        pasts=(0, 512, 2048, 6144),
        mixed_chunks=(32, 128, 512, 1024, 2048),
        mixed_pasts=(0, 1024),
        mixed_decodes=(1, 16, 64, 128, 256),
        mixed_contexts=(128, 512, 2048),
        step_rows=MIXED_ROWS,
        step_chunks=(32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048, 4096),
        step_context=512,
        check_rows=(1, 3, 8, 32, 50, 128, 200, 256),
        check_contexts=(300, 700, 1500),
        check_batches=tuple(
            (n, 900, chunk, past) for n in (0, 20, 100) for chunk in (100, 300, 700, 1500) for past in (0, 600)
        ),
        cached_tokens=cached_tokens,
    )


def quick(cached_tokens: int, max_num_seqs: int = 512) -> Grid:
    """A thin grid for half a minute of GPU time: the one that reference/h200/calibrated was measured on."""
    return replace(
        full(cached_tokens, max_num_seqs),
        tokens=(1, 8, 32, 64, 128, 256, 512, 1024, 2048),
        sequences=(1, 32, 128, 256),
        decodes=(1, 8, 16, 32, 64, 96, 128, 256),
        contexts=(128, 512, 1024, 2048, 4096),
        chunks=(64, 256, 512, 1024, 2048, 4096),
        pasts=(0, 2048),
        mixed_chunks=(128, 512, 1024),
        mixed_pasts=(0,),
        mixed_decodes=(16, 64, 128),
        mixed_contexts=(512, 1024),
        step_chunks=(32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048),
        step_rows=(0, 16, 32, 48, 64, 80, 96, 128),
        check_rows=(50,),
        check_contexts=(700,),
        check_batches=((20, 900, 300, 0),),
    )


def small(cached_tokens: int) -> Grid:
    """A few points, for a CPU and a tiny shape."""
    points: dict[str, Any] = {
        "tokens": (1, 4, 16, 64), "sequences": (1, 4, 16), "decodes": (1, 4), "contexts": (16, 64), "chunks": (8, 32),
        "pasts": (0, 32), "mixed_chunks": (8,), "mixed_pasts": (0,), "mixed_decodes": (2,), "mixed_contexts": (16,),
        "step_rows": (0, 2), "step_chunks": (8, 16), "step_context": 16, "check_rows": (2,), "check_contexts": (20,),
        "check_batches": ((2, 20, 12, 0),),
    }  # fmt: skip
    return Grid(**points, cached_tokens=cached_tokens)
