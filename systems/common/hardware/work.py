"""What each operator does: its matrix sizes, FLOPs and bytes on one GPU's share under tensor parallelism.

Tensor parallelism follows Megatron-LM (arXiv 1909.08053, section 3): q, k, v, gate and up are split by column, output
and down by row, the vocabulary across the GPUs; norms are repeated on every GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from systems.common.hardware.cost import Chunk
from systems.common.models import ModelShape


@dataclass(frozen=True, slots=True)
class Work:
    """What one kernel does: floating-point operations and bytes that cross the memory bus."""

    flops: float
    bytes: float


def gemm_work(rows: float, inner: float, columns: float, dtype_bytes: float) -> Work:
    """A product of (rows x inner) activations with (inner x columns) weights; both and the result cross the bus once."""
    moved = (inner * columns + rows * (inner + columns)) * dtype_bytes
    return Work(2.0 * rows * inner * columns, moved)


def gemm_shapes(model: ModelShape, tp: int) -> dict[str, tuple[float, float]]:
    """(inner, columns) of one layer's matrix products on one of `tp` GPUs, by operator name."""
    return {
        "qkv_proj": (model.hidden, model.q_width / tp + 2 * kv_heads_per_gpu(model, tp) * model.head_dim),
        "o_proj": (model.q_width / tp, model.hidden),
        "gate_up_proj": (model.hidden, model.up_width / tp),
        "down_proj": (model.mlp / tp, model.hidden),
    }


def elementwise_bytes(model: ModelShape, tp: int) -> dict[str, float]:
    """Bytes per token that one layer's other kernels move on one of `tp` GPUs, by operator name.

    `layernorm` (there are two) adds the residual in the same kernel: it reads and writes two rows.
    """
    size = model.dtype_bytes
    rotated = model.q_width / tp + kv_heads_per_gpu(model, tp) * model.head_dim
    rotary = 0.0 if model.positions else 2 * rotated * size
    return {
        "layernorm": 4 * model.hidden * size,
        "rotary_emb": rotary,
        "act_fn": (model.up_width + model.mlp) / tp * size,
    }


def kv_heads_per_gpu(model: ModelShape, tp: int) -> float:
    """KV heads that one of `tp` GPUs holds; a head is repeated where there are fewer of them than GPUs."""
    return max(1.0, model.kv_heads / tp)


def prefill_bytes(model: ModelShape, tp: int, chunks: Sequence[Chunk]) -> float:
    """Bytes that prefill attention moves on one of `tp` GPUs: queries, outputs, and every key and value once."""
    tokens = sum(chunk.tokens for chunk in chunks)
    keys = tokens + sum(chunk.past for chunk in chunks)
    shared = kv_heads_per_gpu(model, tp) / model.kv_heads
    return 2 * tokens * model.q_width / tp * model.dtype_bytes + keys * shared * model.layer_kv_bytes_per_token


def decode_row_bytes(model: ModelShape, tp: int) -> float:
    """Bytes of one decode's query and output in one layer, on one of `tp` GPUs."""
    return 2 * model.q_width / tp * model.dtype_bytes


def ring_bytes(size_bytes: float, tp: int) -> float:
    """Bytes that each GPU of a ring of `tp` sends for an all-reduce of `size_bytes`."""
    return 2 * (tp - 1) / tp * size_bytes
