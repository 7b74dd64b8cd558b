"""The interface of every hardware cost model: how long one operator of one decoder layer takes.

Three sources implement it (design.md, section 3): `roofline`, `published` tables and, once measured, `calibrated`
tables. An engine never asks for anything finer, so a new source is one class.

All times are seconds on **one GPU's share** of the work under tensor parallelism of degree `tp`; all sizes are
bytes or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Affine:
    """`base_s + slope_s * x` for x from `start` up to `end` (exclusive): one straight piece of a cost curve."""

    base_s: float
    slope_s: float
    end: float = math.inf

    def at(self, x: float) -> float:
        """Seconds at `x`."""
        return self.base_s + self.slope_s * x


@dataclass(frozen=True, slots=True)
class Chunk:
    """One prefill chunk: `tokens` new tokens whose sequence already holds `past` tokens in the KV cache."""

    tokens: int
    past: int = 0


class OperatorCosts(Protocol):
    """Seconds per operator, for one model shape on one GPU type at one tensor-parallel degree."""

    @property
    def source(self) -> str:
        """For a figure's footer: which model of the hardware this is, e.g. `roofline rtx3090, efficiencies of rtx4090`."""
        ...

    def layer_linear_s(self, tokens: int) -> float:
        """All token-wise operators of one decoder layer (projections, MLP, norms, rotary) on `tokens` tokens."""
        ...

    def head_s(self, sequences: int) -> float:
        """LM head and sampler for `sequences` rows of logits."""
        ...

    def embedding_s(self, tokens: int) -> float:
        """Token embedding and final norm, once per iteration."""
        ...

    def attention_s(self, chunks: Sequence[Chunk], decodes: int, decode_context: int) -> float:
        """One layer's attention over prefill `chunks` and `decodes` sequences that hold `decode_context` tokens in all."""
        ...

    def decode_attention(self, decodes: int, decode_context: int) -> Affine:
        """One layer's decode attention as a line in the batch's total context, valid from `decode_context` up to `end`.

        Equal to `attention_s((), decodes, x)` for every x in that range: this lets decode steps be advanced in closed form.
        """
        ...

    def all_reduce_s(self, size_bytes: int) -> float:
        """One all-reduce of `size_bytes` over the `tp` GPUs; 0 for `tp` 1."""
        ...
