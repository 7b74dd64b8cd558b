"""The front of several replicas: an OpenAI-compatible server that sends each request to one of them, by dLoRA's dispatch cost.

The name in `model` says which adapter, so which replicas qualify; of these the one with the least outstanding work gets the
request (sheet, 2.9). A replica that dies takes no more requests; one that it had not begun to answer goes to another
replica that hosts the adapter. Answers pass through as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from systems.common.serve.http import Exchange, HttpError, Receive, Scope, Send
from systems.dlora.cluster.dispatch import View, choose
from systems.dlora.server import ServerFile
from systems.dlora.serving.replicas import Replica, ReplicaGoneError

PATHS = ("/v1/completions", "/v1/chat/completions")


class Front:
    """The ASGI application. The base model counts as one more adapter, which every replica hosts."""

    def __init__(self, given: ServerFile, replicas: list[Replica]) -> None:
        self._given, self._replicas = given, replicas
        self._number = {name: i for i, name in enumerate([*given.names, given.model])}
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = Exchange(scope, receive, send)
        try:
            await self._answer(exchange)
        except HttpError as error:
            await exchange.refuse(error)
        except ConnectionResetError:
            pass  # nobody is left to answer, or half an answer is out and must be broken off

    async def _answer(self, exchange: Exchange) -> None:
        path, method = exchange.scope["path"].rstrip("/"), exchange.scope["method"]
        if (method, path) == ("GET", "/health"):
            await exchange.json(
                {"status": "ok", "replicas": [self.told(r) for r in self._replicas]}, 200 if self._alive else 503
            )
        elif (method, path) == ("GET", "/v1/models"):
            entries = [
                {"id": name, "object": "model", "owned_by": "fivefold"} for name in [self._given.model, *self._given.names]
            ]
            await exchange.json({"object": "list", "data": entries})
        elif method == "POST" and path in PATHS:
            await self._generate(exchange, path)
        else:
            raise HttpError(404, f"{path} is no path of this server: GET /health, GET /v1/models, POST {' or '.join(PATHS)}")

    @property
    def _alive(self) -> bool:
        return not self.draining and any(not replica.dead for replica in self._replicas)

    def told(self, replica: Replica) -> dict[str, Any]:
        """What `/health` says of a replica."""
        names = [name for name, number in self._number.items() if number in replica.hosted]
        return {"port": replica.port, "alive": not replica.dead, "adapters": names, "outstanding": replica.counts.total()}

    async def _generate(self, exchange: Exchange, path: str) -> None:
        body = await exchange.body()
        try:
            name = json.loads(body)["model"]
        except (ValueError, KeyError, TypeError):
            raise HttpError(400, "the body is no JSON object with a model", "model") from None
        if not isinstance(name, str) or name not in self._number:
            raise HttpError(404, f"there is no model {name!r}: there are {', '.join(self._number)}", "model")
        with exchange.watched(asyncio.Event()) as gone:
            passing = asyncio.ensure_future(self._pass_on(exchange, path, body, self._number[name]))
            leaving = asyncio.ensure_future(gone.wait())
            await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            passing.cancel()  # of a client that hung up: closing the connection aborts its request on the replica
            with contextlib.suppress(asyncio.CancelledError):
                await passing

    async def _pass_on(self, exchange: Exchange, path: str, body: bytes, number: int) -> None:
        while True:
            if self.draining:
                raise HttpError(503, "the server is ending")
            views = [View(r.counts, set() if r.dead else r.hosted) for r in self._replicas]
            chosen, _ = choose(views, number, self._given.max_num_seqs)
            if chosen < 0:
                raise HttpError(503, "no replica that hosts this adapter is left")
            replica = self._replicas[chosen]
            replica.counts[number] += 1
            try:
                return await self._relay(exchange, replica.answer(path, body))
            except ReplicaGoneError:
                replica.dead = True
                if exchange.begun:
                    raise ConnectionResetError from None  # half an answer is out: the broken connection tells the client
            finally:
                replica.counts[number] -= 1

    async def _relay(self, exchange: Exchange, answer: AsyncIterator[tuple[int, Mapping[str, str], bytes]]) -> None:
        async for status, headers, piece in answer:
            if not exchange.begun:
                exchange.begun, exchange.status = True, status
                kept = [
                    (k.encode(), headers[k].encode()) for k in ("content-type", "content-length", "retry-after") if k in headers
                ]
                await exchange.send({"type": "http.response.start", "status": status, "headers": kept})
            await exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
        await exchange.send({"type": "http.response.body", "body": b""})
