"""Serving alone: the floor of every latency and the reference for saturation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InferenceOnly:
    """No knob. `gpu_memory_utilisation` is vLLM's default."""

    gpu_memory_utilisation: float = 0.90
