"""vLLM + torchtune: two processes under NVIDIA MPS, two copies of the base weights (sheet 3).

The thread percentage caps torchtune only: it is exported after vLLM has started. torchtune trains with FSDP over the
GPUs that vLLM serves with tensor parallelism, packed samples of 512 tokens, activation checkpointing on.
"""

from __future__ import annotations

from dataclasses import dataclass

from systems.common.errors import InputError


@dataclass(frozen=True, slots=True)
class Mps:
    """Knob: `thread_percentage`, torchtune's `CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`, 1 to 100."""

    thread_percentage: float
    gpu_memory_utilisation: float = 0.45
    sequence_tokens: int = 512

    def __post_init__(self) -> None:
        """Raises InputError for a percentage that MPS would refuse."""
        if not 1 <= self.thread_percentage <= 100:
            raise InputError("llmstation", "thread_percentage", self.thread_percentage, "give 1 to 100")

    @property
    def sm_limit(self) -> float:
        """Share of the SMs that torchtune may use."""
        return self.thread_percentage / 100
