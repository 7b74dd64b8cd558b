# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Low-rank adapters on prompt chunks that use different ones (`row_lora` serves decoding rows).

    y[t] += (x[t] A[adapter(t)].T) B[adapter(t)].T

Tokens come in tiles of one adapter each. A layer that joins several matrices (q | k | v) has a low-rank product for each:
`parts`.

    x: [tokens, inner]; a: [adapters + 1, parts * rank, inner]; b: [adapters + 1, outer, rank]; y: [tokens, outer]
    middle: [parts, tokens, rank] float32; part p serves the columns ends[p - 1] .. ends[p] of y

Two launches, `_shrink` and `_expand`; adapter 0 means none and costs no more than looking. Bytes floor: A and B of every
adapter in the batch once, x and y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _tile(tile, tiles, chunks, of_slot):
    """First token, tokens left and adapter of a tile."""
    chunk = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    start = (tl.load(chunks + 4 * chunk) + first).to(tl.int32)
    left = (tl.load(chunks + 4 * chunk + 2) - first).to(tl.int32)
    return start, left, tl.load(of_slot + tl.load(chunks + 4 * chunk + 3))


@jit(do_not_specialize=["tokens"])
def _shrink(
    x, a, middle, tiles, chunks, of_slot, tokens, x_width,
    INNER: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    start, left, adapter = _tile(tl.program_id(0), tiles, chunks, of_slot)
    if adapter > 0 and left > 0:
        m = tl.arange(0, BM)
        r, k = tl.arange(0, RANK), tl.arange(0, BK)
        live = m < left
        acc = tl.zeros([BM, RANK], tl.float32)
        a_at = a + (adapter.to(tl.int64) * PARTS + part) * RANK * INNER
        for at in range(0, INNER, BK):
            xs = tl.load(x + (start + m).to(tl.int64)[:, None] * x_width + at + k[None, :], mask=live[:, None], other=0.0)
            w = tl.load(a_at + r[:, None] * INNER + at + k[None, :])
            acc = tl.dot(xs, tl.trans(w), acc, input_precision="ieee" if EXACT else "tf32")
        row = part * tokens + start + m
        tl.store(middle + row[:, None] * RANK + r[None, :], acc, mask=live[:, None])


@jit(do_not_specialize=["tokens"])
def _expand(
    middle, b, y, tiles, chunks, of_slot, tokens, end0, end1,
    OUTER: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    start, left, adapter = _tile(tl.program_id(0), tiles, chunks, of_slot)
    if adapter > 0 and left > 0:
        begin = tl.program_id(1) * BN  # BN divides every part
        part = (begin >= end0).to(tl.int32) + (begin >= end1).to(tl.int32)
        m, n, r = tl.arange(0, BM), begin + tl.arange(0, BN), tl.arange(0, RANK)
        live = (m < left)[:, None]
        row = part * tokens + start + m
        low = tl.load(middle + row[:, None] * RANK + r[None, :], mask=live, other=0.0)
        w = tl.load(b + (adapter.to(tl.int64) * OUTER + n)[:, None] * RANK + r[None, :])
        added = tl.dot(low.to(w.dtype), tl.trans(w), input_precision="ieee" if EXACT else "tf32")
        at = y + (start + m).to(tl.int64)[:, None] * OUTER + n[None, :]
        tl.store(at, (tl.load(at, mask=live, other=0.0).to(tl.float32) + added).to(y.dtype.element_ty), mask=live)


def grouped_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, ends: tuple[int, ...], of_slot: Tensor, tiles: Tensor, chunks: Tensor,
    tile_tokens: int,
) -> None:  # fmt: skip
    """Add to `y` in place; `tiles` and `chunks` as in `paged_prefill`.

    `ends`: last column of each part; `rank` a power of two of at least 16.
    """
    (tokens, inner), outer, rank = x.shape, b.shape[1], b.shape[2]
    parts, count = len(ends), tiles.shape[0]
    middle = torch.empty(parts, tokens, rank, dtype=torch.float32, device=x.device)
    where = (tiles, chunks, of_slot, tokens)
    widths = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    bn, bk = min(128, *[width & -width for width in widths]), min(64, inner & -inner)
    common = {"RANK": rank, "BM": tile_tokens, "EXACT": x.dtype == torch.float32, "num_warps": 4}
    _shrink[(count, parts)](x, a, middle, *where, x.stride(0), INNER=inner, PARTS=parts, BK=bk, num_stages=4, **common)
    far = (*ends[:-1], outer, outer)[:2]
    _expand[(count, triton.cdiv(outer, bn))](middle, b, y, *where, *far, OUTER=outer, BN=bn, **common)
