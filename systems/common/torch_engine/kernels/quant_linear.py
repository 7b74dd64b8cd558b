# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Linear layers whose weights are int8 or packed int4, read as they are (`quantised` says how they are laid out).

    y = x @ dequantise(weight).T                    x: [rows, inner]; weight: [outer, inner] int8 or [outer, inner / 2] uint8

`_row` serves one row on the plain units, with what surrounds the product fused in as in `skinny_linear`. Two kernels serve
several rows on the matrix units, with the inputs split among programs where the outputs alone are too few: `_dot`, the weights
as right operand, and `_left`, as left one (`quant_tilings.Tiling.left`). `_dense` writes the dequantised matrix. Bytes floor of
all but `_dense`: the weight, outer * inner (int4: half) plus its scales.

Integers become floats by bits (`integers`): conversion instructions would bind before the memory does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.integers import narrow4, narrow8, signed
from systems.common.torch_engine.kernels.quant_tilings import Tiling, chosen
from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _nibble(half):
    """Four bits, kept plus 8, as float32."""
    return (half | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@jit
def _row_product(
    x, gain, weight, scale, n, live,
    INNER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Products of x (times `gain`) with the outputs `n`, and the sum of x's squares."""
    if GROUP == 0:
        k = tl.arange(0, BK)
        acc = tl.zeros([BN, BK], tl.float32)
        squares = tl.zeros([BK], tl.float32)
        for at in range(0, INNER, BK):
            there = at + k < INNER
            a = tl.load(x + at + k, mask=there, other=0.0)
            if NORM:
                wide = a.to(tl.float32)
                squares += wide * wide
                a = (wide * tl.load(gain + at + k, mask=there, other=0.0).to(tl.float32)).to(a.dtype)
            w = tl.load(weight + n[:, None] * INNER + at + k[None, :], mask=live[:, None] & there[None, :], other=0)
            acc += a.to(tl.float32)[None, :] * signed(w)
        y = tl.sum(acc, 1) * tl.load(scale + n, mask=live, other=0.0)
        total = tl.sum(squares)
    else:
        half: tl.constexpr = GROUP // 2
        g = tl.arange(0, BK // GROUP)[None, :, None]
        h = tl.arange(0, half)[None, None, :]
        wide_n = n[:, None, None]
        acc = tl.zeros([BN, BK // GROUP, half], tl.float32)
        squares = tl.zeros([1, BK // GROUP, half], tl.float32)
        for at in range(0, INNER, BK):
            there = at + g * GROUP < INNER
            first = at + g * GROUP + h
            low = tl.load(x + first, mask=there, other=0.0)
            high = tl.load(x + first + half, mask=there, other=0.0)
            if NORM:
                low_wide, high_wide = low.to(tl.float32), high.to(tl.float32)
                squares += low_wide * low_wide + high_wide * high_wide
                low = (low_wide * tl.load(gain + first, mask=there, other=0.0).to(tl.float32)).to(low.dtype)
                high = (high_wide * tl.load(gain + first + half, mask=there, other=0.0).to(tl.float32)).to(high.dtype)
            both = live[:, None, None] & there
            w = tl.load(weight + wide_n * (INNER // 2) + at // 2 + g * half + h, mask=both, other=0).to(tl.int32)
            s = tl.load(scale + wide_n * (INNER // GROUP) + at // GROUP + g, mask=both, other=0.0).to(tl.float32)
            acc += (_nibble(w & 15) * low.to(tl.float32) + _nibble(w >> 4) * high.to(tl.float32)) * s
        y = tl.sum(tl.sum(acc, 2), 1)
        total = tl.sum(tl.sum(tl.sum(squares, 2), 1))
    return y, total


@jit
def _row(
    x, weight, scale, out, gain, residual, bias, outer, eps,
    INNER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    n = column.to(tl.int64)
    live = column < outer
    y, total = _row_product(x, gain, weight, scale, n, live, INNER, BN, BK, GROUP, NORM)
    if NORM:
        shrink = tl.rsqrt(total / INNER + eps)
        y = y * shrink
    if BIAS:
        y += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    if GATED:
        up, _ = _row_product(x, gain, weight, scale, n + outer, live, INNER, BN, BK, GROUP, NORM)
        if NORM:
            up = up * shrink
        y = y / (1 + tl.exp(-y)) * up
    if ADD:
        y += tl.load(residual + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=live)


@jit(do_not_specialize=["splits"])
def _dot(
    x, weight, scale, out, bias, rows, outer, splits,
    INNER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    m, n, split = tl.arange(0, BM), column.to(tl.int64), tl.program_id(1)
    live_m, live = m < rows, column < outer
    acc = tl.zeros([BM, BN], tl.float32)
    pieces = tl.cdiv(tl.cdiv(INNER, BK), splits)
    first = split * pieces * BK
    last = tl.minimum(first + pieces * BK, INNER)
    if GROUP == 0:
        k = tl.arange(0, BK)
        for at in range(first, last, BK):
            there = at + k < INNER
            a = tl.load(x + m[:, None] * INNER + at + k[None, :], mask=live_m[:, None] & there[None, :], other=0.0)
            w = tl.load(weight + n[:, None] * INNER + at + k[None, :], mask=live[:, None] & there[None, :], other=0)
            acc = tl.dot(a, tl.trans(signed(w).to(a.dtype)), acc, input_precision="ieee" if EXACT else "tf32")
        acc = acc * tl.load(scale + n, mask=live, other=0.0)[None, :]
    else:
        half: tl.constexpr = GROUP // 2
        h = tl.arange(0, half)
        for at in range(first, last, BK):  # BK is one group
            x_at = x + m[:, None] * INNER + at + h[None, :]
            low = tl.load(x_at, mask=live_m[:, None], other=0.0)
            high = tl.load(x_at + half, mask=live_m[:, None], other=0.0)
            w = tl.load(weight + n[:, None] * (INNER // 2) + at // 2 + h[None, :], mask=live[:, None], other=0).to(tl.int32)
            s = tl.load(scale + n * (INNER // GROUP) + at // GROUP, mask=live, other=0.0).to(tl.float32)
            part = tl.dot(low, tl.trans(_nibble(w & 15).to(low.dtype)), input_precision="ieee" if EXACT else "tf32")
            part = tl.dot(high, tl.trans(_nibble(w >> 4).to(low.dtype)), part, input_precision="ieee" if EXACT else "tf32")
            acc += part * s[None, :]
    if BIAS:  # noqa: SIM102 - the outer one is decided when the kernel is compiled
        if split == 0:
            acc += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[None, :]
    target = out + (split * rows + m[:, None]).to(tl.int64) * outer + n[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=live_m[:, None] & live[None, :])


@jit(do_not_specialize=["splits"])
def _left(
    x, weight, scale, out, bias, rows, outer, splits,
    INNER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    m, n, split = tl.arange(0, BM), column.to(tl.int64), tl.program_id(1)
    live_m, live = m < rows, column < outer
    acc = tl.zeros([BN, BM], tl.float32)
    pieces = tl.cdiv(tl.cdiv(INNER, BK), splits)
    first = split * pieces * BK
    last = tl.minimum(first + pieces * BK, INNER)
    if GROUP == 0:
        k = tl.arange(0, BK)
        for at in range(first, last, BK):
            there = at + k < INNER
            w = tl.load(weight + n[:, None] * INNER + at + k[None, :], mask=live[:, None] & there[None, :], other=0)
            a = tl.load(x + m[None, :] * INNER + at + k[:, None], mask=live_m[None, :] & there[:, None], other=0.0)
            acc = tl.dot(narrow8(w, a.dtype), a, acc, input_precision="ieee" if EXACT else "tf32")
        acc = acc * tl.load(scale + n, mask=live, other=0.0)[:, None]
    else:
        half: tl.constexpr = GROUP // 2
        h = tl.arange(0, half)
        for at in range(first, last, BK):  # BK is one group
            w = tl.load(weight + n[:, None] * (INNER // 2) + at // 2 + h[None, :], mask=live[:, None], other=0).to(tl.int16)
            x_at = x + m[None, :] * INNER + at + h[:, None]
            low = tl.load(x_at, mask=live_m[None, :], other=0.0)
            high = tl.load(x_at + half, mask=live_m[None, :], other=0.0)
            s = tl.load(scale + n * (INNER // GROUP) + at // GROUP, mask=live, other=0.0).to(tl.float32)
            part = tl.dot(narrow4(w & 15, low.dtype), low, input_precision="ieee" if EXACT else "tf32")
            part = tl.dot(narrow4(w >> 4, low.dtype), high, part, input_precision="ieee" if EXACT else "tf32")
            acc += part * s[:, None]
    if BIAS:  # noqa: SIM102 - the outer one is decided when the kernel is compiled
        if split == 0:
            acc += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[:, None]
    target = out + (split * rows + m[None, :]).to(tl.int64) * outer + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=live_m[None, :] & live[:, None])


@jit
def _sum(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@jit
def _dense(weight, scale, out, INNER: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if GROUP == 0:
        there = at < INNER
        value = signed(tl.load(weight + n * INNER + at, mask=there, other=0)) * tl.load(scale + n)
        tl.store(out + n * INNER + at, value.to(out.dtype.element_ty), mask=there)
    else:
        there = at < INNER // 2
        half: tl.constexpr = GROUP // 2
        w = tl.load(weight + n * (INNER // 2) + at, mask=there, other=0).to(tl.int32)
        s = tl.load(scale + n * (INNER // GROUP) + at // half, mask=there, other=0.0).to(tl.float32)
        to = out + n * INNER + at // half * GROUP + at % half
        tl.store(to, (_nibble(w & 15) * s).to(out.dtype.element_ty), mask=there)
        tl.store(to + half, (_nibble(w >> 4) * s).to(out.dtype.element_ty), mask=there)


def quant_linear(
    x: Tensor, weight: Tensor, scale: Tensor, group: int, *, norm: Tensor | None = None, residual: Tensor | None = None,
    bias: Tensor | None = None, gated: bool = False, eps: float = 1e-5, out: Tensor | None = None, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """See the module; `group` 0 is int8. `norm`, `residual` and `gated` as in `skinny_linear`, for one row only."""
    rows, inner = x.shape
    outer = weight.shape[0] // (2 if gated else 1)
    how = tiling or chosen(rows, group)
    assert how is not None and weight.shape[1] == (inner // 2 if group else inner)
    if out is None:
        out = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    if rows == 1:
        _row[(triton.cdiv(outer, how.bn),)](
            x, weight, scale, out, x if norm is None else norm, x if residual is None else residual,
            x if bias is None else bias, outer, eps, INNER=inner, BN=how.bn, BK=min(how.bk, triton.next_power_of_2(inner)),
            GROUP=group, NORM=norm is not None, ADD=residual is not None, GATED=gated, BIAS=bias is not None,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        return out
    assert norm is None and residual is None and not gated
    splits = how.shares(outer, inner)
    parts = out if splits == 1 else torch.empty(splits, rows, outer, dtype=torch.float32, device=x.device)
    (_left if how.left else _dot)[(triton.cdiv(outer, how.bn), splits)](
        x, weight, scale, parts, x if bias is None else bias, rows, outer, splits, INNER=inner,
        BM=how.rows or max(16, triton.next_power_of_2(rows)), BN=how.bn, BK=group or how.bk, GROUP=group,
        BIAS=bias is not None, EXACT=x.dtype == torch.float32, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if splits > 1:
        _sum[(triton.cdiv(rows * outer, 1024),)](parts, out, rows * outer, SPLITS=splits, BLOCK=1024)
    return out


def dequantised(weight: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix in `dtype`. Bytes floor: the packed weight read, the dense one written."""
    outer, stored = weight.shape
    inner = stored * 2 if group else stored
    out = torch.empty(outer, inner, dtype=dtype, device=weight.device)
    block = min(2048, triton.next_power_of_2(stored))
    _dense[(outer, triton.cdiv(stored, block))](weight, scale, out, INNER=inner, BLOCK=block, GROUP=group, num_warps=4)
    return out
