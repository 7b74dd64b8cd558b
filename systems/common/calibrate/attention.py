"""One layer's attention: the engine's own, through the paths that it would take for the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from systems.common.calibrate.bench import Bench
from systems.common.calibrate.clock import Clock
from systems.common.calibrate.grid import AttentionPoint, PromptsPoint
from systems.common.calibrate.steps import decode_before
from systems.common.torch_engine.attention import Chunks


def attention_s(bench: Bench, clock: Clock, points: Iterable[AttentionPoint]) -> Iterator[tuple[AttentionPoint, float]]:
    """Seconds of one layer's attention (rotary embedding and cache writes included) at each point, the mean over the layers."""
    for point in points:
        chunk, past, rows, context = point
        yield point, _layer_s(bench, clock, rows, context, chunk, past, 1 if chunk else 0)


def several_s(bench: Bench, clock: Clock, points: Iterable[PromptsPoint]) -> Iterator[tuple[PromptsPoint, float]]:
    """The same for several whole prompts of one length in a step, beside decoding sequences."""
    for point in points:
        prompts, tokens, rows, context = point
        yield point, _layer_s(bench, clock, rows, context, tokens, 0, prompts)


def _layer_s(bench: Bench, clock: Clock, rows: int, context: int, chunk: int, past: int, prompts: int) -> float:
    model, shape = bench.live.executor.model, bench.shape
    bench.fill(rows, context, chunk, past, max(1, prompts))
    slots = torch.arange(rows, device=bench.device)
    chunks = _chunks(bench, rows, chunk, past, prompts) if prompts else None
    width = shape.q_width + 2 * shape.kv_width
    qkv = torch.randn(rows + prompts * chunk, width, device=bench.device).to(bench.weights.embedding.dtype)

    def work() -> Tensor:
        out = qkv
        for layer in range(shape.layers):
            out = model._attend(qkv, layer, slots, chunks)
        return out

    if prompts > 1 and chunks is not None and chunks.host is not None:
        # launched kernel by kernel, as the engine does; behind decode steps, so that the host is ahead of the GPU
        rewind = partial(bench.rewind, rows, context, chunk, past, prompts)
        return clock.call_s(work, partial(decode_before, bench, rows, rewind, 2)) / shape.layers
    return clock.time_s(work) / shape.layers


def _chunks(bench: Bench, rows: int, chunk: int, past: int, prompts: int) -> Chunks:
    """Prompt chunks; a batch that has a graph does not know its chunks on the host, and takes other kernels."""
    places = list(range(rows, rows + prompts))
    made = Chunks.of([past] * prompts, [chunk] * prompts, places, bench.device)
    _, graphed = bench.live.executor.steps.bucket(rows, prompts * chunk, prompts)
    host = None if graphed else np.array([[i * chunk, past, chunk, place] for i, place in enumerate(places)], np.int32)
    return Chunks(made.table, host, made.starts, made.positions, made.slots, made.tiles)
