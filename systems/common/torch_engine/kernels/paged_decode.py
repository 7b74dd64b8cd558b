# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Decode attention over the paged KV cache, split over the context, one new token per sequence.

For each row (a sequence) the kernel rotates q and the new key, stores the new key and value at position `length` of the
sequence, and attends over the `length` tokens before it and the new one. A program serves one row, one kv head (all its
query heads together: each key is read once for the group) and one share of the context; `_combine` joins the shares by their
log-sum-exp. The new token is handled from registers by share 0, so that nothing waits for its own store.

    qkv: [rows, (heads + 2 kv_heads) * head_dim]; slots: [rows]; lengths: [slots]; tables: [slots, blocks of a sequence]
    caches: [blocks, kv_heads, block_tokens, head_dim] of one layer; out: [rows, heads * head_dim]

Bytes floor: 2 * sum(lengths) * kv_heads * head_dim * size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _decode(
    qkv, k_cache, v_cache, tables, lengths, slots, rope, out, partial, lse,
    scale, table_width,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    ROPE: tl.constexpr, GROUP: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    row, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    past = tl.load(lengths + slot)
    d = tl.arange(0, D)
    g = tl.arange(0, PAD)[:, None]
    live_g = g < GROUP
    base = qkv + row * (HEADS + 2 * KV) * D
    q_at = base + (kv * GROUP + g) * D
    q = tl.load(q_at + d[None, :], mask=live_g, other=0.0)
    dtype = q.dtype
    key_at = base + (HEADS + kv) * D
    key = tl.load(key_at + d)
    if ROPE:
        pair = (d + D // 2) % D
        cos = tl.load(rope + past * D + d % (D // 2))
        sin = tl.load(rope + past * D + D // 2 + d % (D // 2))
        sin = tl.where(d < D // 2, -sin, sin)
        other = tl.load(q_at + pair[None, :], mask=live_g, other=0.0)
        q = (q.to(tl.float32) * cos[None, :] + other.to(tl.float32) * sin[None, :]).to(dtype)
        key = (key.to(tl.float32) * cos + tl.load(key_at + pair).to(tl.float32) * sin).to(dtype)
    best = tl.full([PAD], float("-inf"), tl.float32)
    total = tl.zeros([PAD], tl.float32)
    acc = tl.zeros([PAD, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    row_table = tables + slot * table_width
    if split == 0:
        value = tl.load(base + (HEADS + KV + kv) * D + d)
        place = (tl.load(row_table + past // BLOCK_TOKENS).to(tl.int64) * KV + kv) * BLOCK_TOKENS * D + (
            past % BLOCK_TOKENS
        ) * D
        tl.store(k_cache + place + d, key)
        tl.store(v_cache + place + d, value)
        best = tl.sum(q.to(tl.float32) * key[None, :].to(tl.float32), 1) * log2_scale
        total += 1.0
        acc += value[None, :].to(tl.float32)
    share = tl.cdiv(tl.cdiv(past, SPLITS), TILE) * TILE
    end = tl.minimum((split + 1) * share, past)
    for start in range(split * share, end, TILE):
        token = start + tl.arange(0, TILE)
        live = token < end
        block = tl.load(row_table + token // BLOCK_TOKENS, mask=live, other=0).to(tl.int64)
        place = (block * KV + kv) * BLOCK_TOKENS * D + (token % BLOCK_TOKENS) * D
        k = tl.load(k_cache + place[None, :] + d[:, None], mask=live[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * log2_scale
        score = tl.where(live[None, :], score, float("-inf"))
        highest = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp2(score - highest[:, None])
        shrink = tl.exp2(best - highest)
        v = tl.load(v_cache + place[:, None] + d[None, :], mask=live[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weight.to(dtype), v, input_precision="ieee" if EXACT else "tf32")
        total = total * shrink + tl.sum(weight, 1)
        best = highest
    head = kv * GROUP + tl.arange(0, PAD)
    live_head = tl.arange(0, PAD) < GROUP
    if SPLITS == 1:
        acc = acc / total[:, None]
        tl.store(out + (row * HEADS + head)[:, None] * D + d[None, :], acc.to(dtype), mask=live_head[:, None])
    else:
        slice_ = (row * HEADS + head) * SPLITS + split
        tl.store(
            partial + slice_[:, None] * D + d[None, :], acc / total[:, None], mask=live_head[:, None] & (total > 0)[:, None]
        )
        tl.store(lse + slice_, tl.where(total > 0, best + tl.log2(total), float("-inf")), mask=live_head)


@jit
def _combine(partial, lse, out, D: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    weight = tl.load(lse + head * SPLITS + s)
    weight = tl.exp2(weight - tl.max(weight))  # share 0 always holds the new token, so the maximum is finite
    part = tl.load(partial + (head * SPLITS + s)[:, None] * D + d[None, :], mask=(weight > 0)[:, None], other=0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight)
    tl.store(out + head * D + d, mean.to(out.dtype.element_ty))


FEW_PROGRAMS, MANY_PROGRAMS = (128, 8, 2), (64, 4, 3)
"""Tile of keys, warps, stages. On an H200 wide tiles win at 32 rows of 8 kv heads and lose at 64 (docs/engine.md)."""


def splits_for(rows: int, kv_heads: int, programs: int = 256, most: int = 32) -> int:
    """Shares of the context so that at least `programs` run (two per multiprocessor): a power of two up to `most`."""
    splits = 1
    while splits < most and rows * kv_heads * splits < programs:
        splits *= 2
    return splits


def paged_decode(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor, slots: Tensor, rope: Tensor | None,
    heads: int, scale: float, splits: int, tile: int = 64, warps: int = 4, stages: int = 3,
) -> Tensor:  # fmt: skip
    """Attention output [rows, heads * head_dim]; stores the new keys and values (not rotated where `rope` is None)."""
    rows = qkv.shape[0]
    _, kv_heads, block_tokens, head_dim = k_cache.shape
    out = torch.empty(rows, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty(rows, heads, splits, head_dim, dtype=torch.float32, device=qkv.device)
        lse = torch.empty(rows, heads, splits, dtype=torch.float32, device=qkv.device)
    group = heads // kv_heads
    _decode[(rows, kv_heads, splits)](
        qkv,
        k_cache,
        v_cache,
        tables,
        lengths,
        slots,
        qkv if rope is None else rope,
        out,
        partial,
        lse,
        scale,
        tables.stride(0),
        HEADS=heads,
        KV=kv_heads,
        D=head_dim,
        BLOCK_TOKENS=block_tokens,
        SPLITS=splits,
        ROPE=rope is not None,
        GROUP=group,
        PAD=max(16, triton.next_power_of_2(group)),
        TILE=tile,
        EXACT=qkv.dtype == torch.float32,
        num_warps=warps,
        num_stages=stages,
    )
    if splits > 1:
        _combine[(rows * heads,)](partial, lse, out, D=head_dim, SPLITS=splits, num_warps=2 if splits <= 8 else 4)
    return out
