"""One layer's attention: the engine's own, through the paths that it would take for the batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from systems.common.calibrate.bench import Bench
from systems.common.calibrate.clock import Clock
from systems.common.calibrate.grid import AttentionPoint
from systems.common.torch_engine.attention import Chunks


def attention_s(bench: Bench, clock: Clock, points: Iterable[AttentionPoint]) -> dict[AttentionPoint, float]:
    """Seconds of one layer's attention (rotary embedding and cache writes included) at each point, the mean over the layers."""
    return {point: _point(bench, clock, point) for point in points}


def _point(bench: Bench, clock: Clock, point: AttentionPoint) -> float:
    chunk, past, rows, context = point
    model, shape = bench.live.executor.model, bench.shape
    bench.fill(rows, context, chunk, past)
    slots = torch.arange(rows, device=bench.device)
    chunks = _chunk(bench, rows, chunk, past) if chunk else None
    width = shape.q_width + 2 * shape.kv_width
    qkv = torch.randn(rows + chunk, width, device=bench.device).to(bench.weights.embedding.dtype)

    def work() -> Tensor:
        out = qkv
        for layer in range(shape.layers):
            out = model._attend(qkv, layer, slots, chunks)
        return out

    return clock.time_s(work) / shape.layers


def _chunk(bench: Bench, rows: int, chunk: int, past: int) -> Chunks:
    """One prompt chunk; a batch that has a graph does not know its chunks on the host, and takes other kernels."""
    made = Chunks.of([past], [chunk], [rows], bench.device)
    _, graphed = bench.live.executor.steps.bucket(rows, chunk, 1)
    host = None if graphed else np.array([[0, past, chunk, rows]], np.int32)
    return Chunks(made.table, host, made.starts, made.positions, made.slots, made.tiles)
