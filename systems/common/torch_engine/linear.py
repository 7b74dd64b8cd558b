"""A linear layer's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Linear:
    """A matrix [outputs, inputs] and its bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None
