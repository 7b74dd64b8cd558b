"""Workers: one at work and some that get ready meanwhile, each in a process group of its own, ended on every way out."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from systems.maveriq.profile.jobs import Job
from systems.maveriq.profile.memory import ALLOCATOR

ROOT = Path(__file__).parents[3]
START_S = 180.0
AHEAD = 3 if (os.cpu_count() or 1) >= 8 else 1
"""Workers that get ready (seconds of imports, no GPU) while one measures: an engine of a fingerprint is done in two seconds."""


@dataclass
class Done:
    """What came of a job: rows by output length, how the engine's build went, or an error in one line."""

    job: Job
    rows: list[dict[str, Any]] = field(default_factory=list)
    import_s: float = 0.0
    built_s: float = 0.0
    wall_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Worker:
    """One worker's process."""

    def __init__(self) -> None:
        path = os.environ.get("PYTHONPATH")
        environment = {**ALLOCATOR, **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - kept until the worker has ended
        self.process = subprocess.Popen(
            [sys.executable, "-m", "systems.maveriq.profile.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, env=environment, process_group=0, text=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed by `end`
            for line in self.process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def message(self, limit_s: float) -> dict[str, Any]:
        """The next thing it says. Raises TimeoutError after `limit_s`, EOFError when it has ended."""
        try:
            line = self._lines.get(timeout=max(0.0, limit_s))
        except queue.Empty as error:
            raise TimeoutError("took too long") from error
        if line is None:
            raise EOFError(f"ended with {self.process.wait()}: {self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def give(self, job: Job) -> None:
        """Its job. Raises OSError when it has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job.to_json()) + "\n")
        self.process.stdin.flush()

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = [line for line in self._words.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else "no word"

    def end(self, patience_s: float = 0.0) -> None:
        """End it and what it started; returns when it has ended, so that its memory is free."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._words):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()


class Crew:
    """Use as `with Crew() as crew`."""

    def __init__(self) -> None:
        self._ready: deque[Worker] = deque()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._ready:
            self._ready.popleft().end()

    def do(self, job: Job, limit_s: float, more: int = 1) -> Done:
        """Do one job; what goes wrong is in its `error`. `more` follow, so get workers ready meanwhile."""
        worker = self._ready.popleft() if self._ready else Worker()
        found, began = Done(job), time.monotonic()
        try:
            _take(found, worker.message(START_S))
            if found.error:
                return found
            worker.give(job)
            while len(self._ready) < min(more, AHEAD):
                self._ready.append(Worker())
            until = time.monotonic() + limit_s
            while not (found.error or found.facts):
                _take(found, worker.message(until - time.monotonic()))
        except (TimeoutError, EOFError, OSError, ValueError) as error:
            found.error = (
                f"{str(error) or type(error).__name__} (limit {limit_s:.0f} s)"
                if isinstance(error, TimeoutError)
                else str(error)
            )
        finally:
            worker.end(patience_s=5.0 if not found.error else 0.0)
            found.wall_s = time.monotonic() - began
        return found


def _take(found: Done, message: dict[str, Any]) -> None:
    if "error" in message:
        found.error = str(message["error"])
    elif "ready" in message:
        found.import_s = float(message["import_s"])
    elif "row" in message:
        found.rows.append(message["row"])
        found.built_s = float(message["built_s"])
    else:
        found.facts = message
