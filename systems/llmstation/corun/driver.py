"""Serves arrivals in real time with tuning beside; `torch_engine.drivers.Live.serve` with an idle time that is used."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack

from systems.common.core import Request
from systems.common.engine.engine import Engine
from systems.common.engine.sequence import Sequence
from systems.common.torch_engine.drivers import retime
from systems.llmstation.corun.executor import CoRunExecutor

NAP_S = 1e-4
POLLED_S = 1e-3
"""Nothing to launch: sleep at most this long, and so little just before something is due."""
TELLING_S = 0.25
"""A request that was cut off has a time per token once it has decoded for so long."""


class Colocated:
    """One run: an idle engine, its executor (with tuning beside it) and the requests to come."""

    def __init__(self, engine: Engine, executor: CoRunExecutor) -> None:
        self.engine, self.executor, self.beside = engine, executor, executor.beside
        self.lag_s: list[float] = []
        """How late each request was handed to the engine: the client's own schedule lag and the steps under way."""
        self.tpot_so_far_s: dict[int, float] = {}
        """Of the requests that were cut off while they decoded, by index: seconds per token after the first until then."""
        self._began = 0.0

    def now_s(self) -> float:
        """Seconds since the run began."""
        return self.executor.clock() - self._began

    def serve(self, requests: Iterable[Request], until_s: float) -> list[Sequence]:
        """Serve `requests` (sorted by arrival) from now; all sequences in order of arrival, times since now.

        What has not ended `until_s` seconds from now is cut off, so that an overload does not last for ever.
        """
        with ExitStack() as lane:
            lane.enter_context(self.beside.lanes.serving())
            return self._serve(list(requests), until_s)

    def _serve(self, requests: list[Request], until_s: float) -> list[Sequence]:
        engine, executor = self.engine, self.executor
        sequences: list[Sequence] = []
        booked: list[float] = []
        self._began = executor.clock()
        self.beside.clock = self.now_s
        coming, idle_from_s = 0, -math.inf
        while (coming < len(requests) or engine.has_work) and self.now_s() < until_s:
            if not engine.has_work:
                executor.drain()
                if requests[coming].arrival_s > idle_from_s:  # else it came while something was served
                    self._idle(requests[coming].arrival_s, until_s)
            elif coming < len(requests) or self.beside.tunes:
                self._put_off()
            now_s = self.now_s()
            while coming < len(requests) and requests[coming].arrival_s <= now_s:
                executor.check(requests[coming])
                self.lag_s.append(now_s - requests[coming].arrival_s)
                sequences.append(engine.submit(requests[coming]))
                coming += 1
            if engine.has_work:
                booked.append(engine.step(now_s))
                idle_from_s = self.now_s()
        executor.drain()
        retime(engine, sequences, booked, [end - self._began for end in executor.flights.ended_s])
        for sequence in [s for s in sequences if s.index in engine.state.running or s in engine.state.waiting]:
            self._note_cut(sequence)
            engine.abort(sequence)
        executor.release_ended()
        return [*sequences, *map(Sequence, requests[coming:])]

    def _note_cut(self, sequence: Sequence) -> None:
        """How fast the tokens of a sequence came until it was cut off, if it has decoded for long enough to say."""
        tokens, ended_s = len(self.executor.outputs.get(sequence.index, ())), self.executor.flights.ended_s
        decoded_s = ended_s[-1] - self._began - sequence.first_token_s if ended_s else math.nan
        if tokens > 1 and decoded_s >= TELLING_S:
            self.tpot_so_far_s[sequence.index] = decoded_s / (tokens - 1)

    def _put_off(self) -> None:
        """Tune until shortly before the step under way ends: requests that arrive meanwhile join the next one."""
        while (spare_s := self.executor.flights.spare_s()) > 0:
            if not self.beside.tunes or not self.beside.pump():
                time.sleep(min(spare_s, NAP_S) if self.beside.tunes else spare_s)

    def _idle(self, arrival_s: float, until_s: float) -> None:
        """Tune until a prompt comes, and for as long after as the pace holds it back."""
        while (now_s := self.now_s()) < until_s:
            due_s = arrival_s if now_s < arrival_s else self.beside.pace.start_s(arrival_s, now_s, self.beside.busy())
            if due_s <= now_s:
                return
            if not self.beside.pump(serving=False):
                time.sleep(min(due_s - now_s, NAP_S if due_s - now_s < POLLED_S or self.beside.tunes else POLLED_S))
