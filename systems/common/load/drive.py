"""Sends the requests of a plan and notes what came back: open loop at their times, or closed loop, so many at once.

In an open loop a request goes out at its time whatever the server does, so a slow server can't slow its own load down. The
client measures itself as well: how late it sent each request, and how late its event loop woke up meanwhile, because a busy
client would stamp tokens late.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence

from systems.common.core import Request, Status
from systems.common.load.answer import CutShortError, ServerError
from systems.common.load.api import Api
from systems.common.load.connection import Client, DisconnectedError
from systems.common.load.measurement import Exchange, Limits, Measurement, RunClock
from systems.common.load.prompts import Prompts
from systems.common.load.wire import BadResponseError

TICK_S = 0.02
"""How often the client looks whether its event loop keeps up."""

AT_ONCE = 32
"""Requests that are sent in one turn of the event loop when they are due together."""

CLIENT_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
"""Errors of this machine, not of the server: no file descriptors, memory or ports left."""


class Driver:
    """One run against one server. `stop` may be set from outside: what is under way is then cut off."""

    def __init__(self, api: Api, client: Client, clock: RunClock, prompts: Prompts, limits: Limits) -> None:
        """`progress` may be set to what shall be called after every request that ended."""
        self.api, self.client, self.clock, self.prompts, self.limits = api, client, clock, prompts, limits
        self.progress: Callable[[], object] = lambda: None
        self.name = secrets.token_hex(4)  # of the run, in every request's X-Request-Id
        self.stop = asyncio.Event()
        self.signal = 0  # the signal that ended it
        self._sent: list[Exchange] = []

    def interrupt(self, number: int) -> None:
        """Signal `number` ends the run now; what was measured is kept."""
        self.signal = number
        self.stop.set()

    async def run(self, requests: Sequence[Request]) -> Measurement:
        """Send `requests`, which are in order of arrival, and wait for their answers."""
        closed = self.limits.concurrency is not None
        lags: list[float] = []
        self._sent = []
        with _no_collections():
            self.clock.start()
            cpu_s = time.process_time()
            ticking = asyncio.create_task(self._tick(lags))
            sending = asyncio.create_task(self._closed_loop(requests) if closed else self._open_loop(requests))
            stopping = asyncio.create_task(self.stop.wait())
            try:
                await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _ended(sending, stopping, ticking)
            wall_s, cpu_s = self.clock(), time.process_time() - cpu_s
        if not sending.cancelled():
            sending.result()  # a fault of this program must not pass for a measurement
        sent = [exchange for exchange in self._sent if exchange.sent]
        return Measurement(sent, len(requests) - len(sent), lags, wall_s, cpu_s, closed, bool(self.signal))

    async def _open_loop(self, requests: Sequence[Request]) -> None:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                data = self._prepare(request)  # before its time comes
                wait_s = request.arrival_s - self.clock()
                if wait_s > 0 or request.index % AT_ONCE == 0:  # a busy loop's turn takes long: not one per late request
                    await asyncio.sleep(max(0.0, wait_s))
                group.create_task(self._send(request, request.arrival_s, data))
            self._begin_grace()

    async def _closed_loop(self, requests: Sequence[Request]) -> None:
        waiting = iter(requests)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.limits.concurrency or 1, len(requests))):
                group.create_task(self._one_after_another(waiting))

    async def _one_after_another(self, waiting: Iterator[Request]) -> None:
        for request in waiting:
            data = self._prepare(request)
            free_s = self.clock()
            if free_s >= self.limits.stop_sending_s:
                self._begin_grace()
                return
            await self._send(request, free_s, data)

    def _begin_grace(self) -> None:
        if math.isfinite(self.limits.grace_s):
            asyncio.get_running_loop().call_later(self.limits.grace_s, self.stop.set)

    def _prepare(self, request: Request) -> bytes:
        prompt = self.prompts.make(request.input_tokens)
        return self.api.request(prompt, request.output_tokens, request.adapter, f"{self.name}-{request.index}")

    async def _send(self, request: Request, planned_s: float, data: bytes) -> None:
        exchange = Exchange(request, planned_s, sent_s=self.clock())
        self._sent.append(exchange)
        limit_s = self.limits.timeout_s if math.isfinite(self.limits.timeout_s) else None
        try:
            async with asyncio.timeout(limit_s):
                await self.client.exchange(data, exchange.answer)
        except (OSError, ValueError, ServerError) as error:
            exchange.status, exchange.error, exchange.message = Status.FAILED, kind_of(error), self.api.hide(str(error))
        else:
            complete = exchange.answer.output_tokens > 0 and bool(exchange.answer.token_s)
            exchange.status, exchange.error = (Status.FINISHED, "") if complete else (Status.FAILED, "empty")
        self.progress()

    async def _tick(self, lags: list[float]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            lags.append(loop.time() - due)


def kind_of(error: Exception) -> str:
    """The kind under which metrics count the failure `error` of an exchange."""
    if isinstance(error, ServerError):
        return error.kind
    if isinstance(error, OSError) and error.errno in CLIENT_LIMITS:
        return "client-limit"
    kinds: Sequence[tuple[type[Exception], str]] = (
        (TimeoutError, "timeout"),
        (ConnectionRefusedError, "refused"),
        (DisconnectedError, "disconnected"),
        (ConnectionResetError, "disconnected"),
        (BrokenPipeError, "disconnected"),
        (CutShortError, "cut-short"),
        (BadResponseError, "bad-response"),
        (OSError, "unreachable"),
    )
    for kind, word in kinds:
        if isinstance(error, kind):
            return word
    raise error


async def _ended(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage collection meanwhile: a full one stops everything for tens of milliseconds. What a run makes, it needs."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()
