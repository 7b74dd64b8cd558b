# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""RMSNorm with the residual add before it, forward and backward, the residual stream kept for the backward pass.

    forward    total = x + delta;  h = total / rms(total) * gain                x, delta, total, h: [tokens, width]
    backward   dx = (gain * dh - unit * mean(gain * dh * unit)) / rms + dres    unit = total / rms

The root mean square is computed again from `total`, which the backward pass reads anyway. Bytes floor: 4 * tokens * width *
size each way. One program per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _forward(x, delta, gain, total, h, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    live = at < width
    value = tl.load(x + row + at, mask=live, other=0.0)
    if ADD:
        value += tl.load(delta + row + at, mask=live, other=0.0)
        tl.store(total + row + at, value, mask=live)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    normed = (wide * scale).to(value.dtype) * tl.load(gain + at, mask=live, other=0.0)  # rounded as serving rounds
    tl.store(h + row + at, normed, mask=live)


@jit
def _backward(total, gain, dh, dres, dx, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    live = at < width
    wide = tl.load(total + row + at, mask=live, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    unit = wide * scale
    inner = tl.load(dh + row + at, mask=live, other=0.0).to(tl.float32) * tl.load(gain + at, mask=live, other=0.0).to(
        tl.float32
    )
    grad = (inner - unit * (tl.sum(inner * unit) / width)) * scale
    if ADD:
        grad += tl.load(dres + row + at, mask=live, other=0.0).to(tl.float32)
    tl.store(dx + row + at, grad.to(dx.dtype.element_ty), mask=live)


def norm_forward(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + delta` (x itself where `delta` is None) and its RMSNorm; contiguous [tokens, width]."""
    tokens, width = x.shape
    h = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _forward[(tokens,)](
        x, x if delta is None else delta, gain, total, h, width, eps, ADD=delta is not None, BLOCK=block, num_warps=8
    )
    return total, h


def norm_backward(total: Tensor, gain: Tensor, dh: Tensor, dres: Tensor | None, eps: float) -> Tensor:
    """Gradient of the norm's input, plus `dres`, which reached it past the norm."""
    tokens, width = total.shape
    dx = torch.empty_like(total)
    block = triton.next_power_of_2(width)
    _backward[(tokens,)](
        total, gain, dh, dh if dres is None else dres, dx, width, eps, ADD=dres is not None, BLOCK=block, num_warps=8
    )
    return dx
