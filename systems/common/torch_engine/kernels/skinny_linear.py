# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A linear layer for few rows, bound by reading its weight, with what surrounds it fused in.

    h   = x, or RMSNorm(x) with gain `norm`                        x: [rows, inner]
    y   = h @ weight.T (+ bias)                                    weight: [outer, inner]
    out = y | residual + y | silu(y[:, :half]) * y[:, half:]       [rows, outer] or [rows, outer / 2]

RMSNorm needs the whole row, which every program reads anyway: the sum of squares is gathered on the way and divides the result.
Bytes floor: outer * inner * size. A program makes BN columns of the output for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _skinny(
    x, weight, out, gain, residual, bias, rows, outer, eps,
    INNER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    live_m, live_n = m < rows, n < outer
    w_at = weight + n.to(tl.int64)[:, None] * INNER + k[None, :]
    up_at = w_at + outer.to(tl.int64) * INNER
    x_at = x + m[:, None] * INNER + k[None, :]
    squares = tl.zeros([BM], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if DOT:
        acc = tl.zeros([BM, BN], tl.float32)
        acc_up = tl.zeros([BM, BN], tl.float32)
    else:
        acc = tl.zeros([BN, BK], tl.float32)
        acc_up = tl.zeros([BN, BK], tl.float32)
    for at in range(0, INNER, BK):
        a = tl.load(x_at + at, mask=live_m[:, None], other=0.0)
        w = tl.load(w_at + at, mask=live_n[:, None], other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            a = (wide * tl.load(gain + at + k)[None, :].to(tl.float32)).to(a.dtype)
        if DOT:
            acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee" if EXACT else "tf32")
        else:
            acc += a.to(tl.float32) * w.to(tl.float32)
        if GATED:
            u = tl.load(up_at + at, mask=live_n[:, None], other=0.0)
            if DOT:
                acc_up = tl.dot(a, tl.trans(u), acc_up, input_precision="ieee" if EXACT else "tf32")
            else:
                acc_up += a.to(tl.float32) * u.to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if not DOT:
        acc = tl.sum(acc, 1)[None, :]
        acc_up = tl.sum(acc_up, 1)[None, :]
    if NORM:
        shrink = tl.rsqrt(squares / INNER + eps)[:, None]
        acc = acc * shrink
        acc_up = acc_up * shrink
    if BIAS:
        acc += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = acc / (1 + tl.exp(-acc)) * acc_up
    target = m[:, None] * outer + n[None, :]
    live = live_m[:, None] & live_n[None, :]
    if ADD:
        acc += tl.load(residual + target, mask=live, other=0.0).to(tl.float32)
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is cut: output columns and inner elements per step, warps, stages; `dot` uses the matrix units."""

    bn: int
    bk: int
    warps: int = 4
    stages: int = 4
    dot: bool = True
    pdl: bool = False


def skinny_linear(
    x: Tensor, weight: Tensor, tiling: Tiling, *, norm: Tensor | None = None, residual: Tensor | None = None,
    bias: Tensor | None = None, gated: bool = False, eps: float = 1e-5, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the module. `out` may be `residual` itself; `dot=False` needs a single row; `inner` must be a multiple of `bk`."""
    rows, inner = x.shape
    outer = weight.shape[0] // (2 if gated else 1)
    assert inner % tiling.bk == 0 and (tiling.dot or rows == 1) and not (gated and bias is not None)
    if out is None:
        out = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    options = {"launch_pdl": True} if tiling.pdl else {}
    _skinny[(triton.cdiv(outer, tiling.bn),)](
        x,
        weight,
        out,
        x if norm is None else norm,
        x if residual is None else residual,
        x if bias is None else bias,
        rows,
        outer,
        eps,
        INNER=inner,
        BM=max(16, triton.next_power_of_2(rows)) if tiling.dot else 1,
        BN=tiling.bn,
        BK=tiling.bk,
        NORM=norm is not None,
        ADD=residual is not None,
        GATED=gated,
        BIAS=bias is not None,
        DOT=tiling.dot,
        EXACT=x.dtype == torch.float32,
        PDL=tiling.pdl,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **options,
    )
    return out
