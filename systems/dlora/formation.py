"""From an ordered list of requests to a batch: token budget, KV blocks, preemption by swapping (sheet, 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from systems.common.engine.config import EngineConfig
from systems.dlora.requests import LoraSequence, Place, RequestQueue


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
        return self.prefills + self.decodes

    @property
    def adapters(self) -> list[int]:
        """Distinct adapters, in order of appearance."""
        return list(dict.fromkeys([s.adapter for s in self.prefills] + [s.adapter for s in self.decodes]))


class KvPool:
    """The KV blocks of a replica, and who holds how many. Raises nothing: what does not fit waits."""

    __slots__ = ("config", "free_blocks")

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.free_blocks = config.num_gpu_blocks

    def held(self, sequence: LoraSequence) -> int:
        """Blocks that `sequence` holds on the GPU."""
        return self.config.blocks(sequence.context) if sequence.place is Place.READY else 0

    def release(self, sequence: LoraSequence) -> None:
        """Free the blocks of `sequence`."""
        self.free_blocks += self.held(sequence)

    def grow(self, sequences: Sequence[LoraSequence], steps: int) -> int:
        """Blocks that `steps` more tokens for each of `sequences` take."""
        blocks = self.config.blocks
        return sum([blocks(s.context + steps) - blocks(s.context) for s in sequences])

    def steps_within(self, sequences: Sequence[LoraSequence], steps: int) -> int:
        """Most of `steps` that the free blocks allow."""
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
        batch, tokens, reserved = Batch(), 0, 0
        for sequence in order:
            if len(batch) == self.config.max_num_seqs:
                break
            need, cost = self._need(sequence)
            watermark = 0 if sequence.place is Place.READY or not len(batch) else self.config.watermark_blocks
            if len(batch) and tokens + cost > self.config.max_num_batched_tokens:
                break
            if need > self.free_blocks - reserved - watermark:
                may_evict = sequence.place is Place.READY or not len(batch)
                if not (may_evict and self._evict(need + reserved, sequence, batch, queue)):
                    break
            tokens += cost
            reserved += self._admit(sequence, need, batch)
        return batch

    def _need(self, sequence: LoraSequence) -> tuple[int, int]:
        """Blocks and tokens of one iteration of `sequence`."""
        blocks = self.config.blocks
        if sequence.place is Place.WAITING:
            return blocks(sequence.prompt_tokens), sequence.prompt_tokens
        grown = blocks(sequence.context + 1)
        return grown - (blocks(sequence.context) if sequence.place is Place.READY else 0), 1

    def _admit(self, sequence: LoraSequence, need: int, batch: Batch) -> int:
        """Put `sequence` into the batch; the blocks that its coming token will take."""
        if sequence.place is Place.WAITING:
            self.free_blocks -= need
            batch.prefills.append(sequence)
            return 0
        if sequence.place is Place.SWAPPED:
            back = self.config.blocks(sequence.context)
            self.free_blocks -= back
            batch.swapped_in_blocks += back
            sequence.place = Place.READY
            need -= back
        batch.decodes.append(sequence)
        return need

    def _evict(self, need: int, keep: LoraSequence, batch: Batch, queue: RequestQueue) -> bool:
        """Swap out running requests from the tail until `need` blocks are free; whether they are."""
        inside = {keep, *batch.decodes}
        for victim in reversed(queue.order):
            if need <= self.free_blocks:
                break
            if victim.place is Place.READY and victim not in inside:
                batch.swapped_out_blocks += self.held(victim)
                self.release(victim)
                victim.place = Place.SWAPPED
                victim.preemptions += 1
        return need <= self.free_blocks
