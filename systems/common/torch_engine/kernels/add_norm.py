# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Residual add and RMSNorm in one pass.

    x <- x + delta;  h = x / rms(x) * weight          x, delta, h: [tokens, hidden]

Bytes floor: read x and delta, write x and h: 4 * tokens * hidden * size (without `delta`: 2 *). One program per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _add_norm(x, delta, weight, h, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    live = at < width
    value = tl.load(x + row + at, mask=live, other=0.0)
    if ADD:
        value += tl.load(delta + row + at, mask=live, other=0.0)
        tl.store(x + row + at, value, mask=live)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    gain = tl.load(weight + at, mask=live, other=0.0)
    normed = (wide * scale).to(value.dtype) * gain  # rounded before the gain, as transformers does
    tl.store(h + row + at, normed, mask=live)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `x` in place (unless None) and return the RMSNorm of the sum."""
    tokens, width = x.shape
    h = torch.empty_like(x)
    _add_norm[(tokens,)](
        x,
        x if delta is None else delta,
        weight,
        h,
        width,
        eps,
        ADD=delta is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    return h
