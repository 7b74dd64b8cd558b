"""How a measured engine pads its batches: a CUDA graph exists for some sizes only, and a batch takes the next larger one.

The measured engine records its sizes (`calibrate` writes them), the simulator pays for the padding.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Padding:
    """Sizes that have a graph; nothing is padded where there is none.

    Attributes:
        decode: batch sizes of decode steps.
        rows: numbers of decoding sequences in batches with prompts.
        tokens: prompt tokens in such batches.
        prompt_tokens: most prompt tokens that take a graph when nothing decodes beside.
        chunks: most prompt chunks in a graph; each is also a row of logits, used or not.
    """

    decode: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    chunks: int = 0

    def decode_rows(self, rows: int) -> int:
        """Rows that a decode step of `rows` sequences computes."""
        padded = _next(self.decode, rows)
        return rows if padded is None else padded

    def mixed(self, rows: int, tokens: int, chunks: int) -> tuple[int, int, int]:
        """Decoding rows, prompt tokens and rows of logits that a batch with prompts computes."""
        padded_rows, padded_tokens = _next(self.rows, rows), _next(self.tokens, tokens)
        limit = self.tokens[-1] if rows and self.tokens else self.prompt_tokens
        if padded_rows is None or padded_tokens is None or tokens > limit or chunks > self.chunks:
            return rows, tokens, rows + chunks
        return padded_rows, padded_tokens, padded_rows + self.chunks

    def is_graph(self, rows: int, tokens: int) -> bool:
        """Whether a graph has exactly these decoding rows and prompt tokens."""
        return rows in self.rows and tokens in self.tokens and tokens <= (self.tokens[-1] if rows else self.prompt_tokens)


def _next(sizes: tuple[int, ...], wanted: int) -> int | None:
    """The smallest of the sorted `sizes` that holds `wanted`; None where none does."""
    place = bisect_left(sizes, wanted)
    return None if place == len(sizes) else sizes[place]
