# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Rotary embedding of q and k in place, and the new keys and values written to the paged cache.

    qkv: [tokens, (heads + 2 kv_heads) * head_dim]; positions, slots: [tokens]; tables: [slots, blocks of a sequence]
    caches: [blocks, kv_heads, block_tokens, head_dim] of one layer; rope: [positions, head_dim] (cos | sin, half each)

With scales ([blocks, kv_heads, block_tokens]) the caches are int8 (`cache.rounded`), and qkv keeps what they hold, so that
whatever attends to the new tokens sees the same numbers now and later.

Bytes floor per token: read and write q and k, read v, write k and v: (2 q + 5 kv) * head_dim * size. One program per token.
"""

from __future__ import annotations

from torch import Tensor

from systems.common.torch_engine.kernels.integers import scale_of, whole
from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _rope_write(
    qkv, k_cache, v_cache, k_scale, v_scale, tables, positions, slots, rope,
    row_width, table_width,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ROPE: tl.constexpr, PAD: tl.constexpr,
    KV_PAD: tl.constexpr, QUANT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    slot = tl.load(slots + token).to(tl.int64)
    block = tl.load(tables + slot * table_width + position // BLOCK_TOKENS).to(tl.int64)
    place = block * KV * BLOCK_TOKENS * D + (position % BLOCK_TOKENS) * D
    head = tl.arange(0, PAD)[:, None]
    low = tl.arange(0, D // 2)[None, :]
    row = qkv + token * row_width
    live = head < HEADS + KV
    first = tl.load(row + head * D + low, mask=live, other=0.0)
    second = tl.load(row + head * D + D // 2 + low, mask=live, other=0.0)
    if ROPE:
        cos = tl.load(rope + position * D + low)
        sin = tl.load(rope + position * D + D // 2 + low)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cos - b * sin).to(first.dtype)
        second = (b * cos + a * sin).to(second.dtype)
        tl.store(row + head * D + low, first, mask=live)
        tl.store(row + head * D + D // 2 + low, second, mask=live)
    key = live & (head >= HEADS)
    target = k_cache + place + (head - HEADS) * BLOCK_TOKENS * D + low
    value_head = tl.arange(0, KV_PAD)[:, None]
    every = tl.arange(0, D)[None, :]
    valued = value_head < KV
    value_at = row + (HEADS + KV + value_head) * D + every
    value = tl.load(value_at, mask=valued, other=0.0)
    if QUANT:
        scales = block * KV * BLOCK_TOKENS + position % BLOCK_TOKENS
        most = tl.maximum(tl.max(tl.abs(first.to(tl.float32)), 1), tl.max(tl.abs(second.to(tl.float32)), 1))
        step = scale_of(most)[:, None]
        one, two = whole(first, step), whole(second, step)
        tl.store(row + head * D + low, (one * step.to(tl.float32)).to(first.dtype), mask=key)
        tl.store(row + head * D + D // 2 + low, (two * step.to(tl.float32)).to(first.dtype), mask=key)
        tl.store(k_scale + scales + (head - HEADS) * BLOCK_TOKENS, step, mask=key)
        value_step = scale_of(tl.max(tl.abs(value.to(tl.float32)), 1))[:, None]
        rounded = whole(value, value_step)
        tl.store(value_at, (rounded * value_step.to(tl.float32)).to(value.dtype), mask=valued)
        tl.store(v_scale + scales + value_head * BLOCK_TOKENS, value_step, mask=valued)
        first, second, value = one.to(tl.int8), two.to(tl.int8), rounded.to(tl.int8)
    tl.store(target, first, mask=key)
    tl.store(target + D // 2, second, mask=key)
    tl.store(v_cache + place + value_head * BLOCK_TOKENS * D + every, value, mask=valued)


def rope_write(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    positions: Tensor,
    slots: Tensor,
    rope: Tensor | None,
    heads: int,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Rotate q and k of `qkv` in place (unless `rope` is None) and store k and v; int8 with `scales` (of k, of v)."""
    _, kv_heads, block_tokens, head_dim = k_cache.shape
    k_scale, v_scale = scales or (qkv, qkv)
    _rope_write[(qkv.shape[0],)](
        qkv, k_cache, v_cache, k_scale, v_scale, tables, positions, slots, qkv if rope is None else rope, qkv.stride(0),
        tables.stride(0),
        HEADS=heads, KV=kv_heads, D=head_dim, BLOCK_TOKENS=block_tokens, ROPE=rope is not None,
        PAD=triton.next_power_of_2(heads + kv_heads), KV_PAD=triton.next_power_of_2(kv_heads),
        QUANT=scales is not None, num_warps=4,
    )  # fmt: skip
