# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Adapters in and out of a weight in one pass over it.

    target = source + B[put] A[put] - B[take] A[take]

`source` and `target` may be one matrix (in place). The low-rank products are exact products of the factors' format summed in
float32; the result is rounded once. Place 0 of the bank is no adapter and costs nothing. Which places to take out and
put in is read on the device, so that one CUDA graph serves every switch.

    source, target: [outer, inner]; a: [places, parts * rank, inner]; b: [places, outer, rank]; which: [take, put] int64
    part p of the outputs is the rows ends[p - 1] .. ends[p]

Bytes floor: read and write of the weight; the factors are a hundredth of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl


@dataclass(frozen=True, slots=True)
class MergeTiling:
    """Rows and columns of the weight that a program rewrites, and its warps."""

    bn: int = 64
    bk: int = 256
    warps: int = 8


@jit
def _merge(
    source, target, a, b, which, end0, end1,
    OUTER: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(1) * BN  # BN divides every part
    n = (begin + tl.arange(0, BN)).to(tl.int64)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    r = tl.arange(0, RANK)
    at = n[:, None] * INNER + k[None, :]
    wide = tl.load(source + at).to(tl.float32)
    part = (begin >= end0).to(tl.int32) + (begin >= end1).to(tl.int32)
    take, put = tl.load(which), tl.load(which + 1)
    a_at = (part * RANK + r).to(tl.int64)[:, None] * INNER + k[None, :]
    b_at = n[:, None] * RANK + r[None, :]
    if put > 0:
        left, right = tl.load(b + put * OUTER * RANK + b_at), tl.load(a + put * PARTS * RANK * INNER + a_at)
        wide += tl.dot(left, right, input_precision="ieee" if EXACT else "tf32")
    if take > 0:
        left, right = tl.load(b + take * OUTER * RANK + b_at), tl.load(a + take * PARTS * RANK * INNER + a_at)
        wide -= tl.dot(left, right, input_precision="ieee" if EXACT else "tf32")
    tl.store(target + at, wide.to(target.dtype.element_ty))


def fits(widths: list[int], inner: int) -> bool:
    """Whether the kernel can cut parts of `widths` outputs and `inner` inputs into tiles of at least 16 by 16."""
    return all(width % 16 == 0 for width in [*widths, inner])


def merge_lora(
    source: Tensor,
    target: Tensor,
    a: Tensor,
    b: Tensor,
    ends: tuple[int, ...],
    which: Tensor,
    tiling: MergeTiling | None = None,
) -> None:
    """See the module; `rank` a power of two of at least 16, weights contiguous."""
    tiling = tiling or MergeTiling()
    (outer, inner), rank, parts = source.shape, b.shape[2], len(ends)
    assert source.is_contiguous() and target.is_contiguous() and a[0].is_contiguous() and b[0].is_contiguous()
    widths = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    bn = min(tiling.bn, *[width & -width for width in widths])
    bk = min(tiling.bk, inner & -inner)
    far = (*ends[:-1], outer, outer)[:2]
    _merge[(inner // bk, outer // bn)](
        source, target, a, b, which, *far, OUTER=outer, INNER=inner, PARTS=parts, RANK=rank, BN=bn, BK=bk,
        EXACT=source.dtype.itemsize == 4, num_warps=tiling.warps,
    )  # fmt: skip
