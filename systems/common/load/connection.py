"""One request over one connection, every piece of the answer stamped as it comes in; connections are kept for reuse.

client = Client(Target.parse(url, "--url"), clock)
await client.exchange(head_and_body, answer)         # returns when the answer is complete, raises what went wrong
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

from systems.common.errors import InputError
from systems.common.load.answer import CutShortError
from systems.common.load.wire import BadResponseError, ResponseReader

Clock = Callable[[], float]

IDLE_S = 2.0
"""A connection that was idle for longer is not used again: servers close theirs after 5 s or more, and a request that meets
such an end would look like a failure. Nothing is ever sent twice."""


class DisconnectedError(ConnectionError):
    """The server closed the connection before its answer began."""


class Sink(Protocol):
    """Who takes a response as it comes in (`answer.Answer`); what its methods raise ends the exchange."""

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the framing can be missing."""
        ...

    def body(self, now_s: float, status: int, piece: bytes) -> None:
        """A piece of the body."""
        ...

    def end(self, status: int) -> None:
        """The response is complete."""
        ...


class Page:
    """A response that is wanted as a whole."""

    def __init__(self) -> None:
        self.status, self.content, self.finished = 0, b"", False

    def body(self, now_s: float, status: int, piece: bytes) -> None:
        """Collect it."""
        self.content += piece

    def end(self, status: int) -> None:
        """Note the status."""
        self.status = status


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server is: `base` is the path before `/completions`, `/v1` unless the URL has a path of its own."""

    host: str
    port: int
    base: str = "/v1"
    tls: bool = False

    @classmethod
    def parse(cls, url: str, where: str) -> Target:
        """The target of `url`. Raises InputError, about the key `where`, unless it is http(s)://host[:port][/path]."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError("load", where, url, f"use http://host:port/v1 ({error})") from error
        if parts.username is not None or parts.password is not None:
            raise InputError("load", where, "(hidden)", "no user and password in an address: use --api-key env:NAME")
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or not url.isprintable()
        ):
            raise InputError("load", where, url, "use http://host:port/v1")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/") or "/v1", tls)

    @property
    def url(self) -> str:
        """As an address again."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{name}:{self.port}{self.base}"

    @property
    def authority(self) -> str:
        """What the `Host` header says."""
        return self.url.split("/")[2]


class _Connection(asyncio.Protocol):
    """One connection. It serves one exchange at a time; `waiter` is that exchange's future."""

    __slots__ = ("answer", "clock", "idle_since_s", "lost", "reader", "transport", "waiter")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.transport: asyncio.Transport | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.answer: Sink = Page()
        self.reader = ResponseReader()
        self.lost = False
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its type

    def ask(self, data: bytes, answer: Sink) -> asyncio.Future[None]:
        """Send `data`; the future ends with the response, or with what was wrong with it."""
        assert self.transport is not None
        self.answer, self.reader = answer, ResponseReader()
        self.waiter = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self.waiter

    def data_received(self, data: bytes) -> None:
        now_s = self.clock()  # before anything is done with the data
        if self.waiter is None or self.waiter.done():
            self.drop()  # a server that talks unasked
            return
        reader, answer = self.reader, self.answer
        try:
            for piece in reader.feed(data):
                answer.body(now_s, reader.status, piece)
            if reader.done:
                answer.end(reader.status)
        except Exception as error:
            self._fail(error)
            if not reader.done:
                self.drop()
            return
        if reader.done:
            self.waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.waiter is None or self.waiter.done():
            return
        if self.reader.status == 0:
            self._fail(DisconnectedError("closed before an answer"))
            return
        try:
            if not self.answer.finished:  # else nothing is missing but the end of the framing
                self.reader.end()
            self.answer.end(self.reader.status)
        except BadResponseError:
            self._fail(CutShortError("closed in the middle of an answer"))
        except Exception as error:
            self._fail(error)
        else:
            self.waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        assert self.waiter is not None
        self.waiter.set_exception(error)

    def drop(self) -> None:
        """Close at once; the server sees a client that went away."""
        self.lost = True
        if self.transport is not None:
            self.transport.abort()


class Client:
    """Exchanges with one server, each on a connection of its own; a finished exchange leaves its connection to the next."""

    def __init__(self, target: Target, clock: Clock) -> None:
        """Nothing is opened yet. `clock` gives the time stamps of answers, in seconds."""
        self.target, self._clock = target, clock
        self._idle: list[_Connection] = []
        self._address = target.host  # once connected: the address that answered, so that names are looked up once
        self._tls = ssl.create_default_context() if target.tls else None

    async def exchange(self, data: bytes, answer: Sink) -> None:
        """Send the request `data` and fill `answer`. When cancelled it closes the connection.

        Raises:
            OSError: no connection; DisconnectedError: it was closed before an answer began.
            BadResponseError, CutShortError, ServerError: what is wrong with the answer.
        """
        connection = self._kept() or await self._open()
        try:
            await connection.ask(data, answer)
        finally:
            self._keep(connection)

    def close(self) -> None:
        """Close what is kept."""
        while self._idle:
            self._idle.pop().drop()

    async def _open(self) -> _Connection:
        loop, target = asyncio.get_running_loop(), self.target
        name = target.host if self._tls else None
        transport, connection = await loop.create_connection(
            lambda: _Connection(self._clock), self._address, target.port, ssl=self._tls, server_hostname=name
        )
        self._address = transport.get_extra_info("peername")[0]
        return connection

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and time.monotonic() - connection.idle_since_s < IDLE_S:
                return connection
            connection.drop()
        return None

    def _keep(self, connection: _Connection) -> None:
        if connection.lost:
            return
        if connection.reader.keep_alive:
            connection.idle_since_s = time.monotonic()  # the run's clock may start anew
            self._idle.append(connection)
        else:
            connection.drop()
