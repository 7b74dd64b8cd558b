"""Serving LoRA adapters beside the base model (Figure 13): how many may be in a batch, and what they cost.

vLLM 0.6.3 keeps at most `max_loras` adapters on the GPU at once: a waiting prompt whose adapter would be one too many is
passed over, those behind it go first (`Scheduler._schedule_prefills`). Its Punica kernels run in every layer of every
iteration while adapters are loaded.
"""

from __future__ import annotations

from collections import deque

from systems.common.engine.executor import Batch
from systems.common.engine.sequence import Sequence
from systems.common.engine.state import SchedulingState
from systems.common.hardware import Testbed
from systems.common.models import ModelShape

KERNELS = 6
"""Shrink and expand for each of q, k and v, the artifact's served adapters."""


class AdapterLimited:
    """Prompts first as `PrefillFirst`, with at most `max_loras` adapters among the running sequences."""

    def __init__(self, max_loras: int) -> None:
        self.max_loras = max_loras

    def form(self, state: SchedulingState) -> Batch:
        """Prompts if any can be admitted, else a decode step."""
        batch = Batch()
        if state.waiting:
            self._admit(state, batch)
        if not batch.chunks and state.decoding.count:
            state.make_room_for_decodes()
            batch.decodes, batch.decode_context = state.decoding.count, state.decoding.context
        return batch

    def _admit(self, state: SchedulingState, batch: Batch) -> None:
        config, budget = state.config, state.config.max_num_batched_tokens
        loaded = {sequence.request.adapter for sequence in state.running.values()} - {None}
        passed_over: deque[Sequence] = deque()
        while state.waiting and len(state.running) < config.max_num_seqs:
            first = state.waiting[0]
            adapter = first.request.adapter
            if adapter is not None and adapter not in loaded and len(loaded) >= self.max_loras:
                passed_over.append(state.waiting.popleft())
                continue
            tokens = first.prompt_tokens
            if tokens > budget or config.blocks(tokens) > state.free_blocks - config.watermark_blocks:
                break
            batch.chunks.append(state.extend(state.admit(), tokens))
            budget -= tokens
            loaded |= {adapter} - {None}
        state.waiting.extendleft(reversed(passed_over))


def iteration_s(shape: ModelShape, testbed: Testbed, rank: int, adapters: int) -> float:
    """Seconds that serving up to `adapters` adapters of `rank` adds to an iteration: kernels, and each adapter read once."""
    gpu = testbed.gpu
    moved = adapters * rank * (3 * shape.hidden + shape.q_width + 2 * shape.kv_width) * shape.dtype_bytes / testbed.count
    return shape.layers * (KERNELS * gpu.launch_s + moved / gpu.bandwidth)
