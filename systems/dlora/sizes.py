"""Sizes that follow from a model's shape and an adapter's rank (sheet, 2.2)."""

from __future__ import annotations

from systems.common.models import ModelShape

RANK = 16
GIB = 2**30
HOST_LINK = 32 * GIB
"""Bytes per second between host and GPU that the artifact reckons with."""


def targets(shape: ModelShape, rank: int = RANK) -> tuple[tuple[int, int, int], ...]:
    """The adapted products of a layer as (inputs, rank, outputs): fused qkv (rank 3r), o, fused gate and up, down."""
    qkv = shape.q_width + 2 * shape.kv_width
    return (
        (shape.hidden, 3 * rank, qkv),
        (shape.q_width, rank, shape.hidden),
        (shape.hidden, rank, shape.up_width),
        (shape.mlp, rank, shape.hidden),
    )


def adapter_parameters(shape: ModelShape, rank: int = RANK) -> int:
    """Parameters of one adapter, all layers."""
    return shape.layers * sum(inner * r + r * outer for inner, r, outer in targets(shape, rank))


def adapter_bytes(shape: ModelShape, rank: int = RANK) -> int:
    """Bytes of one adapter in the model's number format: 100,925,440 for Llama-2-7B, as in the artifact."""
    return int(adapter_parameters(shape, rank) * shape.dtype_bytes)


def adapted_bytes(shape: ModelShape) -> int:
    """Bytes of the base weights that merging reads and writes: all linears of the decoder layers."""
    return int(shape.layers * sum(inner * outer for inner, _, outer in targets(shape)) * shape.dtype_bytes)


def kv_block_bytes(shape: ModelShape, block_tokens: int = 16) -> int:
    """Bytes of a KV block."""
    return int(shape.kv_bytes_per_token * block_tokens)
