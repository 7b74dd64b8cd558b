"""Engines: one process per deployment, spoken to over HTTP, and ended by whoever started it.

A process announces itself on stdout with one JSON line that holds its `port`, then one with `"ready": true`, as
`python -m systems.common.serve` does. It runs in a session of its own, gets SIGTERM and then SIGKILL, and SIGTERM from the
kernel when the controller itself is killed. Its ranks on further GPUs are of the same session: an engine has ended when all
of them have, and only then is its memory free.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.maveriq.controller.launch import Launch
from systems.maveriq.profile.memory import ALLOCATOR

END_S = 10.0
"""How long an engine may take to end before it is killed."""
REQUEST_S = 150.0
"""How long a request may take: the artifact's limit."""


class EngineDiedError(Exception):
    """The engine's process has ended, or does not answer any more. Its text says how."""


class RequestFailedError(Exception):
    """The engine is well and refused this request. Its text says why."""


@dataclass
class Engine:
    """A running engine process. `ended` is set once it has ended, whoever ended it; `load_s` is how long it took to serve."""

    process: asyncio.subprocess.Process
    launch: Launch
    port: int
    model: str
    ended: asyncio.Event
    said: list[str]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    load_s: float = 0.0

    @property
    def pid(self) -> int:
        """Of the process; also its group and its session."""
        return self.process.pid

    def processes(self) -> list[int]:
        """Ids of all its processes: server, engine, ranks (Linux)."""
        return session(self.pid)

    async def complete(self, text: str, tokens: int, timeout_s: float = REQUEST_S) -> str:
        """The answer to `text`, `tokens` tokens long.

        Raises:
            EngineDiedError: the connection broke, the process ended, or nothing came in `timeout_s`.
            RequestFailedError: the engine answered with an error.
        """
        body = {"model": self.model, "prompt": text, "max_tokens": tokens, "temperature": 0}
        try:
            status, answer = await asyncio.wait_for(_post(self.port, "/v1/completions", body), timeout_s)
        except TimeoutError as error:
            raise EngineDiedError(f"no answer in {timeout_s:g} s") from error
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise EngineDiedError(self._how(error)) from error
        if status == 500 and _code(answer) == "engine_died":  # a rank, say: the server is about to end
            raise EngineDiedError(_message(answer))
        if status != 200:
            raise RequestFailedError(f"HTTP {status}: {_message(answer)}")
        try:
            return str(answer["choices"][0]["text"])
        except (KeyError, IndexError, TypeError) as error:
            raise RequestFailedError("the engine's answer has no text") from error

    def _how(self, error: BaseException) -> str:
        code = self.process.returncode
        last = self.said[-1] if self.said else ""
        how = f"connection lost ({type(error).__name__})" if code is None else f"engine ended with {code}"
        return f"{how}: {last}" if last else how

    async def end(self) -> None:
        """End the process and everything it started; returns when all have ended."""
        for number, patience_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), patience_s)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what the engine itself has left
        limit = time.monotonic() + END_S
        while (left := self.processes()) and time.monotonic() < limit:  # ranks have groups of their own
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)
        for task in self.tasks:
            task.cancel()


def session(leader: int) -> list[int]:
    """Ids of the processes in the session of `leader` that have not ended; none where there is no /proc."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            state, _, _, of, *_ = file.read_text().rpartition(") ")[2].split()
            if int(of) == leader and state != "Z":
                found.append(int(file.parent.name))
    return found


async def start(launch: Launch, start_s: float = 600.0) -> Engine:
    """Start an engine; returns when it serves. Raises EngineDiedError when it does not."""
    begun, command = time.monotonic(), launch.argv
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**ALLOCATOR, **os.environ, **_visible(launch.devices)},
            preexec_fn=end_with_parent,
        )
    except OSError as error:
        raise EngineDiedError(f"{command[0]} can't be started: {error}") from error
    engine = Engine(process, launch, 0, "", asyncio.Event(), [])
    engine.tasks = [asyncio.create_task(_watch(engine)), asyncio.create_task(_collect(process.stderr, engine.said))]
    try:
        await asyncio.wait_for(_greeted(engine), start_s)
    except BaseException as error:
        await engine.end()
        if isinstance(error, TimeoutError | ValueError | EngineDiedError):
            last = f": {engine.said[-1]}" if engine.said else ""
            raise EngineDiedError(f"did not start ({type(error).__name__}, exit {process.returncode}){last}") from error
        raise
    engine.load_s = time.monotonic() - begun
    return engine


def _visible(devices: Sequence[int]) -> Mapping[str, str]:
    """Rank r sees them all and takes the r-th; numbers as nvidia-smi gives them."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if devices else {}


async def _greeted(engine: Engine) -> None:
    stdout = engine.process.stdout
    assert stdout is not None
    while True:
        line = await stdout.readline()
        if not line:
            await engine.ended.wait()
            raise EngineDiedError("ended before it was ready")
        told = json.loads(line)
        if "port" in told:
            engine.port, engine.model = int(told["port"]), str(told.get("model", ""))
        if told.get("ready"):
            engine.tasks.append(asyncio.create_task(_collect(stdout, [])))
            return


async def _watch(engine: Engine) -> None:
    await engine.process.wait()
    engine.ended.set()


async def _collect(stream: asyncio.StreamReader | None, said: list[str]) -> None:
    """Keep the last lines of a stream, so that it never fills up and an error can name what was said."""
    while stream is not None and (line := await stream.readline()):
        said.append(line.decode(errors="replace").rstrip()[:500])
        del said[:-20]


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Called in a child before it becomes its command: SIGTERM from the kernel when the parent dies (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _post(port: int, path: str, body: Mapping[str, object]) -> tuple[int, Mapping[str, Any]]:
    """One HTTP exchange on a connection of its own: status and JSON."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
        status = int(lines[0].split()[1])
        content = (
            await reader.readexactly(int(headers["content-length"])) if "content-length" in headers else await reader.read()
        )
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return status, found
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _code(answer: Mapping[str, object]) -> str:
    error = answer.get("error")
    return str(error.get("code")) if isinstance(error, Mapping) else ""


def _message(answer: Mapping[str, object]) -> str:
    error = answer.get("error")
    return str(error.get("message")) if isinstance(error, Mapping) else str(answer)[:200]


def check_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """A user's engine command. Raises InputError for an empty one."""
    if not argv:
        raise InputError("controller", "engine command", list(argv), "give a command that announces its port as JSON")
    return tuple(argv)
