# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Low-rank adapters on decoding rows, each of which may use another one.

    y[t] += (x[t] A[place(t)].T) B[place(t)].T

Beside `grouped_lora`, which serves prompts too, this one spreads a row's first product over more programs, needs no matrix
units, and leaves its two halves apart: `shrink` reads x only, so it can run beside the layer's own product. (The second half
inside the kernel that reads y next, a norm or the activation, was no faster: docs/results.md, 2026-11-21.)

    x: [rows, inner]; a: [places, parts * rank, inner]; b: [places, outer, rank]; y: [rows, outer]
    at: place of each row, [rows]; low: [rows, splits, parts, rank] float32
    part p serves the columns ends[p - 1] .. ends[p] of y

Place 0 means none. Bytes floor: A and B of every adapter in the batch once (rows that share one find it in L2), x and y.
"""

from __future__ import annotations

from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl

SPLITS = 8
BK, BN = 256, 256


@jit
def _shrink(
    x, a, low, at, x_width,
    INNER: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tl.load(at + row)
    if place > 0:
        r, k = tl.arange(0, RANK), tl.arange(0, BK)
        a_at = a + (place * PARTS + part) * RANK * INNER + r[:, None] * INNER
        acc = tl.zeros([RANK, BK], tl.float32)
        for step in tl.static_range(STEPS):  # unrolled: all loads are under way at once
            here = (split * STEPS + step) * BK + k
            live = here < INNER
            xs = tl.load(x + row.to(tl.int64) * x_width + here, mask=live, other=0.0).to(tl.float32)
            w = tl.load(a_at + here[None, :], mask=live[None, :], other=0.0).to(tl.float32)
            acc += w * xs[None, :]
        tl.store(low + ((row * SPLITS + split) * PARTS + part) * RANK + r, tl.sum(acc, 1))


@jit
def _expand(
    low, b, y, at, end0, end1,
    OUTER: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.load(at + row)
    if place > 0:
        begin = tl.program_id(1) * BN  # BN divides every part
        part = (begin >= end0).to(tl.int32) + (begin >= end1).to(tl.int32)
        n, r, s = begin + tl.arange(0, BN), tl.arange(0, RANK), tl.arange(0, SPLITS)
        pieces = tl.load(low + ((row * SPLITS + s)[:, None] * PARTS + part) * RANK + r[None, :])
        # every n is in range; with the mask, and in this order, a step of 16 rows takes 5.96 ms instead of 6.22 (H200)
        w = tl.load(b + (place * OUTER + n)[:, None] * RANK + r[None, :], mask=(n < OUTER)[:, None], other=0.0).to(tl.float32)
        here = y + row.to(tl.int64) * OUTER + n
        more = tl.sum(w * tl.sum(pieces, 0)[None, :], 1)
        tl.store(here, (tl.load(here).to(tl.float32) + more).to(y.dtype.element_ty))


def shrink(x: Tensor, a: Tensor, low: Tensor, at: Tensor) -> None:
    """Fill `low` [rows, splits, parts, rank] of the rows that have an adapter."""
    (rows, inner), (_, splits, parts, rank) = x.shape, low.shape
    bk = min(BK, inner & -inner)
    _shrink[(rows, parts, splits)](
        x, a, low, at, x.stride(0),
        INNER=inner, PARTS=parts, RANK=rank, SPLITS=splits, STEPS=-(-inner // (bk * splits)), BK=bk, num_warps=4,
    )  # fmt: skip


def expand(y: Tensor, low: Tensor, b: Tensor, ends: tuple[int, ...], at: Tensor) -> None:
    """Add to the contiguous `y` in place what `shrink` left in `low`."""
    (rows, outer), (_, splits, parts, rank) = y.shape, low.shape
    widths = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    bn = min(BN, *[width & -width for width in widths])
    far = (*ends[:-1], outer, outer)[:2]
    _expand[(rows, outer // bn)](low, b, y, at, *far, OUTER=outer, PARTS=parts, RANK=rank, SPLITS=splits, BN=bn, num_warps=4)
