# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Products with quantised weights by torchao, where it is installed: another backend behind `quantised.linear`.

The integers and scales are ours (`quantised.quantise`), handed over to torchao's tensors, so that both backends compute the
same matrix, whatever the ranks (read from torchao 0.18.0):

* int8: `Int8Tensor`, whose product is x @ integers.T, dense ones made for each product, times the scales in x's format;
* int4: `Int4TilePackedTo4dTensor`, PyTorch's tinygemm kernels; a GPU and bf16 only. Inputs are padded to 1,024.
"""

from __future__ import annotations

from importlib import import_module, util

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.errors import InputError
from systems.common.torch_engine.kernels import triton_guard
from systems.common.torch_engine.quantised import Quantised
from systems.common.torch_engine.weights import Weights

BACKENDS = ("triton", "torchao")
"""What `auto` tries, in this order, before plain PyTorch (`dense`: the matrix is made dense for every product). Our kernels
come first because torchao's int8 makes a dense matrix for every product: that alone takes 70 us for the largest of Llama-2-7B's
on an H200, our whole product at 16 rows 37 us. Its int4 has not been measured (`benchmarks/parallel.py --parts torchao`)."""
STEP, TILES = 1024, 8
"""Inputs that tinygemm's packing wants a multiple of, and how many of its inner tiles lie together."""
SITES = ("qkv", "o", "up", "down")


def apply(name: str, weights: Weights) -> str:
    """Make the quantised `weights` ready for the backend called `name` (auto, triton or torchao), in place; the one taken.

    `dense` where `auto` finds none that can run here, `none` where the weights are not quantised.

    Raises:
        InputError: there is no such backend, or it cannot run here.
    """
    if name not in ("auto", *BACKENDS):
        raise InputError("engine", "quantised", name, f"use auto or one of {', '.join(BACKENDS)}")
    layers = [getattr(layer, site) for layer in weights.layers for site in SITES]
    held = [layer for layer in layers if isinstance(layer, Quantised)]
    if not held:
        return "none"
    x = weights.layers[0].norm1.gain
    lacking = {one: lacks(one, held[0], x) for one in BACKENDS}
    if name == "auto":
        name = next((one for one in BACKENDS if lacking[one] is None), "dense")
    elif (lack := lacking[name]) is not None:
        raise InputError("engine", "quantised", name, f"needs {lack}: use auto")
    if name == "torchao":
        for layer in weights.layers:
            for site in SITES:
                setattr(layer, site, handed_over(getattr(layer, site), x.dtype))
    return name


def lacks(name: str, layer: Quantised, x: Tensor) -> str | None:
    """What backend `name` would need for `layer` and activations like `x`; None where it can run."""
    if name == "triton":
        return None if triton_guard.AVAILABLE and x.is_cuda else "Triton and a GPU"
    if util.find_spec("torchao") is None:
        return "the package torchao"
    if layer.group and not (x.is_cuda and x.dtype == torch.bfloat16):
        return "a GPU and bf16 for int4"
    return None


def handed_over(layer: Quantised, dtype: torch.dtype) -> Quantised:
    """`layer` with torchao's tensor as its weight, for activations of `dtype`."""
    library = import_module("torchao.quantization")
    inputs, outputs = layer.inputs, len(layer.weight)
    if not layer.group:
        weight = library.Int8Tensor(layer.weight, layer.scale[:, None], [1, inputs], dtype)
        return Quantised(weight, layer.bias, scale=weight.scale, group=0, library=True)
    whole, scale_and_zero = tinygemm(layer)
    packed = torch.ops.aten._convert_weight_to_int4pack((whole[:, ::2] << 4 | whole[:, 1::2]).contiguous(), TILES)
    weight = library.Int4TilePackedTo4dTensor(packed, scale_and_zero, [1, layer.group], torch.Size((outputs, inputs)))
    return Quantised(weight, layer.bias, scale=scale_and_zero, group=layer.group, library=True)


def tinygemm(layer: Quantised) -> tuple[Tensor, Tensor]:
    """An int4 layer as tinygemm has it: integers 0 to 15 [outputs, inputs, padded], scales and zeros [groups, outputs, 2].

    A weight is (integer - 8) * scale + zero; our zeros are 0.
    """
    halves = layer.weight.view(len(layer.weight), -1, layer.group // 2)
    whole = torch.cat([halves & 15, halves >> 4], -1).view(len(layer.weight), -1)
    surplus = -layer.inputs % STEP
    whole = functional.pad(whole, (0, surplus), value=8)
    scale = functional.pad(layer.scale, (0, surplus // layer.group), value=1)
    return whole, torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
