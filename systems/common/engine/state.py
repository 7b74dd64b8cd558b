"""Waiting and running sequences and the free KV blocks: admission, preemption, completion.

Policies decide with this; they never touch a clock. The invariant that tests hold it to: blocks in use plus free
blocks is the pool, and a sequence is in exactly one of waiting, prefilling, decoding or finished.
"""

from __future__ import annotations

from collections import deque

from systems.common.engine.config import EngineConfig
from systems.common.engine.decoding import DecodingGroup
from systems.common.engine.executor import Batch
from systems.common.engine.sequence import Sequence


class SchedulingState:
    """What a batching policy sees.

    Attributes:
        waiting: sequences not admitted, first come first; preempted ones return to the front.
        running: admitted sequences in order of admission (a dictionary, for its order and cheap removal).
        partial: the admitted sequence whose prompt is only partly in the KV cache (there is at most one).
        decoding: those past their prefill.
        free_blocks: KV blocks that no sequence holds.
    """

    __slots__ = ("config", "decoding", "free_blocks", "partial", "preemptions", "running", "waiting")

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self.partial: Sequence | None = None
        self.decoding = DecodingGroup(config.block_tokens)
        self.free_blocks = config.num_gpu_blocks
        self.preemptions = 0

    def held_blocks(self, sequence: Sequence) -> int:
        """KV blocks that a running sequence holds."""
        decodes = sequence.finish_clock >= 0
        return self.config.blocks(self.decoding.tokens(sequence) if decodes else sequence.prefilled)

    def admit(self) -> Sequence:
        """Move the head of the queue to the running sequences."""
        sequence = self.waiting.popleft()
        self.running[sequence.index] = sequence
        return sequence

    def extend(self, sequence: Sequence, tokens: int) -> tuple[Sequence, int, int]:
        """Take the blocks for `tokens` more prompt tokens of `sequence`; the chunk for the batch."""
        past = sequence.prefilled
        self.free_blocks -= self.config.blocks(past + tokens) - self.config.blocks(past)
        sequence.prefilled = past + tokens
        return sequence, past, tokens

    def preempt_last(self) -> Sequence:
        """Throw out the sequence admitted last; it will recompute its prompt and the tokens it had generated."""
        _, sequence = self.running.popitem()
        self.free_blocks += self.held_blocks(sequence)
        if sequence is self.partial:
            self.partial = None
        else:
            # its tokens so far become prompt: `leave` adds what was generated since it joined
            tokens = self.decoding.tokens(sequence)
            self.decoding.leave(sequence)
            sequence.spans[-1] = (*sequence.spans[-1][:2], self.decoding.clock)
            sequence.prompt_tokens = tokens + 1  # the newest token is not in the KV cache yet
        sequence.prefilled = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, waiting or running, and free its blocks. Raises ValueError when it is neither."""
        if self.running.get(sequence.index) is not sequence:
            self.waiting.remove(sequence)
            return
        self.free_blocks += self.held_blocks(sequence)
        if sequence is self.partial:
            self.partial = None
        else:
            self.decoding.leave(sequence)
            sequence.spans[-1] = (*sequence.spans[-1][:2], self.decoding.clock)
        del self.running[sequence.index]

    def make_room_for_decodes(self) -> bool:
        """Preempt from the back until one decode step of the rest fits; whether anyone was preempted."""
        if self.decoding.blocks_for_next_step() <= self.free_blocks:
            return False
        while self.decoding.blocks_for_next_step() > self.free_blocks:
            self.preempt_last()
        return True

    def decode(self, steps: int) -> list[Sequence]:
        """Advance the decoding sequences by `steps` tokens; those that end with it."""
        decoding = self.decoding
        self.free_blocks -= decoding.blocks_for(steps)
        decoding.advance(steps)
        done = decoding.pop_finished()
        for sequence in done:
            self._release(sequence, sequence.prompt_tokens + decoding.clock - sequence.join_clock)
        return done

    def prefill(self, batch: Batch, end_s: float) -> list[Sequence]:
        """Complete the chunks of `batch`, which ends at `end_s`; sequences that end with their first token."""
        done = []
        self.partial = None
        for sequence, past, tokens in batch.chunks:
            if past + tokens < sequence.prompt_tokens:
                self.partial = sequence
                continue
            sequence.generated += 1
            if sequence.generated == 1:
                sequence.first_token_s = end_s
            sequence.spans.append((end_s, self.decoding.clock, -1))
            if sequence.generated < sequence.output_tokens:
                self.decoding.join(sequence)
            else:
                self._release(sequence, sequence.prompt_tokens)
                done.append(sequence)
        return done

    def _release(self, sequence: Sequence, tokens: int) -> None:
        self.free_blocks += self.config.blocks(tokens)
        start_s, clock, _ = sequence.spans[-1]
        sequence.spans[-1] = (start_s, clock, self.decoding.clock)
        del self.running[sequence.index]
