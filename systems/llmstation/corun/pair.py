"""Serving and tuning as two processes with two copies of the weights, under an MPS daemon of our own: the strangers' baselines.

`vLLM + torchtune` caps tuning at a thread percentage, `chunked` trains on short sequences without a cap. Serving is
the same engine with the same kernels as everywhere; tuning is the same trainer, never suspended, with activation checkpointing.
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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.common.gpu.mps import THREADS, MpsDaemon
from systems.llmstation.corun.measure import device_of, told_of

ROOT = Path(__file__).resolve().parents[3]
START_S = 300.0
WATCH_S = 0.5


class Child:
    """A process of `corun.child`, ended with its whole group when this closes, and by itself when we die."""

    def __init__(self, side: str, environment: Mapping[str, str]) -> None:
        self.side = side
        self._process = subprocess.Popen(
            [sys.executable, "-m", "systems.llmstation.corun.child", side],
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

    def answer(self, timeout_s: float, watch: Callable[[], None] = lambda: None) -> dict[str, Any]:
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
                    raise InputError("llmstation", f"{self.side} process", f"{timeout_s:g} s", mend) from None
        if not line:
            code = self._process.wait()
            raise InputError("llmstation", f"{self.side} process", f"exit code {code}", "it died: its messages are above")
        told: dict[str, Any] = json.loads(line)
        if "refused" in told:
            raise InputError(*told["refused"])
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


def pair(trial: Trial, tuning_tokens: int, thread_percentage: float | None, serve_s: float) -> dict[str, Any]:
    """Serve the workload of `trial` beside a tuner of sequences of `tuning_tokens`; what the two sides said, merged.

    Args:
        trial: what is served.
        tuning_tokens: length of the tuner's packed sequences.
        thread_percentage: of the GPU's threads for tuning; None for no limit.
        serve_s: how long serving may take at most, seconds.

    Raises:
        InputError: MPS cannot be had, or a side refused or died.
    """
    with ExitStack() as owned:
        daemon = MpsDaemon() if device_of(trial.hardware) == "cuda" else None
        if daemon is not None:
            owned.callback(daemon.close)
        sides = {}
        for side in ("serve", "tune"):
            limit = thread_percentage if side == "tune" else None
            sides[side] = Child(side, daemon.environment(limit) if daemon is not None else {})
            owned.callback(sides[side].close)
        watch = daemon.check if daemon is not None else lambda: None
        serving, tuning = sides["serve"], sides["tune"]
        for child in (serving, tuning):
            child.order(trial=told_of(trial), tuning_tokens=tuning_tokens)
        notes = [note for child in (serving, tuning) for note in child.answer(START_S, watch)["notes"]]
        for child in (tuning, serving):
            child.order(order="begin")
        served = serving.answer(serve_s, watch)
        tuning.order(order="end")
        tuned = tuning.answer(60.0, watch)
    limit_note = "two processes without MPS" if daemon is None else "two processes under MPS"
    return {**served, "tuned": tuned, "notes": [*served["notes"], *notes, limit_note]}
