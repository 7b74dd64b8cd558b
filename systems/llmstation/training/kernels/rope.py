# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Rotary embedding of whole sequences: forward in place, backward while packing attention's gradients side by side.

    forward    q, k <- R(position) q, k                      within qkv: [tokens, (heads + 2 kv_heads) * head_dim]
    backward   dqkv = R(-position) dq | R(-position) dk | dv

Row t is token t % length of its sequence, at position start + t % length. dq, dk, dv are [batch, heads, length, head_dim] in
any layout whose head_dim is contiguous. Bytes floor: 2 * tokens * (q + k) * size forward, 2 * tokens * (q + k + v) * size
backward. One program per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _forward(qkv, rope, length, start, row_width, HEADS: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    position = start + token % length
    low = tl.arange(0, D // 2)[None, :]
    head = tl.arange(0, PAD)[:, None]
    live = head < HEADS
    at = qkv + token * row_width + head * D + low
    a = tl.load(at, mask=live, other=0.0)
    b = tl.load(at + D // 2, mask=live, other=0.0)
    cos = tl.load(rope + position * D + low)
    sin = tl.load(rope + position * D + D // 2 + low)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    tl.store(at, (wide_a * cos - wide_b * sin).to(a.dtype), mask=live)
    tl.store(at + D // 2, (wide_b * cos + wide_a * sin).to(a.dtype), mask=live)


@jit
def _turn_back(source, sequence, place, batch_stride, head_stride, row_stride, target, cos, sin,
               HEADS: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    low = tl.arange(0, D // 2)[None, :]
    head = tl.arange(0, PAD)[:, None]
    live = head < HEADS
    at = source + sequence * batch_stride + head * head_stride + place * row_stride + low
    a = tl.load(at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(at + D // 2, mask=live, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    to = target + head * D + low
    if ROPE:
        tl.store(to, (a * cos + b * sin).to(dtype), mask=live)
        tl.store(to + D // 2, (b * cos - a * sin).to(dtype), mask=live)
    else:
        tl.store(to, a.to(dtype), mask=live)
        tl.store(to + D // 2, b.to(dtype), mask=live)


@jit
def _backward(
    dq, dk, dv, out, rope, length, start,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, PAD_KV: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sequence, place = token // length, token % length
    low = tl.arange(0, D // 2)[None, :]
    cos = tl.load(rope + (start + place) * D + low)
    sin = tl.load(rope + (start + place) * D + D // 2 + low)
    to = out + token * (HEADS + 2 * KV) * D
    _turn_back(dq, sequence, place, q_batch, q_head, q_row, to, cos, sin, HEADS, D, PAD, True)
    _turn_back(dk, sequence, place, k_batch, k_head, k_row, to + HEADS * D, cos, sin, KV, D, PAD_KV, True)
    _turn_back(dv, sequence, place, v_batch, v_head, v_row, to + (HEADS + KV) * D, cos, sin, KV, D, PAD_KV, False)


def rope_forward(qkv: Tensor, rope: Tensor, length: int, start: int, heads: int) -> None:
    """Rotate the first `heads` heads (q's and k's) of each row of `qkv` in place; `rope`: [positions, head_dim] (cos | sin)."""
    head_dim = rope.shape[1]
    _forward[(qkv.shape[0],)](
        qkv, rope, length, start, qkv.stride(0), HEADS=heads, D=head_dim, PAD=triton.next_power_of_2(heads), num_warps=4
    )


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, rope: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """Dqkv [batch * length, (heads + 2 kv_heads) * head_dim] of the products before the rotation."""
    (batch, heads, length, head_dim), kv_heads = dq.shape, dk.shape[1]
    out = torch.empty(batch * length, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=dq.device)
    _backward[(batch * length,)](
        dq, dk, dv, out, rope, length, start, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        HEADS=heads, KV=kv_heads, D=head_dim, PAD=triton.next_power_of_2(heads), PAD_KV=triton.next_power_of_2(kv_heads),
        num_warps=4,
    )  # fmt: skip
    return out
