"""Just enough of ASGI: a request's body, JSON answers, streams of server-sent events, and whether the client is still there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

MAX_BODY_BYTES = 16 << 20
"""Of one request: two million token ids and more. It is parsed and checked in the thread that streams to everybody."""
BODY_S = 60.0
"""How long a request's body may take to come."""
HURRY_S = 1.0
"""The same once the server ends."""
RETRY_AFTER_S = 5
KINDS = {404: "not_found_error", 409: "conflict_error"}


class HttpError(Exception):
    """An answer other than 200. `param` is the field to blame, `code` a short word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI words errors."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(slots=True, eq=False)
class Exchange:
    """One HTTP request and its answer.

    Attributes:
        begun: whether the answer's head has been sent.
        status: of the answer.
    """

    scope: Scope
    receive: Receive
    send: Send
    begun: bool = False
    status: int = 0
    extra: list[tuple[bytes, bytes]] = field(default_factory=list)
    _limit: asyncio.Timeout | None = None
    _hurried: bool = False

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            HttpError: it is too long (413), does not come in time (408), or the server ends first (503).
            ConnectionResetError: the client leaves meanwhile.
        """
        try:
            async with asyncio.timeout(BODY_S) as self._limit:
                return await self._read()
        except TimeoutError as error:
            if self._hurried:
                raise HttpError(503, "the server is ending and takes no new requests", code="draining") from error
            raise HttpError(408, f"the body did not come within {BODY_S:g} s", code="timeout") from error
        finally:
            self._limit = None

    def hurry(self) -> None:
        """The server ends: a body that is not all there must come soon."""
        if self._limit is not None:
            self._hurried = True
            self._limit.reschedule(asyncio.get_running_loop().time() + HURRY_S)

    async def _read(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            event = await self.receive()
            if event["type"] == "http.disconnect":
                raise ConnectionResetError
            parts.append(event.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY_BYTES:
                raise HttpError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
            if not event.get("more_body", False):
                return b"".join(parts)

    async def answer(self, body: bytes, status: int = 200, kind: bytes = b"application/json") -> None:
        """The whole answer."""
        await self._begin(status, kind, [(b"content-length", str(len(body)).encode())])
        await self.send({"type": "http.response.body", "body": body})

    async def json(self, value: Mapping[str, Any], status: int = 200) -> None:
        """The whole answer, as JSON."""
        await self.answer(json.dumps(value, separators=(",", ":")).encode(), status)

    async def refuse(self, error: HttpError) -> None:
        """The whole answer: an error. Nothing, where an answer has begun: the connection is closed, which tells the client."""
        if self.begun:
            return
        if error.status == 503:
            self.extra.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        if error.status in (408, 413):  # the rest of the body may be on its way
            self.extra.append((b"connection", b"close"))
        await self.json(error.body, error.status)

    async def events(self, pieces: AsyncIterator[bytes]) -> None:
        """An answer of server-sent events, each as soon as it is there."""
        await self._begin(200, b"text/event-stream; charset=utf-8", [(b"cache-control", b"no-cache")])
        async for piece in pieces:
            await self.send({"type": "http.response.body", "body": piece, "more_body": True})
        await self.send({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun, self.status = True, status
        headers = [(b"content-type", kind), *headers, *self.extra]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    @contextmanager
    def watched(self, wake: asyncio.Event) -> Iterator[asyncio.Event]:
        """An event that is set (and `wake` with it) once the client has gone; only after the body has been read."""
        gone = asyncio.Event()

        async def watch() -> None:
            while (await self.receive())["type"] != "http.disconnect":
                pass
            gone.set()
            wake.set()

        task = asyncio.create_task(watch())
        try:
            yield gone
        finally:
            task.cancel()


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
