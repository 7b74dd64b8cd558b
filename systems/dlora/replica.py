"""One replica: queue, KV pool, adapter slots, a policy, and the step on a virtual clock.

`begin` decides an iteration and prices it; while nothing can change the decision many equal decode iterations are taken at
once. `interrupt` shortens such a run to the first iteration boundary at or after a new event (an arrival, a migration), so
jumping never changes what happens. `end` books the run. Whoever drives it owns the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from systems.common.engine.config import EngineConfig
from systems.common.engine.executor import DecodeRun
from systems.common.errors import InputError
from systems.dlora.costs import Iteration, ReplicaCosts
from systems.dlora.formation import READY, Batch, KvPool
from systems.dlora.policies import Plan, Policy
from systems.dlora.requests import LoraSequence, Place, RequestQueue
from systems.dlora.slots import Slots


@dataclass(slots=True)
class Run:
    """Equal iterations under way.

    Attributes:
        start_s: when the first began. `overhead_s`: switching, loads and swaps before it, seconds.
        line: durations of the iterations. `steps`: how many will be run.
    """

    plan: Plan
    batch: Batch
    start_s: float
    overhead_s: float
    line: DecodeRun
    steps: int

    def end_s(self) -> float:
        """When the last iteration ends."""
        return self.start_s + self.overhead_s + self.line.duration_s(self.steps)


class Replica:
    """One model replica.

    Attributes:
        queue: unfinished requests. `pool`: KV blocks. `slots`: adapters on the GPU.
        run: what is under way, or None.
        busy_s, switching_s, loading_s: seconds spent in iterations, changes of mode, adapter copies.
        switches: passes over the weights (a change from one merged adapter to another is two).
        iterations, decisions: iterations run, and how often the policy was asked.
    """

    def __init__(self, index: int, config: EngineConfig, policy: Policy, costs: ReplicaCosts, slots: Slots) -> None:
        self.index, self.config, self.policy, self.costs, self.slots = index, config, policy, costs, slots
        self.queue = RequestQueue()
        self.pool = KvPool(config)
        self.run: Run | None = None
        self.busy_s = self.switching_s = self.loading_s = 0.0
        self.switches = self.iterations = self.decisions = 0
        self.adapter_time: dict[int, tuple[float, int]] = {}
        self.jumps = True
        """False: one iteration per run, for tests."""

    def submit(self, sequence: LoraSequence) -> None:
        """Queue a request, in its turn.

        Raises:
            InputError: it could never finish here.
        """
        self.config.check(sequence.request.input_tokens, sequence.output_tokens)
        sequence.replica = self.index
        self.queue.add(sequence)

    def withdraw(self, sequence: LoraSequence, keep_cache: bool = False) -> None:
        """Let a request go (between runs only). Without `keep_cache` it will be prefilled anew."""
        assert self.run is None, "a request was withdrawn during an iteration"
        self.queue.remove(sequence)
        self.pool.release(sequence)
        if keep_cache and sequence.place is Place.READY:
            sequence.place = Place.SWAPPED  # its blocks are on their way, and are taken where it arrives
        elif not keep_cache:
            sequence.forget_cache()

    def begin(self, now_s: float) -> float:
        """Decide and start the next run; when it ends. The queue is not empty."""
        assert self.run is None and len(self.queue)
        plan = self.policy.plan(self.queue)
        self.decisions += 1
        batch = self.pool.form(plan.order, self.queue)
        assert len(batch), "a batch is never empty"
        adapters = batch.adapters if plan.merged is None else [plan.merged]
        overhead_s = self._prepare(plan, batch, adapters)
        context = sum([s.context for s in batch.decodes])
        merged = plan.merged is not None
        chunks = tuple([s.prompt_tokens for s in batch.prefills])
        priced = Iteration(merged, chunks, len(batch.decodes), context, len(self.slots.resident), len(adapters))
        line = self.costs.run(priced)
        steps = 1 if chunks or overhead_s or not self.jumps else self._jump(plan, batch, line)
        self.run = Run(plan, batch, now_s, overhead_s, line, steps)
        for sequence in batch.prefills:
            if sequence.scheduled_s != sequence.scheduled_s:
                sequence.scheduled_s = now_s
        return self.run.end_s()

    def _prepare(self, plan: Plan, batch: Batch, adapters: list[int]) -> float:
        """Seconds of adapter copies, changes of mode and swaps before the first iteration."""
        slots = self.slots
        passes = 0 if plan.merged == slots.merged else (slots.merged is not None) + (plan.merged is not None)
        if passes:
            slots.merged = None
        loads = slots.take(adapters, self.queue.outstanding)
        slots.merged = plan.merged
        self.switches += passes
        switch_s = passes * self.costs.switch_s() if passes else 0.0
        load_s = self.costs.load_s(len(loads)) if loads else 0.0
        self.switching_s += switch_s
        self.loading_s += load_s
        blocks = batch.swapped_in_blocks + batch.swapped_out_blocks
        return switch_s + load_s + (self.costs.swap_s(blocks) if blocks else 0.0)

    def _jump(self, plan: Plan, batch: Batch, line: DecodeRun) -> int:
        steps = min([s.output_tokens - s.generated for s in batch.decodes])
        steps = min(steps, line.steps)
        if steps > 1:
            steps = min(steps, self.policy.repeats(plan, self.queue))
        if steps > 1:
            steps = self.pool.steps_within(batch.decodes, steps)
        return max(1, steps)

    def interrupt(self, at_s: float) -> float:
        """Something happens at `at_s`: end the run at the first iteration boundary from then on; when that is."""
        run = self.run
        assert run is not None
        if run.steps > 1 and run.end_s() > at_s:
            run.steps = min(run.steps, run.line.steps_until(max(0.0, at_s - run.start_s - run.overhead_s)))
        return run.end_s()

    def end(self) -> list[LoraSequence]:
        """Book the run; the requests that finished with it."""
        run = self.run
        assert run is not None
        self.run = None
        end_s, steps, batch = run.end_s(), run.steps, run.batch
        took_s = end_s - run.start_s
        self.busy_s += took_s
        self.iterations += steps
        self.policy.ran(run.plan, self.queue, steps)
        self.pool.free_blocks -= self.pool.grow(batch.decodes, steps)
        for sequence in batch.decodes:
            sequence.context += steps
            sequence.generated += steps
            sequence.executed_s += took_s
        for sequence in batch.prefills:
            sequence.context = sequence.prompt_tokens
            sequence.place = READY
            sequence.generated += 1
            sequence.executed_s += took_s
            if sequence.generated == 1:
                sequence.first_token_s = end_s
        done = [s for s in batch.sequences if s.generated >= s.output_tokens]
        for sequence in done:
            self.pool.release(sequence)
            self.queue.remove(sequence)
            sequence.finish_s = end_s
            spent, count = self.adapter_time.get(sequence.adapter, (0.0, 0))
            self.adapter_time[sequence.adapter] = (spent + sequence.executed_s, count + 1)
        return done

    def mean_execution_s(self, adapter: int, default_s: float = 5.0) -> float:
        """Mean time in executed iterations of a finished request of `adapter` (e_k); the artifact's 5 s before the first."""
        spent, count = self.adapter_time.get(adapter, (0.0, 0))
        return spent / count if count else default_s

    def lose(self) -> list[LoraSequence]:
        """The replica dies: its unfinished requests, all KV cache gone. What was under way is lost with it."""
        lost = list(self.queue)
        self.run = None
        self.queue = RequestQueue()
        self.pool = KvPool(self.config)
        for sequence in lost:
            sequence.forget_cache()
        return lost


def engine_config(blocks: int, batch: int = 16, tokens: int = 4096) -> EngineConfig:
    """The artifact's limits of a replica with `blocks` KV blocks.

    Raises:
        InputError: a limit that no engine could run with.
    """
    if not isinstance(batch, int) or batch < 1:
        raise InputError("dlora", "batch", batch, "give a whole number of at least 1")
    return EngineConfig(blocks, "chunked-prefill", 16, max(tokens, batch), batch, 0.01)
