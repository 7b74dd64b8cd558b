"""The controller over HTTP: an ASGI application, run by uvicorn as the LLM server is.

    GET  /health             {"status": "ok"}
    GET  /deployments        what is deployed
    GET  /gpus               what the GPUs hold, and how busy they are
    GET  /records            what came of every request
    POST /register           {"model", "file"}; without `file` the profiler measures, and the answer takes minutes
    POST /deploy             {"id", "model", "output_length", "intent", "slo", "fp16_only", "strategy", "batch", "accuracy"}
    POST /inference          {"id", "text"}
    POST /prior_inference    {"id", "text"}: before all others
    POST /remove             {"id"}

Bad input answers 400 with the one line that a command would print, 404 for a name that is not deployed, 409 for one that is
taken, 502 when an engine is at fault. A refusal to deploy is an answer: 200 with `refusal`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.common.serve.http import Exchange, HttpError, Receive, Scope, Send
from systems.maveriq.controller.driver import Controller
from systems.maveriq.search import OUTPUT_LENGTH, Refusal, Wish

Handler = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]

_DEPLOY = {
    "id": str, "model": str, "output_length": int, "intent": str, "slo": float, "fp16_only": bool, "strategy": str,
    "batch": int, "accuracy": float,
}  # fmt: skip


class App:
    """The application."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._get: Mapping[str, Handler] = {
            "/health": self._health, "/deployments": self._deployments, "/gpus": self._gpus, "/records": self._records,
        }  # fmt: skip
        self._post: Mapping[str, Handler] = {
            "/register": self._register, "/deploy": self._deploy, "/inference": self._inference,
            "/prior_inference": self._prior_inference, "/remove": self._remove,
        }  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        try:
            await exchange.json(await self._answer(exchange))
        except HttpError as error:
            await exchange.refuse(error)
        except InputError as error:
            await exchange.refuse(HttpError(_status(error), str(error), error.key))
        except ConnectionResetError:
            return

    async def _answer(self, exchange: Exchange) -> Mapping[str, Any]:
        path, method = str(exchange.scope["path"]), str(exchange.scope["method"])
        known = self._get if method == "GET" else self._post if method == "POST" else {}
        if path not in known:
            if path in self._get or path in self._post:
                raise HttpError(405, f"{path} is not for {method}")
            raise HttpError(404, f"no such path: {path}")
        body = await exchange.body()
        return await known[path](_object(body) if method == "POST" else {})

    async def _health(self, _body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"status": "ok"}

    async def _deployments(self, _body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"deployments": self._controller.status()}

    async def _gpus(self, _body: Mapping[str, Any]) -> Mapping[str, Any]:
        states = await asyncio.to_thread(self._controller.memory.states, self._controller.busy)
        return {"gpus": [asdict(gpu) for gpu in states]}

    async def _records(self, _body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"records": [asdict(record) for record in self._controller.records]}

    async def _register(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        given = _checked(body, {"model": str, "file": str}, ("model",))
        file = Path(given["file"]) if "file" in given else None
        return {"model": given["model"], "fingerprints": await self._controller.register(given["model"], file)}

    async def _deploy(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        given = _checked(body, _DEPLOY, ("id", "model"))
        wish = Wish(
            given["model"], given.get("intent", "min_cost"), float(given.get("slo", 0.0)), float(given.get("accuracy", 0.0)),
            given.get("fp16_only", False), given.get("batch", 1), given.get("output_length", OUTPUT_LENGTH),
            given.get("strategy", "llf"),
        )  # fmt: skip
        found = await self._controller.deploy(given["id"], wish.check())
        if isinstance(found, Refusal):
            return {"id": given["id"], "refusal": found.reason}
        return {**next(one for one in self._controller.status() if one["id"] == given["id"]), "refusal": None}

    async def _inference(self, body: Mapping[str, Any], front: bool = False) -> Mapping[str, Any]:
        given = _checked(body, {"id": str, "text": str}, ("id", "text"))
        answer = await self._controller.inference(given["id"], given["text"], front)
        if answer.error:
            raise HttpError(502, answer.error)
        return asdict(answer)

    async def _prior_inference(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return await self._inference(body, front=True)

    async def _remove(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        given = _checked(body, {"id": str}, ("id",))
        return {"id": given["id"], "failed_requests": await self._controller.remove(given["id"])}


def _status(error: InputError) -> int:
    if error.key == "engine":
        return 502
    taken, absent = "is deployed already" in error.mend, "is not deployed" in error.mend
    return 409 if taken else 404 if absent else 400


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise HttpError(400, f"the body is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise HttpError(400, "the body must be a JSON object")
    return found


def _checked(body: Mapping[str, Any], kinds: Mapping[str, type], needed: tuple[str, ...]) -> Mapping[str, Any]:
    for key, value in body.items():
        kind = kinds.get(key)
        if kind is None:
            raise HttpError(400, f"{key}: no such key: use {', '.join(kinds)}", key)
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        if not fits:
            raise HttpError(400, f"{key}: {value!r}: write a {kind.__name__}", key)
    for key in needed:
        if key not in body:
            raise HttpError(400, f"{key}: missing", key)
    return body


def listen(host: str, port: int) -> socket.socket:
    """The controller's socket. Raises InputError when somebody else has the port, such as another controller."""
    found = socket.socket()
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(1024)
    except OSError as error:
        found.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            mend = f"{error.strerror}: end the other controller, choose another port, or 0 for a free one"
            raise InputError("controller", "port", port, mend) from error
        raise InputError("controller", "host", host, str(error.strerror or error)) from error
    return found
