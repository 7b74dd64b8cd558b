# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Causal attention of prompt chunks over the paged KV cache (FlashAttention-2's loop, keys gathered by block table).

A chunk's queries sit at positions past .. past + new - 1 of its sequence, whose keys and values (the chunk's own included)
are in the cache already. A program serves TILE_Q queries of one head of one chunk.

    q: [tokens, row width] (first heads * head_dim columns); per tile: chunk and first query; per chunk: first token in q,
    past, new, slot
    out: [tokens, heads * head_dim]

With scales ([blocks, kv_heads, block_tokens]) the caches are int8, as in `paged_decode`.

FLOPs floor: 4 * heads * head_dim * (pairs of query and visible key); bytes: q, out and each chunk's keys and values once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.integers import narrow8
from systems.common.torch_engine.kernels.triton_guard import jit, tl


@jit
def _prefill(
    q, k_cache, v_cache, k_scale, v_scale, tables, tiles, chunks, out, scale, q_width, table_width,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, EXACT: tl.constexpr, QUANT: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    kv = head // (HEADS // KV)
    chunk = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    start, past = tl.load(chunks + 4 * chunk).to(tl.int64), tl.load(chunks + 4 * chunk + 1)
    new, slot = tl.load(chunks + 4 * chunk + 2), tl.load(chunks + 4 * chunk + 3).to(tl.int64)
    i = first + tl.arange(0, TILE_Q)
    d = tl.arange(0, D)
    live_q = i < new
    query = tl.load(q + (start + i)[:, None] * q_width + head * D + d[None, :], mask=live_q[:, None], other=0.0)
    best = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    end = past + tl.minimum(first + TILE_Q, new)
    for begin in range(0, end, TILE_K):
        token = begin + tl.arange(0, TILE_K)
        live = token < end
        block = tl.load(tables + slot * table_width + token // BLOCK_TOKENS, mask=live, other=0).to(tl.int64)
        place = (block * KV + kv) * BLOCK_TOKENS * D + (token % BLOCK_TOKENS) * D
        k = tl.load(k_cache + place[None, :] + d[:, None], mask=live[None, :], other=0)
        if QUANT:
            k = narrow8(k, query.dtype)
        score = tl.dot(query, k, input_precision="ieee" if EXACT else "tf32") * log2_scale
        if QUANT:
            score = score * tl.load(k_scale + place // D, mask=live, other=0.0).to(tl.float32)[None, :]
        score = tl.where(token[None, :] <= (past + i)[:, None], score, float("-inf"))
        highest = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp2(score - highest[:, None])
        shrink = tl.exp2(best - highest)
        v = tl.load(v_cache + place[:, None] + d[None, :], mask=live[:, None], other=0)
        scaled = weight
        if QUANT:
            v = narrow8(v, query.dtype)
            scaled = weight * tl.load(v_scale + place // D, mask=live, other=0.0).to(tl.float32)[None, :]
        acc = acc * shrink[:, None] + tl.dot(scaled.to(v.dtype), v, input_precision="ieee" if EXACT else "tf32")
        total = total * shrink + tl.sum(weight, 1)
        best = highest
    acc = acc / total[:, None]
    tl.store(out + ((start + i) * HEADS + head)[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=live_q[:, None])


TILE_Q = 128


def paged_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, tiles: Tensor, chunks: Tensor, heads: int, scale: float,
    tile_k: int = 64, warps: int = 4, stages: int = 3, scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention output [tokens, heads * head_dim]; `tiles` (chunk, first query); `chunks` (first token, past, new, slot).

    `scales` (of k, of v) where the caches are int8.
    """
    _, kv_heads, block_tokens, head_dim = k_cache.shape
    out = torch.empty(q.shape[0], heads * head_dim, dtype=q.dtype, device=q.device)
    exact = q.dtype == torch.float32
    k_scale, v_scale = scales or (q, q)
    _prefill[(tiles.shape[0], heads)](
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        tables,
        tiles,
        chunks,
        out,
        scale,
        q.stride(0),
        tables.stride(0),
        HEADS=heads,
        KV=kv_heads,
        D=head_dim,
        BLOCK_TOKENS=block_tokens,
        TILE_Q=TILE_Q,
        TILE_K=32 if exact else tile_k,
        EXACT=exact,
        QUANT=scales is not None,
        num_warps=8 if exact else warps,
        num_stages=stages,
    )
    return out
