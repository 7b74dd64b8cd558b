"""Weight-only quantisation: int8 with one scale per output, int4 with one per 128 inputs, both symmetric.

    int8: weight [outputs, inputs] int8, scale [outputs] float32                                w ~ weight * scale
    int4: weight [outputs, inputs / 2] uint8, scale [outputs, inputs / group] in the model's format

A byte of int4 holds two inputs of one group, both plus 8: byte j of a group of 128 has input j in its low half and input
64 + j in its high half, so a kernel reads both halves of x in one piece each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.errors import InputError
from systems.common.torch_engine.kernels import triton_guard
from systems.common.torch_engine.kernels.quant_linear import dequantised, quant_linear
from systems.common.torch_engine.kernels.quant_tilings import chosen
from systems.common.torch_engine.linear import Linear
from systems.common.torch_engine.placement import Span

GROUP = 128
DTYPES = ("int8", "int4")


@dataclass(slots=True, kw_only=True)
class Quantised(Linear):
    """A quantised matrix; `group` inputs share a scale (0: all). `library`: `weight` is torchao's (`torchao_products`)."""

    scale: Tensor
    group: int
    library: bool = False

    @property
    def inputs(self) -> int:
        """Inputs."""
        return int(self.weight.shape[1]) * (2 if self.group else 1)


def group_of(inputs: int, where: str = "weights") -> int:
    """How many of `inputs` inputs share a scale of int4: 128, or fewer where that does not divide them.

    Raises:
        InputError: no group of at least 32 divides them.
    """
    group = min(GROUP, inputs & -inputs)
    if group < 32:
        raise InputError(where, "dtype", "int4", f"a matrix has {inputs} inputs, no multiple of 32: use int8")
    return group


def quantise(weight: Tensor, bias: Tensor | None, dtype: str) -> Quantised:
    """Quantise a dense matrix [outputs, inputs], rounding to nearest.

    Raises:
        InputError: `dtype` is none of `DTYPES`, or the matrix cannot be grouped.
    """
    if dtype not in DTYPES:
        raise InputError("weights", "dtype", dtype, f"use one of {', '.join(DTYPES)}, or leave it out for the model's own")
    outputs, inputs = weight.shape
    group = 0 if dtype == "int8" else group_of(inputs)
    wide = weight.float().view(outputs, -1, group or inputs)
    scale = wide.abs().amax(-1) / (7 if group else 127)
    scale = torch.where(scale > 0, scale, 1.0).to(weight.dtype if group else torch.float32)
    whole = (wide / scale.float()[..., None]).round_().clamp_(-8 if group else -127, 7 if group else 127)
    if not group:
        return Quantised(whole.view(outputs, inputs).to(torch.int8), bias, scale=scale[:, 0].contiguous(), group=0)
    low, high = (whole + 8).to(torch.uint8).chunk(2, -1)
    return Quantised((low | (high << 4)).reshape(outputs, -1), bias, scale=scale, group=group)


def dequantise(layer: Quantised, dtype: torch.dtype) -> Tensor:
    """The dense matrix [outputs, inputs] in `dtype`: the reference."""
    if not layer.group:
        return (layer.weight.float() * layer.scale[:, None]).to(dtype)
    halves = layer.weight.view(len(layer.weight), -1, layer.group // 2)
    whole = torch.cat([halves & 15, halves >> 4], -1).float() - 8
    return (whole * layer.scale.float()[..., None]).view(len(layer.weight), -1).to(dtype)


def part(layer: Quantised, outputs: Span | None, inputs: Span | None) -> Quantised:
    """Some outputs, or some inputs (whole groups of them), of a matrix.

    Raises:
        InputError: the inputs cut a group of int4.
    """
    weight, scale = layer.weight, layer.scale
    if outputs is not None:
        weight, scale = weight[outputs.begin : outputs.end], scale[outputs.begin : outputs.end]
    if inputs is not None:
        if group := layer.group:
            if inputs.begin % group or inputs.end % group:
                mend = f"inputs {inputs.begin} to {inputs.end} of a matrix cut a group of {group}: use fewer tp ranks, or int8"
                raise InputError("weights", "dtype", "int4", mend)
            scale = scale[:, inputs.begin // group : inputs.end // group]
        halved = 2 if layer.group else 1
        weight = weight[:, inputs.begin // halved : inputs.end // halved]
    return Quantised(weight.clone(), layer.bias, scale=scale.clone(), group=layer.group)


def joined(parts: list[Quantised]) -> Quantised:
    """Matrices of the same inputs one below the other."""
    bias = torch.cat([p.bias for p in parts if p.bias is not None]) if parts[0].bias is not None else None
    scale = torch.cat([p.scale for p in parts])
    return Quantised(torch.cat([p.weight for p in parts]), bias, scale=scale, group=parts[0].group)


def linear(x: Tensor, layer: Linear) -> Tensor:
    """The product x @ weight.T + bias for a dense or a quantised layer.

    On a GPU rows as many as there is a tiling for read the quantised weight as it is; more make it dense first and use cuBLAS.
    """
    if not isinstance(layer, Quantised) or layer.library:
        return functional.linear(x, layer.weight, layer.bias)
    if not (triton_guard.AVAILABLE and x.is_cuda):
        return functional.linear(x, dequantise(layer, x.dtype), layer.bias)
    if chosen(len(x), layer.group) is not None:
        return quant_linear(x, layer.weight, layer.scale, layer.group, bias=layer.bias)
    return functional.linear(x, dequantised(layer.weight, layer.scale, layer.group, x.dtype), layer.bias)
