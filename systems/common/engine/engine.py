"""The engine's step, and a driver that serves a list of requests.

`Engine.step(now)` forms a batch, has the executor run it and books the result. Between two changes of the batch, decode
steps are all alike but for their growing context, so they are taken in one jump: to the next ending sequence, the next arrival
that could change the batch, the last step that the free blocks allow, or the end of the executor's straight line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.executor import Batch, Executor
from systems.common.engine.policies import POLICIES, BatchingPolicy
from systems.common.engine.sequence import Sequence
from systems.common.engine.state import SchedulingState

Floats = NDArray[np.float64]


class Engine:
    """One replica.

    Attributes:
        state: queues and blocks; read it freely, change it never.
        finished: sequences that ended, in order of ending.
        steps: iterations taken.
        steps_log: per jump: decode clock at its start, steps, start, first duration and increment, seconds.
    """

    def __init__(self, config: EngineConfig, executor: Executor, policy: BatchingPolicy | None = None) -> None:
        """An idle engine; `policy` defaults to the one that `config` names."""
        self.config = config
        self.executor = executor
        self.policy = policy if policy is not None else POLICIES[config.policy]()
        self.state = SchedulingState(config)
        self.finished: list[Sequence] = []
        self.steps = 0
        self.steps_log: list[tuple[int, int, float, float, float]] = []

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.state.running or self.state.waiting)

    def submit(self, request: Request) -> Sequence:
        """Queue a request.

        Raises:
            InputError: it could never finish in this engine.
        """
        self.config.check(request.input_tokens, request.output_tokens)
        sequence = Sequence(request)
        self.state.waiting.append(sequence)
        return sequence

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """End an unfinished sequence before the next step, wherever it is; its blocks are free at once.

        Its `finish_s` stays NaN (a record says `CUT`). The engine is always between steps when this can be called; work that
        an executor has under way on a device may still write the old blocks, and comes before whatever is launched next.

        Raises:
            ValueError: the sequence has ended already, or is not of this engine.
        """
        self.state.remove(sequence)
        sequence.end_reason = reason
        self.finished.append(sequence)

    def step(self, now_s: float, horizon_s: float = math.inf) -> float:
        """Run one batch, or as many equal decode steps as fit before anything can change; when the last one ended.

        Args:
            now_s: time at which the batch starts.
            horizon_s: time of the next arrival; no jump starts a step after it.
        """
        state = self.state
        batch = self.policy.form(state)
        if batch.chunks:
            for sequence, past, _ in batch.chunks:
                if past == 0 and sequence.scheduled_s != sequence.scheduled_s:  # NaN: never scheduled before
                    sequence.scheduled_s = now_s
            duration_s = self.executor.run(batch)
            end_s = now_s + duration_s
            done: list[Sequence] = []
            if batch.decodes:
                self.steps_log.append((state.decoding.clock, 1, now_s, duration_s, 0.0))
                done = state.decode(1)
            done += state.prefill(batch, end_s)
            self.steps += 1
        else:
            assert batch.decodes, "a step was asked of an engine that has nothing to run"
            end_s, done = self._decode_jump(now_s, horizon_s, batch)
        if done:
            for sequence in done:
                sequence.finish_s = end_s
            self.finished += done
        return end_s

    def _decode_jump(self, now_s: float, horizon_s: float, batch: Batch) -> tuple[float, list[Sequence]]:
        state, decoding = self.state, self.state.decoding
        run = self.executor.decode_run(batch)
        steps = min(run.steps, decoding.steps_to_finish())
        if steps > 1:
            if decoding.blocks_for(steps) > state.free_blocks:
                steps = decoding.steps_within(state.free_blocks)
            # a queue that is not empty is blocked at its head, and only an ending sequence unblocks it
            if not state.waiting and now_s + run.duration_s(steps - 1) >= horizon_s:
                steps = min(steps, run.steps_until(horizon_s - now_s))
        self.executor.advanced(steps)
        self.steps_log.append((decoding.clock, steps, now_s, run.first_s, run.increment_s))
        self.steps += steps
        return now_s + run.duration_s(steps), state.decode(steps)

    def decode_step_ends_s(self) -> Floats:
        """Time at which each decode step ended, by decode clock: entry c is when the clock went from c to c + 1."""
        if not self.steps_log:
            return np.empty(0)
        log = np.array(self.steps_log)
        steps = log[:, 1].astype(np.int64)
        place = np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps)
        start, first, increment = (np.repeat(log[:, column], steps) for column in (2, 3, 4))
        return np.asarray(start + (place + 1) * first + increment * (place * (place + 1) / 2))

    def token_times_s(self, sequences: Iterable[Sequence]) -> list[Floats]:
        """Times of every output token of each finished sequence."""
        ends = self.decode_step_ends_s()
        return [
            np.concatenate([part for first, a, b in sequence.spans for part in (np.array([first]), ends[a:b])])
            for sequence in sequences
        ]


class LaunchAhead(Protocol):
    """How early an engine forms its batches.

    Attributes:
        decode_lead_s: how long before the end of a decode step the next batch is formed.
    """

    decode_lead_s: float

    def lead_s(self) -> float:
        """The same for the step that was taken last, whatever it was."""
        ...


def serve(
    engine: Engine, requests: Iterable[Request], until_s: float = math.inf, ahead: LaunchAhead | None = None
) -> list[Sequence]:
    """Serve `requests` (sorted by arrival) on a virtual clock from 0; every sequence, in order of arrival.

    Stops when all have finished, or once the clock passes `until_s`: the rest stay unfinished (their records say `CUT`).
    `ahead`: of an engine that forms batches before the step before them has ended.
    """
    sequences: list[Sequence] = []
    pending = iter(requests)
    coming = next(pending, None)
    now_s = lead = 0.0
    while now_s <= until_s:
        while coming is not None and coming.arrival_s <= now_s - lead:
            sequences.append(engine.submit(coming))
            coming = next(pending, None)
        next_arrival_s = coming.arrival_s if coming is not None else math.inf
        if engine.has_work:
            now_s = engine.step(now_s, min(next_arrival_s + (ahead.decode_lead_s if ahead else 0.0), until_s))
            lead = ahead.lead_s() if ahead else 0.0
        elif coming is not None:
            lead = 0.0  # nothing is on its way
            if next_arrival_s > now_s:
                now_s = engine.executor.idle(now_s, next_arrival_s)
        else:
            break
    return sequences
