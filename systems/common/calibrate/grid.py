"""The points that a calibration measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from systems.common.calibrate.steps import Batch
from systems.common.torch_engine.graphs import MIXED_ROWS, MIXED_TOKENS, PROMPT_TOKENS, buckets

AttentionPoint = tuple[int, int, int, int]
PromptsPoint = tuple[int, int, int, int]
"""Prompts, tokens of each, decoding sequences beside them, context of each."""
MOST_TOKENS = 8192
"""Prompt tokens of a step at most: the limit of the engine that is measured."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes to measure at.

    Attributes:
        tokens: tokens of a step, for token-wise operators.
        sequences: rows of logits.
        decodes, contexts: decoding sequences, and tokens that each holds.
        chunks, pasts: prompt chunks, and tokens cached before them.
        mixed_chunks, mixed_pasts, mixed_decodes, mixed_contexts: the same where both run in one step.
        prompts, prompt_tokens, prompt_rows, prompt_context: several whole prompts in a step, beside decoding sequences.
        step_rows, step_chunks, step_context: whole steps: decoding rows of that context, each with a prompt chunk beside.
        eager: whole steps that have no graph: decoding rows, and tokens in all.
        check: whole steps between those, which nothing is taken from; (rows, context, chunk, past, prompts), decode steps too.
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
    prompts: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    prompt_rows: int
    prompt_context: int
    step_rows: tuple[int, ...]
    step_chunks: tuple[int, ...]
    step_context: int
    eager: tuple[tuple[int, int], ...]
    check: tuple[Batch, ...]
    cached_tokens: int

    def attention(self) -> Iterator[list[AttentionPoint]]:
        """(chunk, past, decodes, context of each decode) of every attention point that fits into the cache.

        In groups that belong together: a curve is measured whole or not at all.
        """
        for n in self.decodes:
            yield self._fitting((0, 0, n, c) for c in self.contexts)
        for chunk in sorted({*self.chunks, *self.mixed_chunks}):
            pasts = {*(self.pasts if chunk in self.chunks else ()), *(self.mixed_pasts if chunk in self.mixed_chunks else ())}
            yield self._fitting((chunk, past, 0, 0) for past in sorted(pasts))
        for chunk in self.mixed_chunks:
            for past in self.mixed_pasts:
                yield self._fitting((chunk, past, n, c) for n in self.mixed_decodes for c in self.mixed_contexts)

    def _fitting(self, points: Iterator[AttentionPoint]) -> list[AttentionPoint]:
        return [point for point in points if point[0] + point[1] + point[2] * point[3] <= self.cached_tokens]

    def several(self) -> Iterator[PromptsPoint]:
        """Several prompts in one step: every number of them, one included, of every length."""
        held = self.prompt_rows * self.prompt_context
        for tokens in self.prompt_tokens:
            for prompts in self.prompts:
                if prompts * tokens <= MOST_TOKENS and prompts * tokens + held <= self.cached_tokens:
                    yield prompts, tokens, self.prompt_rows, self.prompt_context

    def steps(self) -> Iterator[Batch]:
        """Whole steps with one prompt chunk."""
        batches = [(rows, self.step_context, chunk, 0, 1) for rows in self.step_rows for chunk in self.step_chunks]
        batches = [b for b in batches if b[0] or b[2] <= PROMPT_TOKENS]  # larger prompts alone have no graph
        batches += [(rows, self.step_context, tokens - rows, 0, 1) for rows, tokens in self.eager]
        yield from (b for b in dict.fromkeys(batches) if self._holds(b))

    def checks(self) -> Iterator[Batch]:
        """The steps to check against that fit into the cache."""
        yield from (b for b in self.check if self._holds(b))

    def _holds(self, batch: Batch) -> bool:
        rows, context, chunk, past, prompts = batch
        return rows * (context + 8) + prompts * (chunk + past) <= self.cached_tokens


EAGER = (
    *((0, tokens) for tokens in (448, 512, 576, 704, 832, 960, 1024)),
    *((32, tokens) for tokens in (*range(1088, 3009, 128), *range(3264, 4033, 256), 4096, 5120, 6144, 8192)),
)
"""In the middle between two multiples of 128, where a tile of the products is half full, as it is on average."""


def full(cached_tokens: int, max_num_seqs: int = 512) -> Grid:
    """The grid of a large GPU."""
    decode = tuple(buckets(max_num_seqs))
    fine = (*range(32, 1025, 32), 1152, 1280, 1536, 1792, 2048, 3072, 4096, 8192)
    return Grid(
        tokens=tuple(sorted({*decode, *fine})),
        sequences=tuple(sorted({1, 2, 4, 8, 16, *range(32, 257, 32), 384, 512})),
        decodes=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
        contexts=(16, 128, 256, 512, 1024, 2048, 4096, 8192),
        chunks=(16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192),
        pasts=(0, 512, 2048, 6144),
        mixed_chunks=(128, 512, 1024, 32, 256, 2048),
        mixed_pasts=(0, 1024),
        mixed_decodes=(1, 16, 64, 128, 256),
        mixed_contexts=(128, 512, 1024, 2048),
        prompts=(1, 2, 3, 4, 8),
        prompt_tokens=(32, 64, 128, 256, 512, 1024),
        prompt_rows=16,
        prompt_context=512,
        step_rows=MIXED_ROWS,
        step_chunks=MIXED_TOKENS,
        step_context=512,
        eager=EAGER,
        check=(
            *((n, context, 0, 0, 0) for n in (1, 3, 8, 32, 50, 128, 200) for context in (300, 700, 1500)),
            *((n, 900, chunk, past, 1) for n in (0, 20, 100) for chunk in (100, 300, 700, 1500) for past in (0, 600)),
            *((40, 400, chunk, 0, prompts) for prompts in (2, 4, 8) for chunk in (60, 250, 400)),
        ),
        cached_tokens=cached_tokens,
    )


def quick(cached_tokens: int, max_num_seqs: int = 512) -> Grid:
    """A thin grid inside the full one, measured first: half a minute of GPU time, and alone a whole calibration."""
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
        prompts=(1, 2, 4, 8),
        prompt_tokens=(64, 256, 512),
        step_rows=(0, 16, 32, 48, 64, 96, 128),
        step_chunks=(32, 64, 128, 192, 256, 384, 512, 768, 1024),
        eager=((0, 512), (0, 1024), (32, 1088), (32, 1600), (32, 2112), (32, 3008), (32, 4096)),
        check=((50, 700, 0, 0, 0), (20, 900, 300, 0, 1), (40, 400, 250, 0, 4)),
    )


def small(cached_tokens: int) -> Grid:
    """A few points, for a CPU and a tiny shape."""
    points: dict[str, Any] = {
        "tokens": (1, 4, 16, 64), "sequences": (1, 4, 16), "decodes": (1, 4), "contexts": (16, 64), "chunks": (8, 32),
        "pasts": (0, 32), "mixed_chunks": (8,), "mixed_pasts": (0,), "mixed_decodes": (2,), "mixed_contexts": (16,),
        "prompts": (1, 2), "prompt_tokens": (8,), "prompt_rows": 2, "prompt_context": 16,
        "step_rows": (0, 2), "step_chunks": (8, 16), "step_context": 16, "eager": ((2, 20),),
        "check": ((2, 20, 0, 0, 0), (2, 20, 12, 0, 1), (2, 20, 12, 0, 2)),
    }  # fmt: skip
    return Grid(**points, cached_tokens=cached_tokens)
