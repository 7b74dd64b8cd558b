"""The paths of the server, as an ASGI application."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

from systems.common.errors import InputError
from systems.common.serve.answering import Answering
from systems.common.serve.delivery import as_http
from systems.common.serve.http import Exchange, HttpError, Receive, Scope, Send
from systems.common.serve.metrics import Metrics
from systems.common.serve.protocol import AdapterFolder, read
from systems.common.serve.served import Model
from systems.common.serve.streams import EngineDiedError, Streams


class App:
    """See the module.

    Attributes:
        draining: no new work is taken.
        busy: requests that are being answered.
    """

    def __init__(self, model: Model, streams: Streams, metrics: Metrics) -> None:
        self._model, self._streams, self._metrics = model, streams, metrics
        self._answering = Answering(model, streams, self._must_serve)
        self._created = int(time.time())
        self.draining = False
        self.busy = 0
        self._paths: dict[tuple[str, str], Callable[[Exchange], Awaitable[None]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._tell_metrics,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/adapters"): self._load_adapter,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http", scope["type"]
        exchange = Exchange(scope, receive, send)
        self.busy += 1
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
            self.busy -= 1
            if exchange.status:
                self._metrics.answered(exchange.status)

    async def _dispatch(self, exchange: Exchange) -> None:
        method, path = exchange.scope["method"], exchange.scope["path"].rstrip("/")
        if (handler := self._paths.get((method, path))) is not None:
            return await handler(exchange)
        if method == "DELETE" and path.startswith("/v1/adapters/"):
            return await self._unload_adapter(exchange, path.removeprefix("/v1/adapters/"))
        allowed = [verb for verb, known in self._paths if known == path]
        if allowed:
            exchange.extra.append((b"allow", ", ".join(allowed).encode()))
            raise HttpError(405, f"{path} takes {' or '.join(allowed)}, not {method}")
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
        text = self._metrics.text(gauges, {"preemptions_total": ("Sequences thrown out and recomputed.", load.preemptions)})
        await exchange.answer(text.encode(), kind=b"text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, exchange: Exchange) -> None:
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
        models = [
            {"id": name, "object": "model", "created": self._created, "owned_by": "fivefold", "parent": base, **about}
            for name, base in names
        ]
        await exchange.json({"object": "list", "data": models})

    # ---- adapters

    async def _load_adapter(self, exchange: Exchange) -> None:
        self._must_serve()
        wanted = read(await exchange.body(), AdapterFolder)
        adapters = self._model.adapters
        if wanted.name in [self._model.name, *adapters.names]:
            raise HttpError(409, f"{wanted.name!r} is taken: unload it first", "name")
        await self._streams.load_adapter(wanted.name, Path(wanted.path))
        if wanted.name not in adapters.names:  # somebody else may have asked for the same meanwhile
            adapters.names.append(wanted.name)
        await exchange.json({"id": wanted.name, "object": "model", "parent": self._model.name})

    async def _unload_adapter(self, exchange: Exchange, name: str) -> None:
        self._must_serve()
        adapters = self._model.adapters
        if name not in adapters.names:
            raise HttpError(404, f"no adapter is called {name!r}: there are {', '.join(adapters.names) or 'none'}", "name")
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
