# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Low-rank adapters on a batch whose tokens use different ones.

    y[t] += (x[t] A[adapter(t)].T) B[adapter(t)].T

Tokens come in tiles of one adapter each: a decoding row is a tile of one token, a prompt chunk gives tiles of TILE_Q. A layer
that joins several matrices (q | k | v) has a low-rank product for each: `parts`.

    x: [tokens, inner]; a: [adapters + 1, parts * rank, inner]; b: [adapters + 1, outer, rank]; y: [tokens, outer]
    middle: [splits, parts, tokens, rank] float32; part p serves the columns ends[p - 1] .. ends[p] of y

Two launches, `_shrink` and `_expand`; adapter 0 means none and costs no more than looking. Bytes floor: A and B of every
adapter in the batch once, x and y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _tile(tile, slots, tiles, chunks, of_slot, DECODE: tl.constexpr):
    """First token, tokens left and adapter of a tile."""
    if DECODE:
        start = tile
        left = 1
        slot = tl.load(slots + tile)
    else:
        chunk = tl.load(tiles + 2 * tile)
        first = tl.load(tiles + 2 * tile + 1)
        start = (tl.load(chunks + 4 * chunk) + first).to(tl.int32)
        left = (tl.load(chunks + 4 * chunk + 2) - first).to(tl.int32)
        slot = tl.load(chunks + 4 * chunk + 3)
    return start, left, tl.load(of_slot + slot)


@jit(do_not_specialize=["tokens"])
def _shrink(
    x, a, middle, slots, tiles, chunks, of_slot, tokens, x_width,
    INNER: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, DECODE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    part, split = tl.program_id(1), tl.program_id(2)
    start, left, adapter = _tile(tl.program_id(0), slots, tiles, chunks, of_slot, DECODE)
    if adapter > 0 and left > 0:
        m = tl.arange(0, BM)
        r, k = tl.arange(0, RANK), tl.arange(0, BK)
        live = m < left
        acc = tl.zeros([BM, RANK], tl.float32)
        a_at = a + (adapter.to(tl.int64) * PARTS + part) * RANK * INNER
        for at in range(split * (INNER // SPLITS), (split + 1) * (INNER // SPLITS), BK):
            xs = tl.load(x + (start + m).to(tl.int64)[:, None] * x_width + at + k[None, :], mask=live[:, None], other=0.0)
            w = tl.load(a_at + r[:, None] * INNER + at + k[None, :])
            acc = tl.dot(xs, tl.trans(w), acc, input_precision="ieee" if EXACT else "tf32")
        row = (split * PARTS + part) * tokens + start + m
        tl.store(middle + row[:, None] * RANK + r[None, :], acc, mask=live[:, None])


@jit(do_not_specialize=["tokens"])
def _expand(
    middle, b, y, slots, tiles, chunks, of_slot, tokens, end0, end1,
    OUTER: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DECODE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    start, left, adapter = _tile(tl.program_id(0), slots, tiles, chunks, of_slot, DECODE)
    if adapter > 0 and left > 0:
        begin = tl.program_id(1) * BN  # BN divides every part
        part = (begin >= end0).to(tl.int32) + (begin >= end1).to(tl.int32)
        m, n, r = tl.arange(0, BM), begin + tl.arange(0, BN), tl.arange(0, RANK)
        live = (m < left)[:, None]
        low = tl.zeros([BM, RANK], tl.float32)
        for split in range(SPLITS):
            row = (split * PARTS + part) * tokens + start + m
            low += tl.load(middle + row[:, None] * RANK + r[None, :], mask=live, other=0.0)
        w = tl.load(b + (adapter.to(tl.int64) * OUTER + n)[:, None] * RANK + r[None, :])
        added = tl.dot(low.to(w.dtype), tl.trans(w), input_precision="ieee" if EXACT else "tf32")
        at = y + (start + m).to(tl.int64)[:, None] * OUTER + n[None, :]
        tl.store(at, (tl.load(at, mask=live, other=0.0).to(tl.float32) + added).to(y.dtype.element_ty), mask=live)


def grouped_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, ends: tuple[int, ...], of_slot: Tensor, slots: Tensor,
    tiles: Tensor | None, chunks: Tensor | None, tile_tokens: int,
) -> None:  # fmt: skip
    """Add to `y` in place. Decoding rows: `slots` [tokens]. Chunks: `tiles` and `chunks` as in `paged_prefill`.

    `ends`: last column of each part; `rank` a power of two of at least 16.
    """
    decode = tiles is None
    (tokens, inner), outer, rank = x.shape, b.shape[1], b.shape[2]
    parts, count = len(ends), tokens if tiles is None else tiles.shape[0]
    splits = 4 if decode and inner % 1024 == 0 else 1
    middle = torch.empty(splits, parts, tokens, rank, dtype=torch.float32, device=x.device)
    where = (slots, slots if tiles is None else tiles, slots if chunks is None else chunks, of_slot, tokens)
    widths = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    bn = min(256 if decode else 128, *[width & -width for width in widths])
    bk = min(256 if decode else 64, (inner // splits) & -(inner // splits))
    common = {
        "PARTS": parts,
        "RANK": rank,
        "SPLITS": splits,
        "BM": 16 if decode else tile_tokens,
        "DECODE": decode,
        "EXACT": x.dtype == torch.float32,
    }
    _shrink[(count, parts, splits)](x, a, middle, *where, x.stride(0), INNER=inner, BK=bk, num_warps=4, num_stages=4, **common)
    far = (*ends[:-1], outer, outer)[:2]
    _expand[(count, triton.cdiv(outer, bn))](middle, b, y, *where, *far, OUTER=outer, BN=bn, num_warps=4, **common)
