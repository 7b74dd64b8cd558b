# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Adapters in and out of a weight of every layer, in one pass over them and one launch.

    target[l] = source[l] + B[l, put] A[l, put] - B[l, take] A[l, take]

`source` and `target` may be the same matrices (in place). Both products are one of twice the rank: exact products of the
factors' format, summed in float32 onto the weight, rounded once. Place 0 of the bank is no adapter, and nothing of it is
read. Which places to take out and put in is read on the device, so that one CUDA graph serves every switch.

    source, target: addresses of matrices [outer, inner], one per layer; a: [layers, places, parts * rank, inner];
    b: [layers, places, outer, rank]; which: [take, put] int64; part p of the outputs is the rows ends[p - 1] .. ends[p]

Bytes floor: read and write of the weights; the factors are a hundredth of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl


@dataclass(frozen=True, slots=True)
class MergeTiling:
    """Rows and columns of the weight that a program rewrites, and its warps."""

    bn: int = 64
    bk: int = 128
    warps: int = 4


@jit
def _merge(
    sources, targets, a, b, which, end0, end1,
    OUTER: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr, RANK: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(2)
    source = tl.load(sources + layer).to(tl.pointer_type(a.dtype.element_ty))
    target = tl.load(targets + layer).to(tl.pointer_type(a.dtype.element_ty))
    take, put = tl.load(which), tl.load(which + 1)
    begin = tl.program_id(1) * BN  # BN divides every part
    n = (begin + tl.arange(0, BN)).to(tl.int64)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    at = n[:, None] * INNER + k[None, :]
    # an address from memory says nothing of its alignment: rows of tiles begin at multiples of 16 elements
    wide = tl.load(tl.multiple_of(source + at, (1, 16))).to(tl.float32)
    part = (begin >= end0).to(tl.int32) + (begin >= end1).to(tl.int32)
    r = tl.arange(0, 2 * RANK)
    place = tl.where(r < RANK, put, take)
    live, lane = place > 0, r % RANK
    matrix = layer.to(tl.int64) * PLACES + place
    left = tl.load(b + (matrix[None, :] * OUTER + n[:, None]) * RANK + lane[None, :], mask=live[None, :], other=0.0)
    left = tl.where((r < RANK)[None, :], left, -left)
    a_at = a + ((matrix * PARTS + part) * RANK + lane)[:, None] * INNER + k[None, :]
    right = tl.load(a_at, mask=live[:, None], other=0.0)
    wide = tl.dot(left, right, wide, input_precision="ieee" if EXACT else "tf32")
    tl.store(tl.multiple_of(target + at, (1, 16)), wide.to(a.dtype.element_ty))


def addresses(matrices: Sequence[Tensor]) -> Tensor:
    """Where the (contiguous) matrices of the layers begin, on their device; valid as long as they live there."""
    assert all(matrix.is_contiguous() and matrix.data_ptr() % 16 == 0 for matrix in matrices)
    return torch.tensor([matrix.data_ptr() for matrix in matrices], dtype=torch.int64).to(matrices[0].device)


def merge_lora(
    sources: Tensor,
    targets: Tensor,
    a: Tensor,
    b: Tensor,
    ends: tuple[int, ...],
    which: Tensor,
    tiling: MergeTiling | None = None,
) -> None:
    """See the module; `addresses` gives `sources` and `targets`, of the format of `a`; `rank` a power of two of at least 16."""
    tiling = tiling or MergeTiling()
    (layers, places, outer, rank), inner, parts = b.shape, a.shape[3], len(ends)
    widths = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    assert a.is_contiguous() and b.is_contiguous() and all(width % 16 == 0 for width in [*widths, inner])
    bn = min(tiling.bn, *[width & -width for width in widths])
    bk = min(tiling.bk, inner & -inner)
    far = (*ends[:-1], outer, outer)[:2]
    _merge[(inner // bk, outer // bn, layers)](
        sources, targets, a, b, which, *far, OUTER=outer, INNER=inner, PARTS=parts, PLACES=places, RANK=rank, BN=bn, BK=bk,
        EXACT=a.dtype.itemsize == 4, num_warps=tiling.warps,
    )  # fmt: skip
