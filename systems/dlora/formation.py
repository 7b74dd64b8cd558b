"""From an ordered list of requests to a batch: token budget, KV blocks, preemption by swapping (sheet, 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from systems.common.engine.config import EngineConfig
from systems.dlora.requests import LoraSequence, Place, RequestQueue

READY = Place.READY  # asked for every request of every iteration, where looking it up in the enumeration takes its time


@dataclass(slots=True)
class Batch:
    """One iteration, with mixed prefill and decode.

    Attributes:
        prefills: requests whose whole prompt (`prompt_tokens`) is computed.
        decodes: requests that get one more token.
        swapped_in_blocks, swapped_out_blocks: KV blocks that move between GPU and host first.
    """

    prefills: list[LoraSequence] = field(default_factory=list)
    decodes: list[LoraSequence] = field(default_factory=list)
    swapped_in_blocks: int = 0
    swapped_out_blocks: int = 0

    def __len__(self) -> int:
        return len(self.prefills) + len(self.decodes)

    @property
    def sequences(self) -> list[LoraSequence]:
        """All of it, prefills first."""
        return self.prefills + self.decodes if self.prefills else self.decodes

    @property
    def adapters(self) -> list[int]:
        """Distinct adapters, in order of appearance."""
        return list(dict.fromkeys([s.adapter for s in self.sequences]))


class KvPool:
    """The KV blocks of a replica, and who holds how many. Raises nothing: what does not fit waits."""

    __slots__ = ("config", "free_blocks")

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.free_blocks = config.num_gpu_blocks

    def held(self, sequence: LoraSequence) -> int:
        """Blocks that `sequence` holds on the GPU."""
        return self.config.blocks(sequence.context) if sequence.place is READY else 0

    def release(self, sequence: LoraSequence) -> None:
        """Free the blocks of `sequence`."""
        self.free_blocks += self.held(sequence)

    def grow(self, sequences: Sequence[LoraSequence], steps: int) -> int:
        """Blocks that `steps` more tokens for each of `sequences` take."""
        block = self.config.block_tokens
        return sum([(s.context + steps - 1) // block - (s.context - 1) // block for s in sequences])

    def steps_within(self, sequences: Sequence[LoraSequence], steps: int) -> int:
        """Most of `steps` that the free blocks allow."""
        if len(sequences) * self.config.blocks(steps) <= self.free_blocks:  # at most so many, whatever they hold
            return steps
        if self.grow(sequences, steps) <= self.free_blocks:
            return steps
        low, high = 0, steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.grow(sequences, middle) <= self.free_blocks else (low, middle)
        return low

    def form(self, order: Sequence[LoraSequence], queue: RequestQueue) -> Batch:
        """The first requests of `order` that fit, taking their blocks (a decode's block is taken when its step is booked).

        A decode without room swaps out the youngest running requests that are not in the batch. The same is done for the first
        request of `order`, whatever it is, so that a batch is never empty.
        """
        config = self.config
        most, budget, block = config.max_num_seqs, config.max_num_batched_tokens, config.block_tokens
        watermark = config.watermark_blocks
        batch, tokens, reserved = Batch(), 0, 0
        for count, sequence in enumerate(order[:most]):
            place = sequence.place
            if place is READY:  # nearly all: the block of its coming token, if that is the first one in it
                need, cost = 0 if sequence.context % block else 1, 1
                left_free = 0
            else:
                need, cost = self._need(sequence)
                left_free = watermark if count else 0
            if count and tokens + cost > budget:
                break
            if need > self.free_blocks - reserved - left_free:
                may_evict = place is READY or not count
                if not (may_evict and self._evict(need + reserved, sequence, batch, queue)):
                    break
            tokens += cost
            if place is READY:
                batch.decodes.append(sequence)
                reserved += need
            else:
                reserved += self._admit(sequence, need, batch)
        return batch

    def _need(self, sequence: LoraSequence) -> tuple[int, int]:
        """Blocks and tokens of one iteration of `sequence`, which is not on the GPU."""
        if sequence.place is Place.WAITING:
            return self.config.blocks(sequence.prompt_tokens), sequence.prompt_tokens
        return self.config.blocks(sequence.context + 1), 1

    def _admit(self, sequence: LoraSequence, need: int, batch: Batch) -> int:
        """Put `sequence`, which is not on the GPU, into the batch; the blocks that its coming token will take."""
        if sequence.place is Place.WAITING:
            self.free_blocks -= need
            batch.prefills.append(sequence)
            return 0
        back = self.config.blocks(sequence.context)
        self.free_blocks -= back
        batch.swapped_in_blocks += back
        sequence.place = READY
        batch.decodes.append(sequence)
        return need - back

    def _evict(self, need: int, keep: LoraSequence, batch: Batch, queue: RequestQueue) -> bool:
        """Swap out running requests from the tail until `need` blocks are free; whether they are."""
        inside = {keep, *batch.decodes}
        for victim in reversed(queue.order):
            if need <= self.free_blocks:
                break
            if victim.place is READY and victim not in inside:
                batch.swapped_out_blocks += self.held(victim)
                self.release(victim)
                victim.place = Place.SWAPPED
                victim.preemptions += 1
        return need <= self.free_blocks
