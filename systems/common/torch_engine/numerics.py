"""The numbers of a model that its shape table leaves out: norm epsilon, rotary base and scaling, position offset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.models import ModelShape

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling (its `rope_scaling` of type `llama3`)."""

    factor: float = 8.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class Numerics:
    """`eps` of the norms; rotary base `theta` and its `scaling`; `position_offset` into a learned position table."""

    eps: float = 1e-5
    theta: float = 10_000.0
    scaling: Llama3Scaling | None = None
    position_offset: int = 0


_LLAMA3 = Numerics(theta=500_000.0, scaling=Llama3Scaling())
# Sources: each model's config.json on the Hugging Face hub; OPT keeps two rows of its position table for padding.
NUMERICS: Mapping[str, Numerics] = {
    "llama-3.1-8b": _LLAMA3,
    "llama-3.1-70b": _LLAMA3,
    "opt-6.7b": Numerics(position_offset=2),
    "qwen2-0.5b": Numerics(eps=1e-6, theta=1_000_000.0),
}


def numerics(shape: ModelShape) -> Numerics:
    """The numbers of `shape`, by its name; defaults for a name that has none."""
    return NUMERICS.get(shape.name, Numerics())


def rope_table(head_dim: int, positions: int, given: Numerics, device: torch.device | str = "cpu") -> Tensor:
    """Cosines | sines [positions, head_dim] in float32, half each (transformers' `rotate_half` convention)."""
    inverse = given.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if (s := given.scaling) is not None:
        wavelength = 2 * math.pi / inverse
        smooth = (s.original_positions / wavelength - s.low_factor) / (s.high_factor - s.low_factor)
        smooth = smooth.clamp(0, 1)  # 0: long wavelengths, slowed by `factor`; 1: short ones, kept
        inverse = inverse * ((1 - smooth) / s.factor + smooth)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return torch.cat([angle.cos(), angle.sin()], -1).to(torch.float32).to(device).contiguous()
