"""The integer program in a process of its own: the manager goes on passing tokens, and one that takes too long is killed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from systems.common.serve.messages import Ended, Stop
from systems.common.serve.process import EngineProcess, listen
from systems.dlora.cluster import ilp


@dataclass(frozen=True, slots=True)
class Ask:
    """Solve this within `limit_s` seconds."""

    ticket: int
    program: ilp.Program
    limit_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found, or None; the first one (ticket 0) says that the process takes questions."""

    ticket: int
    found: ilp.Assignment | None = None


class Solver:
    """The manager's end. `put` is called with every `Answer`, in a thread of its own; use it as a context manager."""

    def __init__(self, put: Callable[[Answer], None]) -> None:
        self._put = put
        self._process: EngineProcess | None = None
        self._ready = False
        self._ended: str | None = None

    def __enter__(self) -> Solver:
        """Itself, starting."""
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.__exit__()

    @property
    def ready(self) -> bool:
        """Whether it takes questions."""
        return self._ready

    @property
    def ended(self) -> str | None:
        """Why its process has ended by itself, if it has."""
        return self._ended

    def ask(self, question: Ask) -> None:
        """Have something solved."""
        assert self._process is not None
        self._process.send(question)

    def restart(self) -> None:
        """It took too long, or died: another one takes its place, in a while."""
        if self._process is not None:
            self._process.__exit__()
        self._start()

    def _start(self) -> None:
        self._ready, self._ended = False, None
        self._process = process = EngineProcess(None, run)
        threading.Thread(target=self._listen, args=(process,), name="solver", daemon=True).start()

    def _listen(self, process: EngineProcess) -> None:
        while isinstance(answer := process.receive(), Answer):
            if process is self._process:
                self._ready = True
                self._put(answer)
        if process is self._process:
            self._ready, self._ended = False, str(answer.reason)


def run(connection: Connection, _: object) -> Ended:
    """Answer questions until told to end."""
    import scipy.optimize  # noqa: F401  takes its time, which no question should wait for

    inbox: SimpleQueue[Any] = SimpleQueue()
    listen(connection, inbox.put)
    connection.send(Answer(0))
    while not isinstance(asked := inbox.get(), Stop):
        connection.send(Answer(asked.ticket, ilp.solve(asked.program, asked.limit_s)))
    return Ended()
