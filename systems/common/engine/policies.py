"""Who runs in the next batch.

Both policies serve first come first served, give up the sequence admitted last when the KV cache is full, and recompute
what was given up. They differ in whether a prompt may be split and whether decoding sequences wait for prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from systems.common.engine.executor import Batch
from systems.common.engine.state import SchedulingState


class BatchingPolicy(Protocol):
    """Forms a batch from the state, taking the blocks of its prompt chunks; an empty batch when nothing can run."""

    def form(self, state: SchedulingState) -> Batch:
        """The next batch."""
        ...


class PrefillFirst:
    """vLLM 0.6.3's default: whole prompts as soon as they fit, and decoding sequences wait for them.

    A batch is either prompts (up to the token budget, leaving the watermark free) or one token for every decoding
    sequence. New prompts go first. (vLLM 0.6.3 `Scheduler._schedule_default`; llmstation sheet, section 4)
    """

    def form(self, state: SchedulingState) -> Batch:
        """Prompts if any can be admitted, else a decode step."""
        batch = Batch()
        if state.waiting:
            self._admit(state, batch)
        if not batch.chunks and state.decoding.count:
            state.make_room_for_decodes()
            batch.decodes, batch.decode_context = state.decoding.count, state.decoding.context
        return batch

    @staticmethod
    def _admit(state: SchedulingState, batch: Batch) -> None:
        config, waiting = state.config, state.waiting
        budget = config.max_num_batched_tokens
        while waiting and len(state.running) < config.max_num_seqs:
            tokens = waiting[0].prompt_tokens
            if tokens > budget or config.blocks(tokens) > state.free_blocks - config.watermark_blocks:
                return
            batch.chunks.append(state.extend(state.admit(), tokens))
            budget -= tokens


class ChunkedPrefill:
    """vLLM v1's and Sarathi-Serve's policy: every decoding sequence gets a token, prompts fill what is left of the budget.

    Order of service in one batch: decoding sequences, the prompt begun earlier, new prompts. Nobody is admitted in a batch that
    had to preempt. (vLLM v1 `Scheduler.schedule`; Sarathi-Serve, OSDI '24, section 4)
    """

    def form(self, state: SchedulingState) -> Batch:
        """One token for each decoding sequence, then prompt chunks up to the budget."""
        preempted = state.make_room_for_decodes()
        decoding = state.decoding
        batch = Batch([], decoding.count, decoding.context)
        if state.waiting or state.partial is not None:
            self._fill(state, batch, preempted)
        return batch

    @staticmethod
    def _fill(state: SchedulingState, batch: Batch, preempted: bool) -> None:
        config, decoding = state.config, state.decoding
        budget = config.max_num_batched_tokens - decoding.count
        if (sequence := state.partial) is not None and budget:
            tokens = min(budget, sequence.prompt_tokens - sequence.prefilled)
            need = config.blocks(sequence.prefilled + tokens) - config.blocks(sequence.prefilled)
            if need > state.free_blocks - decoding.blocks_for_next_step():
                state.preempt_last()  # the prompt begun last is the last admitted: it gives itself up
                return
            batch.chunks.append(state.extend(sequence, tokens))
            budget -= tokens
        if preempted:
            return
        waiting = state.waiting
        spare = config.watermark_blocks + decoding.blocks_for_next_step()
        while budget and waiting and len(state.running) < config.max_num_seqs:
            prompt = waiting[0].prompt_tokens
            tokens = min(budget, prompt)
            if config.blocks(prompt if config.reserve_prompt else tokens) > state.free_blocks - spare:
                return
            batch.chunks.append(state.extend(state.admit(), tokens))
            budget -= tokens


POLICIES: Mapping[str, Callable[[], BatchingPolicy]] = {"prefill-first": PrefillFirst, "chunked-prefill": ChunkedPrefill}
