"""Orders to processes of ours and their answers, one JSON line each: the owner's half (`Child`) and theirs (`orders`, `say`).

When a process's standard input closes its owner is gone: it ends at once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from systems.common.errors import InputError
from systems.common.gpu.mps import THREADS

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S, WATCH_S = 60.0, 0.5
ENDED = 3
"""The exit status of a process whose owner is gone."""
Order = Mapping[str, Any]


class Child:
    """A process of `module`, ended with its whole group when this closes, and by itself when we die.

    Attributes:
        module, where: what is started, and who complains where it fails; a subclass says.
        side: what it is told to be.
    """

    module: ClassVar[str]
    where: ClassVar[str]

    def __init__(self, side: str, environment: Mapping[str, str]) -> None:
        self.side = side
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # the limit is for tuning alone; one that lies about in our environment would throttle serving too (sheet 9)
            env={**{key: value for key, value in os.environ.items() if key != THREADS}, **environment},
            cwd=ROOT,
            start_new_session=True,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def order(self, **order: object) -> None:
        """Send one order; a child that has ended is found out by `answer`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def answer(self, timeout_s: float = ANSWER_S, watch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Its next line; `watch` is called now and then and may raise.

        Raises:
            InputError: what the child refused, that it ended, or that it says nothing for too long.
        """
        waited_s = 0.0
        while True:
            try:
                line = self._lines.get(timeout=WATCH_S)
                break
            except queue.Empty:
                waited_s += WATCH_S
                watch()
                if waited_s >= timeout_s:
                    mend = "no answer: see the messages above, or run again"
                    raise InputError(self.where, f"{self.side} process", f"{timeout_s:g} s", mend) from None
        if not line:
            code = self._process.wait()
            raise InputError(self.where, f"{self.side} process", f"exit code {code}", "it died: its messages are above")
        told: dict[str, Any] = json.loads(line)
        if "refused" in told:
            raise InputError(*told["refused"])
        if "failed" in told:
            raise InputError(self.where, f"{self.side} process", told["failed"], "its messages are above")
        return told

    def close(self) -> None:
        """End the process and all it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def orders() -> queue.Queue[Order]:
    """Orders as they come; the process ends when there can be no more."""
    found: queue.Queue[Order] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        os._exit(ENDED)

    threading.Thread(target=read, daemon=True).start()
    return found


def say(**told: object) -> None:
    """Answer the owner."""
    out = sys.__stdout__
    assert out is not None
    out.write(json.dumps(told) + "\n")
    out.flush()
