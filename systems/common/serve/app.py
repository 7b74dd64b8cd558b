"""The paths of the server, as an ASGI application."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.common.serve.answering import Answering
from systems.common.serve.delivery import as_http
from systems.common.serve.http import Exchange, HttpError, Receive, Scope, Send
from systems.common.serve.metrics import Metrics
from systems.common.serve.protocol import AdapterFolder, brief, read
from systems.common.serve.served import Model
from systems.common.serve.streams import EngineDiedError, Streams


class App:
    """See the module.

    Attributes:
        draining: no new work is taken.
    """

    def __init__(self, model: Model, streams: Streams, metrics: Metrics) -> None:
        self._model, self._streams, self._metrics = model, streams, metrics
        self._answering = Answering(model, streams, self._must_serve)
        self._created = int(time.time())
        self.draining = False
        self._exchanges: set[Exchange] = set()
        self._loading: set[str] = set()
        self._paths: dict[tuple[str, str], Callable[[Exchange], Awaitable[None]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._tell_metrics,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/adapters"): self._load_adapter,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
        }

    @property
    def busy(self) -> bool:
        """Whether requests are being read or answered."""
        return bool(self._exchanges)

    def drain(self) -> None:
        """Take no new work, nor wait long for requests that are half there."""
        self.draining = True
        for exchange in self._exchanges:
            exchange.hurry()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http", scope["type"]
        exchange = Exchange(scope, receive, send)
        self._exchanges.add(exchange)
        try:
            await self._dispatch(exchange)
        except HttpError as error:
            await exchange.refuse(error)
        except (EngineDiedError, InputError) as error:
            await exchange.refuse(as_http(error))
        except ConnectionResetError:
            pass  # nobody is left to answer
        except Exception:  # a fault of ours must not end the server
            traceback.print_exc(file=sys.stderr)
            await exchange.refuse(HttpError(500, "the server failed at this request; its log says how"))
        finally:
            self._exchanges.discard(exchange)
            if exchange.status:
                self._metrics.answered(exchange.status)

    async def _dispatch(self, exchange: Exchange) -> None:
        method, path = exchange.scope["method"], exchange.scope["path"].rstrip("/")
        if (handler := self._paths.get((method, path))) is not None:
            return await handler(exchange)
        allowed = [verb for verb, known in self._paths if known == path]
        for verb, folder, named in (("DELETE", "/v1/adapters/", self._unload_adapter), ("GET", "/v1/models/", self._one_model)):
            if path.startswith(folder):
                if method == verb:
                    return await named(exchange, path.removeprefix(folder))
                allowed = [verb]
        if allowed:
            exchange.extra.append((b"allow", ", ".join(allowed).encode()))
            raise HttpError(405, f"{path} takes {' or '.join(allowed)}, not {method}")
        path = brief(path or "/", str)
        raise HttpError(404, f"{path} is no path of this server: {', '.join(sorted({p for _, p in self._paths}))}")

    # ---- state

    def _must_serve(self) -> None:
        if self._streams.died is not None:
            raise EngineDiedError(self._streams.died)
        if self.draining:
            raise HttpError(503, "the server is ending and takes no new requests", code="draining")
        if self._streams.ready is None:
            raise HttpError(503, "the server is starting", code="starting")

    async def _health(self, exchange: Exchange) -> None:
        self._must_serve()
        await exchange.json({"status": "ok"})

    async def _tell_metrics(self, exchange: Exchange) -> None:
        load, ready = self._streams.load, self._streams.ready
        total = ready.config.num_gpu_blocks if ready is not None else 0
        gauges = {
            "requests_running": ("Sequences admitted by the scheduler.", load.running),
            "requests_waiting": ("Sequences in the queue.", load.waiting),
            "kv_blocks_used": ("KV blocks that sequences hold.", load.blocks_used),
            "kv_blocks_total": ("KV blocks in the pool.", total),
        }
        counts = {"preemptions_total": ("Sequences thrown out and recomputed.", load.preemptions)}
        text = self._metrics.text(gauges, counts, load.more)
        await exchange.answer(text.encode(), kind=b"text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, exchange: Exchange) -> None:
        await exchange.json({"object": "list", "data": self._known_models()})

    async def _one_model(self, exchange: Exchange, name: str) -> None:
        found = next((model for model in self._known_models() if model["id"] == name), None)
        if found is None:
            raise HttpError(404, f"the model {brief(name)} does not exist here", "model", "model_not_found")
        await exchange.json(found)

    def _known_models(self) -> list[dict[str, Any]]:
        self._must_serve()
        ready = self._streams.ready
        assert ready is not None
        model = self._model
        about = {
            "weights": model.weights,
            "tokenizer": model.tokenizer.name,
            "dtype": ready.dtype,
            "device": ready.device,
            "max_model_len": ready.max_tokens,
        }
        names: list[tuple[str, str | None]] = [(model.name, None), *((name, model.name) for name in model.adapters.names)]
        return [
            {"id": name, "object": "model", "created": self._created, "owned_by": "fivefold", "parent": base, **about}
            for name, base in names
        ]

    # ---- adapters

    async def _load_adapter(self, exchange: Exchange) -> None:
        self._must_serve()
        wanted = read(await exchange.body(), AdapterFolder)
        adapters = self._model.adapters
        if wanted.name in [self._model.name, *adapters.names, *self._loading]:
            raise HttpError(409, f"{brief(wanted.name)} is taken: unload it first", "name")
        self._loading.add(wanted.name)  # nobody else loads under this name meanwhile
        try:
            await self._streams.load_adapter(wanted.name, Path(wanted.path))
            adapters.names.append(wanted.name)
        finally:
            self._loading.discard(wanted.name)
        await exchange.json({"id": wanted.name, "object": "model", "parent": self._model.name})

    async def _unload_adapter(self, exchange: Exchange, name: str) -> None:
        self._must_serve()
        adapters = self._model.adapters
        if name not in adapters.names:
            raise HttpError(404, f"no adapter is called {brief(name)}: there are {', '.join(adapters.names) or 'none'}", "name")
        if using := adapters.users(name):
            raise HttpError(409, f"{using} requests are using {name!r}: try again when they have ended", "name")
        adapters.names.remove(name)  # nobody comes in while the engine lets go of it
        await self._streams.unload_adapter(name)
        await exchange.json({"id": name, "object": "model", "deleted": True})

    # ---- answers

    async def _completions(self, exchange: Exchange) -> None:
        self._must_serve()
        await self._answering.completions(exchange)

    async def _chat(self, exchange: Exchange) -> None:
        self._must_serve()
        await self._answering.chat(exchange)
