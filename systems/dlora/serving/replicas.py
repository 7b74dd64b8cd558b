"""Replicas: one server process each (`systems.common.serve`), in a process group of its own, ended by whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from systems.common.load.wire import BadResponseError, ResponseReader
from systems.dlora.server import ServerFile

END_S = 10.0
"""How long a replica may take to end, beside the time that its requests may take, before it is killed."""
FAILURES = (OSError, asyncio.IncompleteReadError, BadResponseError)


class ReplicaGoneError(Exception):
    """A replica ended, or broke off before it had begun to answer."""


@dataclass(slots=True)
class Replica:
    """One server process; `counts` are its outstanding requests by adapter."""

    index: int
    hosted: set[int]
    process: asyncio.subprocess.Process
    port: int = 0
    dead: bool = False
    counts: Counter[int] = field(default_factory=Counter)

    async def ready(self) -> None:
        """Read its two lines. Raises ReplicaGoneError when it ends first."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            told = json.loads(line)
            self.port = told.get("port", self.port)
            if told.get("ready"):
                return
        raise ReplicaGoneError(self.index)

    async def answer(self, path: str, body: bytes) -> AsyncIterator[tuple[int, Mapping[str, str], bytes]]:
        """Pieces of its answer, each with status and headers. Raises ReplicaGoneError when it breaks off."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError as error:
            raise ReplicaGoneError(self.index) from error
        try:
            head = f"POST {path} HTTP/1.1\r\nhost: replica\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            response = ResponseReader()
            while not response.done:
                if not (data := await reader.read(1 << 16)):
                    response.end()
                    return
                for piece in response.feed(data):
                    yield response.status, response.headers, piece
        except FAILURES as error:
            raise ReplicaGoneError(self.index) from error
        finally:
            writer.close()

    async def end(self, patience_s: float) -> None:
        """End it and everything it started."""
        for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, END_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), wait_s)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it has left behind


async def spawn(given: ServerFile, index: int, hosted: set[int]) -> Replica:
    """Start replica `index`, which hosts the adapters `hosted` and the base model."""
    devices = given.devices(index)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices else {}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "systems.common.serve", *given.replica_options(hosted),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        env={**os.environ, **visible}, preexec_fn=_end_with_parent,
    )  # fmt: skip
    return Replica(index, hosted | {len(given.adapters)}, process)


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """SIGTERM from the kernel when the front is killed: nothing may be loaded or allocated between fork and exec."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
