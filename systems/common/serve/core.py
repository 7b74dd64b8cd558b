"""The engine's loop: takes jobs and aborts at any time, steps while there is work, reports tokens as they come.

One thread owns the engine and runs `EngineLoop.run`; any other may call `put`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from systems.common.core import Request
from systems.common.engine.sequence import Sequence
from systems.common.errors import InputError
from systems.common.serve.loading import add_adapter, read_adapter
from systems.common.serve.messages import Abort, Command, Done, Job, Load, LoadAdapter, Progress, Report, Stop, UnloadAdapter
from systems.common.torch_engine.drivers import Live, end_early
from systems.common.torch_engine.parallel.cluster import RankError
from systems.common.torch_engine.parallel.executor import ParallelExecutor
from systems.common.torch_engine.sampling import Sampling

SETTLED_AFTER = 8
"""Steps after which none that an ended sequence took part in can still be on its way (the engine runs one step ahead)."""
LOG_STEPS = 10_000
LOG_SEQUENCES = 1_000
"""How long the engine's logs may get before they are trimmed."""


@dataclass(slots=True)
class _Running:
    job: Job
    sequence: Sequence
    sampling: Sampling
    received: int = 0


class _Look:
    """Something has happened to the other ranks: see what."""


Inbox = SimpleQueue[Command | _Look]


class EngineLoop:
    """See the module. `report` is called in the engine's thread; `inbox` may have filled before the engine was there."""

    def __init__(self, live: Live, report: Callable[[Report], None], inbox: Inbox | None = None) -> None:
        self._live, self._report = live, report
        self._inbox: Inbox = inbox if inbox is not None else SimpleQueue()
        self._open: dict[int, _Running] = {}
        self._known: dict[int, _Running] = {}
        """Jobs that the executor may still ask about: those above, and those that ended lately."""
        self._ended: list[tuple[int, Sequence]] = []
        self._steps = 0
        self._stopping = False
        self._fresh = Progress(Load())
        executor = live.executor
        executor.prompt = lambda request: self._known[request.index].job.prompt
        executor.sampling = lambda request: self._known[request.index].sampling
        executor.on_tokens = self._take
        if isinstance(executor, ParallelExecutor):  # an engine that has nothing to do would not notice
            executor.cluster.on_death = lambda: self._inbox.put(_Look())

    def put(self, command: Command) -> None:
        """Have something done before the next step. Any thread may call it."""
        self._inbox.put(command)

    def run(self) -> None:
        """Serve until `Stop`. Raises RankError as soon as a rank is gone."""
        engine, executor = self._live.engine, self._live.executor
        executor.drain()  # a rank may have gone before anybody watched
        self._tell(force=True)
        while not self._stopping:
            if engine.has_work and (spare_s := executor.flights.spare_s()) > 0:
                time.sleep(spare_s)  # a job that arrives meanwhile joins the next step
            self._take_in(wait=not engine.has_work)
            if engine.has_work:
                engine.step(time.perf_counter())
                self._steps += 1
            if not engine.has_work:  # nothing will push the last steps out
                executor.drain()
                self._steps += SETTLED_AFTER
            self._stop_early()
            self._tell(force=not engine.has_work)
            self._forget()

    def _take_in(self, wait: bool) -> None:
        """Do all that has been asked for; with nothing to run, wait for something."""
        if wait:
            self._do(self._inbox.get())
        while not self._stopping:
            try:
                self._do(self._inbox.get_nowait())
            except Empty:
                return

    def _do(self, command: Command | _Look) -> None:
        match command:
            case Job():
                self._submit(command)
            case Abort(index):
                self._abort(index)
            case LoadAdapter() | UnloadAdapter():
                self._change_adapters(command)
            case Stop():
                self._stopping = True
            case _Look():
                self._live.executor.drain()

    def _submit(self, job: Job) -> None:
        request = Request(job.index, 0.0, len(job.prompt), job.max_tokens, job.adapter)
        sampling = Sampling(job.temperature, job.top_p, job.seed, job.stop_tokens, job.min_tokens)
        try:
            sequence = self._live.submit(request)
        except InputError as error:
            self._fresh.refused.append((job.index, error))
        else:
            self._open[job.index] = self._known[job.index] = _Running(job, sequence, sampling)

    def _abort(self, index: int) -> None:
        if (running := self._open.pop(index, None)) is None:
            return
        sequence = running.sequence
        if math.isnan(sequence.finish_s):  # else its last tokens are on their way already
            self._live.engine.abort(sequence)
        self._live.executor.drop(sequence)
        self._ended.append((self._steps, sequence))

    def _change_adapters(self, command: LoadAdapter | UnloadAdapter) -> None:
        error = None
        try:
            if isinstance(command, LoadAdapter):
                add_adapter(self._live, command.name, read_adapter(command.folder))
            elif (bank := self._live.executor.adapters) is not None:
                bank.unload(command.name)
        except InputError as raised:
            error = raised
        except RankError:
            raise
        except Exception as raised:  # whatever is in that folder, other requests go on
            why = f"{type(raised).__name__}: {raised}".splitlines()[0]
            error = InputError(f"adapter {command.name}", "path", why, "not a peft LoRA adapter of this model")
        self._report(Done(command.ticket, error))

    def _take(self, sequences: list[Sequence], tokens: list[int]) -> None:
        """Tokens of a step that has ended; those of jobs that are over are dropped."""
        for sequence, token in zip(sequences, tokens, strict=True):
            if (running := self._open.get(sequence.index)) is None:
                continue
            running.received += 1
            end = None
            if token in running.sampling.stop_tokens and running.received > running.sampling.min_tokens:
                end = "stop"
            elif running.received == running.job.max_tokens:
                end = "length"
            if end is not None:
                del self._open[sequence.index]
                self._ended.append((self._steps, sequence))
            self._fresh.tokens.append((sequence.index, token, end))

    def _stop_early(self) -> None:
        for sequence in self._live.executor.take_stopped():
            if math.isnan(sequence.finish_s):
                end_early(self._live.engine, sequence, len(self._live.executor.outputs[sequence.index]))

    def _tell(self, force: bool) -> None:
        fresh = self._fresh
        if fresh.tokens or fresh.refused or force:
            state = self._live.engine.state
            used = self._live.engine.config.num_gpu_blocks - state.free_blocks
            load = Load(len(state.waiting), len(state.running), used, state.preemptions)
            self._report(Progress(load, fresh.tokens, fresh.refused))
            self._fresh = Progress(load)

    def _forget(self) -> None:
        """Keep nothing of jobs long over: a server runs for weeks."""
        ended = self._ended
        count = next((i for i, (at, _) in enumerate(ended) if self._steps - at < SETTLED_AFTER), len(ended))
        if count:
            over = [sequence for _, sequence in ended[:count]]
            self._live.executor.forget(over)
            for sequence in over:
                del self._known[sequence.index]
            del ended[:count]
        if len(self._live.engine.steps_log) > LOG_STEPS or len(self._live.engine.finished) > LOG_SEQUENCES:
            self._live.executor.trim()
