"""All sequences that decode, kept so that advancing them by any number of steps costs the same.

Every decoding sequence gains one token per decode step, so one counter, the **decode clock**, stands for the progress of all of
them: a sequence that joined at clock c with n tokens in its KV cache holds n + (clock - c) now, and is done at clock
c + (tokens still to come). Two sums over the group are all that a batch needs: how many sequences, and how many tokens they
hold. Which of them need a new KV block at a step depends only on (n - c) modulo the block size, so a histogram over
that remainder counts new blocks without touching any sequence.
"""

from __future__ import annotations

from heapq import heappop, heappush

from systems.common.engine.sequence import Sequence

FOREVER = 1 << 60


class DecodingGroup:
    """The decoding sequences of one engine.

    Attributes:
        clock: decode steps taken so far.
        count: sequences in the group.
        context: tokens that they hold in the KV cache, in all.
    """

    __slots__ = ("_block", "_finishing", "_phases", "clock", "context", "count")

    def __init__(self, block_tokens: int) -> None:
        self.clock = 0
        self.count = 0
        self.context = 0
        self._block = block_tokens
        self._phases = [0] * block_tokens
        self._finishing: list[tuple[int, int, Sequence]] = []

    def tokens(self, sequence: Sequence) -> int:
        """Tokens that a decoding `sequence` holds in the KV cache."""
        return sequence.prompt_tokens + self.clock - sequence.join_clock

    def join(self, sequence: Sequence) -> None:
        """Take in a sequence whose prefill has just ended and which still has tokens to come."""
        clock = self.clock
        sequence.join_clock = clock
        sequence.finish_clock = clock + sequence.output_tokens - sequence.generated
        self.count += 1
        self.context += sequence.prompt_tokens
        self._phases[(sequence.prompt_tokens - clock) % self._block] += 1
        heappush(self._finishing, (sequence.finish_clock, sequence.index, sequence))

    def leave(self, sequence: Sequence) -> None:
        """Let a sequence go; its progress is written back to it. Its entry in the heap is dropped when it surfaces."""
        self.count -= 1
        self.context -= self.tokens(sequence)
        self._phases[(sequence.prompt_tokens - sequence.join_clock) % self._block] -= 1
        sequence.generated += self.clock - sequence.join_clock
        sequence.finish_clock = -1

    def steps_to_finish(self) -> int:
        """Steps until the next sequence ends; a very large number when there is none."""
        finishing = self._finishing
        while finishing:
            clock, _, sequence = finishing[0]
            if sequence.finish_clock == clock:
                return clock - self.clock
            heappop(finishing)
        return FOREVER

    def advance(self, steps: int) -> None:
        """Give every sequence `steps` more tokens."""
        self.clock += steps
        self.context += steps * self.count

    def pop_finished(self) -> list[Sequence]:
        """Remove and return the sequences whose last token has come, in order of their index."""
        finishing, clock = self._finishing, self.clock
        done: list[Sequence] = []
        while finishing and finishing[0][0] <= clock:
            at, _, sequence = heappop(finishing)
            if sequence.finish_clock == at:
                done.append(sequence)
                self.leave(sequence)
        return done

    def blocks_for_next_step(self) -> int:
        """KV blocks that the next decode step adds."""
        return self._phases[-self.clock % self._block]

    def blocks_for(self, steps: int) -> int:
        """KV blocks that the next `steps` decode steps add."""
        cycles, rest = divmod(steps, self._block)
        if not self.count:
            return 0
        need = cycles * self.count
        for step in range(self.clock, self.clock + rest):
            need += self._phases[-step % self._block]
        return need

    def steps_within(self, free_blocks: int) -> int:
        """Most decode steps that `free_blocks` new blocks allow."""
        if not self.count:
            return FOREVER
        cycles, left = divmod(free_blocks, self.count)
        steps = cycles * self._block
        # one more whole cycle would need `count` > `left` blocks, so this ends within a cycle
        while (need := self._phases[-(self.clock + steps) % self._block]) <= left:
            left -= need
            steps += 1
        return steps
