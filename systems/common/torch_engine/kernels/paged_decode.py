# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Decode attention over the paged KV cache, one new token per sequence, the work shared out evenly whatever the contexts.

For each row (a sequence) the kernel rotates q and the new key, stores the new key and value at position `length` of the
sequence, and attends over the `length` tokens before it and the new one. A program serves one kv head (all its query heads
together: each key is read once for the group) of one *share* of a row's context. `plan` cuts the contexts of a batch into
shares of nearly the same size, once per step and on the device, so that one graph serves any contexts: a batch lasts as long
as its mean context, not as its longest. Rows of one share write their output at once; of the others the program that ends last
joins the shares by their log-sum-exp. The new token is handled from registers by share 0: nothing waits for its own store.

    qkv: [rows, (heads + 2 kv_heads) * head_dim]; slots: [rows]; lengths: [slots]; tables: [slots, blocks of a sequence]
    caches: [blocks, kv_heads, block_tokens, head_dim] of one layer; out: [rows, heads * head_dim]

With scales ([blocks, kv_heads, block_tokens]) the caches are int8 (`cache.rounded`): a key's scale multiplies its score and a
value's its weight, so nothing is dequantised but by bits. The new token attends to itself as the cache holds it.

Bytes floor: 2 * sum(lengths) * kv_heads * head_dim * size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.integers import narrow8, scale_of, whole
from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton

FEW_PROGRAMS, PROGRAMS = 264, 528
"""Shares times kv heads that a batch is cut into, up to 32 rows and above: two and four for each multiprocessor of an H200."""
COMPILED = (128, 4, 2)
"""Keys per step of a program, warps, stages: the best of 6 on an H200 over even and uneven contexts (docs/engine.md)."""


@jit(do_not_specialize=["rows"])  # else a batch of another size may wait for a compiler
def _plan(
    lengths, slots, starts, owner, rows, KV: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, ROWS)
    live = row < rows
    past = tl.load(lengths + tl.load(slots + row, mask=live, other=0), mask=live, other=0)
    share = tl.maximum(1, tl.cdiv(tl.cdiv(tl.sum(past) * KV, PROGRAMS), TILE)) * TILE
    count = tl.where(live, tl.maximum(1, tl.cdiv(past, share)), 0)
    end = tl.cumsum(count, 0)
    tl.store(starts + row, end - count, mask=live)
    tl.store(starts + rows, tl.sum(count))
    for part in range(tl.max(count)):
        tl.store(owner + end - count + part, row, mask=part < count)


@jit(do_not_specialize=["rows"])
def _decode(
    qkv, k_cache, v_cache, k_scale, v_scale, tables, lengths, slots, rope, out, partial, lse, starts, owner, arrived,
    scale, table_width, rows,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ROPE: tl.constexpr, GROUP: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr,
    QUANT: tl.constexpr,
):  # fmt: skip
    item, kv = tl.program_id(0), tl.program_id(1)
    if item >= tl.load(starts + rows):
        return
    row = tl.load(owner + item)
    first = tl.load(starts + row)
    splits = tl.load(starts + row + 1) - first
    split = item - first
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
        if QUANT:
            key_step = scale_of(tl.max(tl.abs(key.to(tl.float32)), 0))
            value_step = scale_of(tl.max(tl.abs(value.to(tl.float32)), 0))
            whole_key, whole_value = whole(key, key_step), whole(value, value_step)
            tl.store(k_scale + place // D, key_step)
            tl.store(v_scale + place // D, value_step)
            tl.store(k_cache + place + d, whole_key.to(tl.int8))
            tl.store(v_cache + place + d, whole_value.to(tl.int8))
            key = (whole_key * key_step.to(tl.float32)).to(dtype)
            value = (whole_value * value_step.to(tl.float32)).to(dtype)
        else:
            tl.store(k_cache + place + d, key)
            tl.store(v_cache + place + d, value)
        best = tl.sum(q.to(tl.float32) * key[None, :].to(tl.float32), 1) * log2_scale
        total += 1.0
        acc += value[None, :].to(tl.float32)
    share = tl.cdiv(tl.cdiv(past, splits), TILE) * TILE
    end = tl.minimum((split + 1) * share, past)
    for start in range(split * share, end, TILE):
        token = start + tl.arange(0, TILE)
        live = token < end
        block = tl.load(row_table + token // BLOCK_TOKENS, mask=live, other=0).to(tl.int64)
        place = (block * KV + kv) * BLOCK_TOKENS * D + (token % BLOCK_TOKENS) * D
        k = tl.load(k_cache + place[None, :] + d[:, None], mask=live[None, :], other=0)
        if QUANT:
            k = narrow8(k, dtype)
        score = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * log2_scale
        if QUANT:
            score = score * tl.load(k_scale + place // D, mask=live, other=0.0).to(tl.float32)[None, :]
        score = tl.where(live[None, :], score, float("-inf"))
        highest = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp2(score - highest[:, None])
        shrink = tl.exp2(best - highest)
        v = tl.load(v_cache + place[:, None] + d[None, :], mask=live[:, None], other=0)
        scaled = weight
        if QUANT:
            v = narrow8(v, dtype)
            scaled = weight * tl.load(v_scale + place // D, mask=live, other=0.0).to(tl.float32)[None, :]
        acc = acc * shrink[:, None] + tl.dot(scaled.to(dtype), v, input_precision="ieee" if EXACT else "tf32")
        total = total * shrink + tl.sum(weight, 1)
        best = highest
    head = row * HEADS + kv * GROUP + tl.arange(0, PAD)
    live_head = tl.arange(0, PAD) < GROUP
    if splits == 1:
        tl.store(out + head[:, None] * D + d[None, :], (acc / total[:, None]).to(dtype), mask=live_head[:, None])
    else:
        here = (item * KV + kv) * GROUP + tl.arange(0, PAD)
        share_of = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(partial + here[:, None] * D + d[None, :], share_of, mask=live_head[:, None])
        tl.store(lse + here, tl.where(total > 0, best + tl.log2(total), float("-inf")), mask=live_head)
        tl.debug_barrier()  # the whole program has stored its share before it counts itself
        if tl.atomic_add(arrived + row * KV + kv, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived + row * KV + kv, 0)
            best = tl.full([PAD], float("-inf"), tl.float32)
            total = tl.zeros([PAD], tl.float32)
            acc = tl.zeros([PAD, D], tl.float32)
            for part in tl.range(0, splits, loop_unroll_factor=4):  # share 0 holds the new token: after it `best` is finite
                there = ((first + part) * KV + kv) * GROUP + tl.arange(0, PAD)
                weight = tl.load(lse + there, mask=live_head, other=0.0, cache_modifier=".cg")
                at = partial + there[:, None] * D + d[None, :]
                share_of = tl.load(at, mask=live_head[:, None], other=0.0, cache_modifier=".cg")
                highest = tl.maximum(best, weight)
                shrink = tl.exp2(best - highest)
                weight = tl.exp2(weight - highest)
                acc = acc * shrink[:, None] + share_of * weight[:, None]
                total = total * shrink + weight
                best = highest
            tl.store(out + head[:, None] * D + d[None, :], (acc / total[:, None]).to(dtype), mask=live_head[:, None])


@dataclass(frozen=True, slots=True)
class Plan:
    """How the contexts of one batch are cut.

    Attributes:
        starts: first share of each row, and the number of all shares; [rows + 1].
        owner: row of each share; [shares that there can be].
        arrived: shares of each row and kv head that are done; 0 between kernels; [rows, kv_heads].
        tile, warps, stages: keys per step of a program, and how it is compiled.
    """

    starts: Tensor
    owner: Tensor
    arrived: Tensor
    tile: int
    warps: int
    stages: int


def plan(
    lengths: Tensor, slots: Tensor, kv_heads: int, arrived: Tensor, programs: int | None = None,
    compiled: tuple[int, int, int] = COMPILED,
) -> Plan:  # fmt: skip
    """Cut the contexts of `slots` into about `programs` / `kv_heads` shares of equal size; whole rows where rows are many.

    `arrived` is zeros for at least as many rows; every kernel that uses it leaves it so.
    """
    rows = len(slots)
    tile, warps, stages = compiled
    programs = programs or (FEW_PROGRAMS if rows <= 32 else PROGRAMS)
    starts = torch.empty(rows + 1, dtype=torch.int32, device=slots.device)
    owner = torch.empty(rows + programs // kv_heads + 1, dtype=torch.int32, device=slots.device)
    _plan[(1,)](
        lengths, slots, starts, owner, rows, KV=kv_heads, PROGRAMS=programs, TILE=tile,
        ROWS=triton.next_power_of_2(len(arrived)), num_warps=4,
    )  # fmt: skip
    return Plan(starts, owner, arrived, tile, warps, stages)


def paged_decode(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor, slots: Tensor, rope: Tensor | None,
    heads: int, scale: float, plan: Plan, scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention output [rows, heads * head_dim]; stores the new keys and values (not rotated where `rope` is None).

    `scales` (of k, of v) where the caches are int8.
    """
    rows = qkv.shape[0]
    _, kv_heads, block_tokens, head_dim = k_cache.shape
    out = torch.empty(rows, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty(len(plan.owner), heads, head_dim, dtype=torch.float32, device=qkv.device)
    lse = torch.empty(len(plan.owner), heads, dtype=torch.float32, device=qkv.device)
    group = heads // kv_heads
    k_scale, v_scale = scales or (qkv, qkv)
    _decode[(len(plan.owner), kv_heads)](
        qkv, k_cache, v_cache, k_scale, v_scale, tables, lengths, slots, qkv if rope is None else rope, out, partial, lse,
        plan.starts, plan.owner, plan.arrived, scale, tables.stride(0), rows,
        HEADS=heads, KV=kv_heads, D=head_dim, BLOCK_TOKENS=block_tokens, ROPE=rope is not None, GROUP=group,
        PAD=max(16, triton.next_power_of_2(group)), TILE=plan.tile, EXACT=qkv.dtype == torch.float32,
        QUANT=scales is not None, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out
