"""The asyncio side of the engine: one stream of tokens per prompt."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from systems.common.errors import InputError
from systems.common.serve.messages import Abort, Done, Ended, Job, Load, LoadAdapter, Progress, Ready, UnloadAdapter
from systems.common.serve.metrics import Metrics
from systems.common.serve.process import EngineProcess


class EngineDiedError(Exception):
    """The engine is gone; the text says why."""


@dataclass(slots=True)
class Stream:
    """One prompt's tokens. `tokens` fills as they come; whoever reads takes them out. `end` comes with the last one."""

    index: int
    prompt_tokens: int
    wake: asyncio.Event
    began_s: float
    tokens: list[int] = field(default_factory=list)
    end: str | None = None
    error: Exception | None = None
    received: int = 0
    first_s: float = 0.0

    def take(self) -> tuple[list[int], str | None]:
        """What has come since the last call, and why it is over, if it is. Raises what went wrong in the engine."""
        if self.error is not None:
            raise self.error
        tokens, self.tokens = self.tokens, []
        return tokens, self.end


class Streams:
    """Everything between the paths and the engine.

    Attributes:
        ready: the engine's limits, once it serves.
        died: why the engine is gone, once it is.
        open: streams that have not ended.
        load: how busy the engine was after its last step.
    """

    def __init__(
        self, engine: EngineProcess, metrics: Metrics, changed: Callable[[Ready | Ended], None], seed: int = 0
    ) -> None:
        """Must be made in a running event loop. `changed` is called when the engine is ready and when it is over.

        `seed` is where the seeds of requests that give none come from.
        """
        self._engine, self._metrics, self._changed, self._seed = engine, metrics, changed, seed
        self._indices = itertools.count()
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(engine.connection.fileno(), self._readable)
        self.ready: Ready | None = None
        self.died: str | None = None
        self.open: dict[int, Stream] = {}
        self.load = Load()

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises InputError for what the engine could never finish."""
        assert self.ready is not None
        if (total := prompt_tokens + max_tokens) > self.ready.max_tokens:
            mend = f"longer than the context here ({self.ready.max_tokens} tokens): shorten it"
            raise InputError("request", "prompt + max_tokens", total, mend)
        self.ready.config.check(prompt_tokens, max_tokens)

    def submit(self, job: Job, seeded: bool, wake: asyncio.Event) -> Stream:
        """Have a prompt answered; its index is given here, and a seed where the user has given none (`seeded`).

        `wake` is set when there is news.

        Raises:
            EngineDiedError: nobody is there to answer it.
        """
        if self.died is not None:
            raise EngineDiedError(self.died)
        index = next(self._indices)
        job = replace(job, index=index, seed=job.seed if seeded else (self._seed * 1_000_003 + index) % (1 << 62))
        stream = self.open[index] = Stream(index, len(job.prompt), wake, time.perf_counter())
        self._engine.send(job)
        self._metrics.prompt_tokens.add(len(job.prompt))
        return stream

    def abort(self, stream: Stream, reason: str = "abort") -> None:
        """End a stream early, if it has not ended. `reason`: `stop` (its text is complete) or `abort`."""
        if self.open.pop(stream.index, None) is not None:
            self._engine.send(Abort(stream.index))
            stream.end = reason
            self._finish(stream)
            stream.wake.set()

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter. Raises InputError for one that does not fit, EngineDiedError."""
        await self._ask(LoadAdapter(next(self._indices), name, folder))

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter that nobody uses. Raises EngineDiedError."""
        await self._ask(UnloadAdapter(next(self._indices), name))

    async def _ask(self, command: LoadAdapter | UnloadAdapter) -> None:
        if self.died is not None:
            raise EngineDiedError(self.died)
        future = self._asked[command.ticket] = self._loop.create_future()
        self._engine.send(command)
        await future

    # ---- reports

    def _readable(self) -> None:
        while True:
            match report := self._engine.receive():
                case Progress():
                    self._progress(report)
                case Done(ticket, error):
                    self._done(ticket, error)
                case Ready():
                    self.ready = report
                    self._changed(report)
                case Ended():
                    self._loop.remove_reader(self._engine.connection.fileno())
                    self._over(report)
                    self._changed(report)
                    return
            if not self._engine.connection.poll():
                return

    def _progress(self, report: Progress) -> None:
        self.load = report.load
        now_s = time.perf_counter()
        for index, token, end in report.tokens:
            if (stream := self.open.get(index)) is None:
                continue
            self._metrics.output_tokens.add()
            stream.tokens.append(token)
            stream.received += 1
            if stream.received == 1:
                stream.first_s = now_s
                self._metrics.ttft_s.observe(now_s - stream.began_s)
            if end is not None:
                stream.end = end
                del self.open[index]
                self._finish(stream)
            stream.wake.set()
        for index, refusal in report.refused:
            if (stream := self.open.pop(index, None)) is not None:
                stream.error = refusal
                self._metrics.ended("error")
                stream.wake.set()

    def _finish(self, stream: Stream) -> None:
        now_s = time.perf_counter()
        assert stream.end is not None
        self._metrics.ended(stream.end)
        if stream.end == "abort":
            return
        self._metrics.e2e_s.observe(now_s - stream.began_s)
        if stream.received > 1:
            self._metrics.tpot_s.observe((now_s - stream.first_s) / (stream.received - 1))

    def _done(self, ticket: int, error: InputError | None) -> None:
        future = self._asked.pop(ticket)
        if future.done():  # its client has gone
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _over(self, report: Ended) -> None:
        self.died = f"the engine has ended: {report.reason or 'it was stopped'}"
        error = EngineDiedError(self.died)
        for stream in self.open.values():
            stream.error = error
            self._metrics.ended("error")
            stream.wake.set()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)
        self._asked.clear()
        self.open.clear()
        self.load = Load()
