"""The elementwise operations of tuning, forward and backward: Triton kernels on a GPU, plain PyTorch elsewhere.

The plain versions are the same formulas in float32 (float64 for float64 inputs); tests hold both against autograd in float64.
Products with frozen weights need no function here: their backward pass is another product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.torch_engine.kernels import triton_guard
from systems.common.torch_engine.kernels.swiglu import swiglu as swiglu_kernel
from systems.llmstation.training.kernels import cross_entropy as cross_entropy_kernel
from systems.llmstation.training.kernels import norm as norm_kernels
from systems.llmstation.training.kernels import rope as rope_kernels
from systems.llmstation.training.kernels import swiglu as swiglu_kernels


def kernels(x: Tensor) -> bool:
    """Whether Triton serves tensors like `x`."""
    return x.is_cuda and triton_guard.AVAILABLE


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def norm_forward(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream `x + delta` (x where `delta` is None) and its RMSNorm; [tokens, width]."""
    if kernels(x):
        return norm_kernels.norm_forward(x, delta, gain, eps)
    total = x if delta is None else x + delta
    floats = wide(total)
    return total, gain * (floats * torch.rsqrt(floats.square().mean(-1, keepdim=True) + eps)).to(total.dtype)


def norm_backward(total: Tensor, gain: Tensor, dh: Tensor, dres: Tensor | None, eps: float) -> Tensor:
    """Gradient of the norm's input `total` from that of its output, plus `dres`, which reached it past the norm."""
    if kernels(total):
        return norm_kernels.norm_backward(total, gain, dh, dres, eps)
    floats = wide(total)
    scale = torch.rsqrt(floats.square().mean(-1, keepdim=True) + eps)
    unit, inner = floats * scale, wide(dh) * wide(gain)
    grad = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * scale
    return (grad if dres is None else grad + wide(dres)).to(total.dtype)


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of gate | up; [tokens, width]."""
    if kernels(both):
        return swiglu_kernel(both)
    gate, up = both.chunk(2, -1)
    return functional.silu(gate) * up


def swiglu_backward(both: Tensor, dout: Tensor) -> Tensor:
    """Gradient of gate | up."""
    if kernels(both):
        return swiglu_kernels.swiglu_backward(both, dout)
    gate, up = (wide(half) for half in both.chunk(2, -1))
    s, grad = torch.sigmoid(gate), wide(dout)
    return torch.cat([grad * up * s * (1 + gate * (1 - s)), grad * gate * s], -1).to(both.dtype)


def rope_forward(qkv: Tensor, rope: Tensor, length: int, start: int, heads: int) -> None:
    """Rotate the first `heads` heads of each row in place; row t sits at position start + t % length of its sequence."""
    if kernels(qkv):
        rope_kernels.rope_forward(qkv, rope, length, start, heads)
        return
    head_dim = rope.shape[1]
    turned = qkv[:, : heads * head_dim].view(-1, length, heads, head_dim)
    turned.copy_(_rotate(turned, rope[start : start + length, None], 1))


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, rope: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """Dqkv [batch * length, all heads * head_dim] from gradients [batch, heads, length, head_dim] after the rotation."""
    if kernels(dq):
        return rope_kernels.rope_backward(dq, dk, dv, rope, start, dtype)
    angles = rope[start : start + dq.shape[2], None]
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    packed = torch.cat([_rotate(dq, angles, -1).to(dtype), _rotate(dk, angles, -1).to(dtype), dv.to(dtype)], 2)
    return packed.flatten(0, 1).flatten(1)


def _rotate(x: Tensor, angles: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = angles[..., :half], sign * angles[..., half:]
    a, b = wide(x[..., :half]), wide(x[..., half:])
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def cross_entropy_(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross entropy of each row [rows], float32; `logits` becomes its gradient. Weight 0 leaves a row out."""
    if kernels(logits):
        return cross_entropy_kernel.cross_entropy_(logits, target, weight)
    floats = wide(logits)
    wanted = torch.where(weight > 0, target, 0)[:, None]
    log_sum = torch.logsumexp(floats, -1, keepdim=True)
    loss = weight * (log_sum - floats.gather(1, wanted))[:, 0]
    grad = torch.exp(floats - log_sum)
    grad.scatter_add_(1, wanted, torch.full_like(log_sum, -1))
    logits.copy_(grad * weight[:, None])
    return loss


def product_into(target: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """`a @ b` stored in (or added to) the float32 `target`, without a rounding to half precision where torch can do that."""
    product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and _widens(a.device, a.dtype) else torch.mm(a, b)
    if add:
        target += product
    else:
        target.copy_(product)


@cache
def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of half-precision matrices can be had in float32 here."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    x = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return torch.mm(x.T, x, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError, NotImplementedError):
        return False
