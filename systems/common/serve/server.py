"""One server's life: socket, start, signals, drain, exit code.

Exit codes: 0 after SIGTERM or SIGINT, 1 when the engine died, 2 for bad input (one line says what to mend).
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable

import uvicorn

from systems.common.errors import InputError
from systems.common.serve import tokenizers
from systems.common.serve.app import App
from systems.common.serve.config import ServeConfig
from systems.common.serve.messages import Ended, Ready
from systems.common.serve.metrics import Metrics
from systems.common.serve.process import SIGNALS, EngineProcess
from systems.common.serve.served import Adapters, Model
from systems.common.serve.silence import Silent
from systems.common.serve.streams import Streams

FILES_KEPT = 64
"""File descriptors that connections must leave."""
KEEP_ALIVE_S = 75
STOP_S = 5.0
"""How long the idle engine may take to end."""
SILENT_S = 75.0
"""How long a connection may last on which no whole request has come."""
SWEEP_S = 5.0
ANSWER_S = 2.0
"""How long answers that are complete may take to leave when the server ends."""


def serve(config: ServeConfig, start: Callable[[], EngineProcess] | None = None) -> int:
    """Serve until a signal or the engine's death; the exit code. Raises InputError for what a user must mend.

    `start` starts another engine's process than the one that `config` describes.
    """
    early: list[int] = []
    for number in SIGNALS:  # until the event loop listens to them
        signal.signal(number, lambda given, _: early.append(given))
    with _listen(config.host, config.port) as listening, start() if start is not None else EngineProcess(config) as engine:
        source = config.weights or config.gguf
        weights = source.name if source is not None else f"random (seed {config.seed})"
        weights += f", {config.quantization}" if config.quantization else ""
        model = Model(config.name, tokenizers.choose(config), weights, Adapters())
        return asyncio.run(_Server(config, model, engine, listening, early).run())


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError("serve", "host", host, error.strerror or str(error)) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(4096)
    except OSError as error:
        listening.close()
        key, value = ("port", port) if error.errno in (errno.EADDRINUSE, errno.EACCES) else ("host", host)
        mend = f"{error.strerror}: choose another, or 0 for a free one" if key == "port" else str(error.strerror)
        raise InputError("serve", key, value, mend) from error
    return listening


def _most_connections() -> int:
    """Connections that the process may hold, after raising its own limit as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(1, (65_536 if soft == resource.RLIM_INFINITY else soft) - FILES_KEPT)


class _Server:
    def __init__(
        self, config: ServeConfig, model: Model, engine: EngineProcess, listening: socket.socket, early: list[int]
    ) -> None:
        self._config, self._model, self._engine, self._listening = config, model, engine, listening
        self._early = early
        self._ready = False
        self._ended: Ended | None = None
        self._signals = 0

    async def run(self) -> int:
        """Serve; the exit code. Raises the InputError that kept the engine from starting."""
        self._news = asyncio.Event()
        metrics = Metrics()
        streams = Streams(self._engine, metrics, self._engine_changed, self._config.seed)
        app = App(self._model, streams, metrics)
        http = uvicorn.Server(
            uvicorn.Config(
                app, lifespan="off", ws="none", log_level="warning", access_log=False, server_header=False,
                limit_concurrency=_most_connections(), timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(ANSWER_S)),
            )
        )  # fmt: skip
        listening = asyncio.create_task(http.serve(sockets=[self._listening]))
        while not http.started and not listening.done():
            await asyncio.sleep(0.005)
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled)  # instead of uvicorn's, which would close at once
        if self._early or http.should_exit:
            self._signalled()
        sweeping = asyncio.create_task(self._sweep(http))
        host, port = self._listening.getsockname()[:2]
        print(json.dumps({"host": host, "port": port, "model": self._model.name, "pid": os.getpid()}), flush=True)
        while self._ended is None and not self._signals:
            await self._news.wait()
            self._news.clear()
        await self._drain(app, streams)
        sweeping.cancel()
        http.should_exit = True
        await listening
        if self._ended is None:
            if self._ready:  # else it is still loading, and hears nothing
                self._engine.stop(STOP_S)
            return 0
        return self._verdict(self._ended)

    async def _sweep(self, http: uvicorn.Server) -> None:
        """Close the connections of those who never ask: uvicorn gives them all the time in the world."""
        silent = Silent(SILENT_S)
        while True:
            await asyncio.sleep(SWEEP_S)
            for connection in silent.overdue(http.server_state.connections, time.monotonic()):
                connection.transport.close()

    def _signalled(self) -> None:
        self._signals += 1
        self._news.set()

    def _engine_changed(self, report: Ready | Ended) -> None:
        if isinstance(report, Ready):
            self._ready = True
            self._model.adapters.names.extend(report.adapters)
            limits = {"kv_blocks": report.config.num_gpu_blocks, "max_model_len": report.max_tokens, **report.about}
            print(json.dumps({"ready": True, "device": report.device, "dtype": report.dtype, **limits}), flush=True)
        else:
            self._ended = report
            self._news.set()

    async def _drain(self, app: App, streams: Streams) -> None:
        """Take nothing new, let what runs end: up to the limit, a second signal or the engine's death; then end it."""
        app.drain()
        limit = time.monotonic() + self._config.drain_s
        while app.busy and time.monotonic() < limit and self._signals < 2 and self._ended is None:
            await asyncio.sleep(0.02)
        for stream in list(streams.open.values()):
            streams.abort(stream)
        limit = time.monotonic() + ANSWER_S
        while app.busy and time.monotonic() < limit:
            await asyncio.sleep(0.01)

    def _verdict(self, ended: Ended) -> int:
        if ended.fault is not None and not self._ready:
            raise ended.fault
        print(f"{ended.trace}serve: engine: {ended.reason}: the engine died, so the server ends", file=sys.stderr)
        return 1
