"""Loops that drive an engine in wall-clock time: offline generation, and arrivals as they come.

The engine, its state and its policies are the simulator's very own. Since launches run one step ahead, the engine books a step
when the one before it ended; when all is done, `retime` replaces every booked time with the step's true end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.engine.sequence import Sequence
from systems.common.models import ModelShape
from systems.common.torch_engine.executor import TorchExecutor
from systems.common.torch_engine.weights import Weights


@dataclass(slots=True)
class Live:
    """An engine with the executor that runs it."""

    engine: Engine
    executor: TorchExecutor

    @classmethod
    def build(cls, shape: ModelShape, weights: Weights, config: EngineConfig, **options: object) -> Live:
        """An idle engine over `weights`; `options` are `TorchExecutor`'s."""
        executor = TorchExecutor(shape, weights, config, **options)  # type: ignore[arg-type]
        engine = Engine(config, executor)
        executor.attach(engine)
        return cls(engine, executor)

    def submit(self, request: Request) -> Sequence:
        """Queue a request. Raises InputError when it could never finish here."""
        self.executor.check(request)
        return self.engine.submit(request)

    def generate(self, requests: Iterable[Request]) -> tuple[list[Sequence], list[list[int]]]:
        """Serve `requests` all at once, whatever their arrival times; their sequences and output tokens in the same order."""
        requests = list(requests)
        sequences = self.serve(requests, wait=False)
        return sequences, [self.executor.outputs[s.index] for s in sequences]

    def serve(
        self, requests: Iterable[Request], wait: bool = True, put_off: bool = True, sleep: Callable[[float], None] = time.sleep
    ) -> list[Sequence]:
        """Serve `requests` (sorted by arrival) in real time from now; all sequences, in order of arrival, times since now.

        Args:
            requests: what arrives.
            wait: keep to the arrival times (else all are there at once).
            put_off: launch a step only shortly before the one before it ends, so that requests that arrive meanwhile join it.
            sleep: how to wait.
        """
        engine, executor = self.engine, self.executor
        pending = iter(requests)
        coming = next(pending, None)
        sequences: list[Sequence] = []
        booked: list[float] = []
        first = len(executor.flights.ended_s)
        began = executor.clock()
        while coming is not None or engine.has_work:
            if put_off and wait and coming is not None and engine.has_work and (spare_s := executor.flights.spare_s()) > 0:
                sleep(spare_s)
            now_s = executor.clock() - began
            while coming is not None and (not wait or coming.arrival_s <= now_s):
                sequences.append(self.submit(coming))
                coming = next(pending, None)
            if engine.has_work:
                booked.append(engine.step(now_s))
                self._stop_early()
            elif coming is not None:
                executor.drain()
                sleep(max(0.0, coming.arrival_s - (executor.clock() - began)))
        executor.drain()
        retime(engine, sequences, booked, [end - began for end in executor.flights.ended_s[first:]])
        return sequences

    def _stop_early(self) -> None:
        """End the sequences that have come to one of their stop tokens."""
        for sequence in self.executor.take_stopped():
            if math.isnan(sequence.finish_s):  # the forced length has not ended it already
                end_early(self.engine, sequence, len(self.executor.outputs[sequence.index]))


def end_early(engine: Engine, sequence: Sequence, tokens: int) -> None:
    """Finish `sequence` after `tokens` output tokens, though more were forced; its blocks are free at once."""
    state = engine.state
    surplus = 0
    if sequence.index in state.running:  # else preempted in the very step that told of the stop token
        surplus = sequence.generated + state.decoding.clock - sequence.join_clock - tokens
    engine.abort(sequence, "stop")
    start_s, joined, left = sequence.spans[-1]
    left -= surplus
    sequence.spans[-1] = (start_s, joined, left)
    sequence.output_tokens = tokens
    # one entry of the log is one step here; a server drops the oldest ones
    sequence.finish_s = sum(engine.steps_log[left - 1 - engine.steps_log[0][0]][2:4]) if left > joined else start_s


def retime(engine: Engine, sequences: list[Sequence], booked: list[float], ended: list[float]) -> None:
    """Replace the times at which steps were booked with those at which they ended, in sequences and in the engine's log."""
    true = dict(zip(booked, ended, strict=True))
    for sequence in sequences:
        sequence.first_token_s = true.get(sequence.first_token_s, sequence.first_token_s)
        sequence.finish_s = true.get(sequence.finish_s, sequence.finish_s)
        sequence.spans = [(true.get(at, at), a, b) for at, a, b in sequence.spans]
    for i, (clock, steps, start, first, increment) in enumerate(engine.steps_log):
        if (end := true.get(start + first)) is not None:
            engine.steps_log[i] = (clock, steps, start, end - start, increment)
