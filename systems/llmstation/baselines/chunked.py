"""Chunked training (FlexLLM-style), the lossy variant of Figures 8, 9, 10 and 13 (sheet 3).

Stock torchtune on packed sequences as long as one chunk, so no attention across chunks, beside vLLM with no thread
limit; throughput is still counted per 512 tokens. The precise variant of Figure 4 is `tuning_cost.precise_chunks_s`.
"""

from __future__ import annotations

from dataclasses import dataclass

from systems.common.errors import InputError


@dataclass(frozen=True, slots=True)
class Chunked:
    """Knob: `chunk_tokens`, the length of the sequences that torchtune packs."""

    chunk_tokens: int
    gpu_memory_utilisation: float = 0.45

    def __post_init__(self) -> None:
        """Raises InputError for an empty chunk."""
        if self.chunk_tokens < 1:
            raise InputError("llmstation", "chunk_tokens", self.chunk_tokens, "give at least 1 token")
