"""One front's life: socket, replicas, signals, exit code (0 after a signal, 1 when no replica is left, 2 for bad input)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys

import uvicorn

from systems.common.errors import InputError
from systems.dlora.server import ServerFile
from systems.dlora.serving.front import Front
from systems.dlora.serving.replicas import END_S, Replica, spawn

START_S = 600.0
"""How long the replicas may take to load."""


def serve(given: ServerFile) -> int:
    """Serve until a signal or until no replica is left; the exit code. Raises InputError for what a user must mend."""
    try:
        listening = socket.create_server((given.host, given.port), backlog=4096)
    except OSError as error:
        raise InputError("serve", "port", f"{given.host}:{given.port}", error.strerror or str(error)) from error
    with listening:
        return asyncio.run(_Life(given, listening).run())


class _Life:
    def __init__(self, given: ServerFile, listening: socket.socket) -> None:
        self._given, self._listening = given, listening
        self._replicas: list[Replica] = []
        self._over: asyncio.Event

    async def run(self) -> int:
        """Start, serve, end; whatever happens no replica outlives this."""
        self._over = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._over.set)
        patience_s = END_S
        try:
            if (code := await self._start()) is not None:
                return code
            code = await self._serve()
            patience_s += self._given.drain_s
            return code
        finally:
            await asyncio.gather(*(replica.end(patience_s) for replica in self._replicas))

    async def _start(self) -> int | None:
        """Start the replicas; None when all serve, else the exit code."""
        for index, hosted in enumerate(self._given.hosts()):
            self._replicas.append(await spawn(self._given, index, hosted))
        ready = asyncio.create_task(self._ready())
        signalled = asyncio.create_task(self._stopped())
        await asyncio.wait({ready, signalled}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if self._over.is_set() or not ready.done():
            ready.cancel()
            if not self._over.is_set():
                print(f"dlora: a replica was not ready within {START_S:g} s", file=sys.stderr)
            return 0 if self._over.is_set() else 1
        if (ended := ready.result()) is None:
            return None
        code = await ended.process.wait()
        if code != 2:  # then it has said what to mend
            print(f"dlora: replica {ended.index} ended with code {code} before it served", file=sys.stderr)
        return 2 if code == 2 else 1

    async def _ready(self) -> Replica | None:
        """Wait until all serve; the first one that ended instead."""
        waiting = {asyncio.create_task(replica.ready()): replica for replica in self._replicas}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        failed = [replica for task, replica in waiting.items() if task.done() and task.exception() is not None]
        for task in waiting:
            task.cancel()
        return failed[0] if failed else None

    async def _stopped(self) -> None:
        await self._over.wait()

    async def _serve(self) -> int:
        front = Front(self._given, self._replicas)
        http = uvicorn.Server(
            uvicorn.Config(
                front, lifespan="off", ws="none", log_level="warning", access_log=False, server_header=False,
                timeout_graceful_shutdown=max(1, round(self._given.drain_s)),
            )
        )  # fmt: skip
        listening = asyncio.create_task(http.serve(sockets=[self._listening]))
        while not http.started and not listening.done():
            await asyncio.sleep(0.005)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._over.set)  # instead of uvicorn's
        watching = [asyncio.create_task(self._watch(replica)) for replica in self._replicas]
        host, port = self._listening.getsockname()[:2]
        print(json.dumps({"host": host, "port": port, "model": self._given.model, "pid": os.getpid()}), flush=True)
        print(json.dumps({"ready": True, "replicas": [front.told(replica) for replica in self._replicas]}), flush=True)
        await self._over.wait()
        for task in watching:
            task.cancel()
        lost = all(replica.dead for replica in self._replicas)
        if not lost:
            front.draining = True
        http.should_exit = True  # uvicorn waits for the answers under way
        await listening
        return int(lost)

    async def _watch(self, replica: Replica) -> None:
        code = await replica.process.wait()
        replica.dead = True
        print(
            f"dlora: replica {replica.index} ended with code {code}: its adapters are served elsewhere, if at all",
            file=sys.stderr,
        )
        if all(other.dead for other in self._replicas):
            print("dlora: no replica is left, so the server ends", file=sys.stderr)
            self._over.set()
