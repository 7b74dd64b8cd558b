"""Ends a process whose parent is gone: after `kill -9` of Snakemake no job runs on."""

from __future__ import annotations

import os
import signal
import threading

EVERY_S = 0.5


def end_with_parent() -> None:
    """From now on, if the process that started this one ends, this one gets SIGTERM within a second.

    The parent must be the one that matters: a shell in between has to `exec` the command.
    """
    threading.Thread(target=_watch, args=(os.getppid(), threading.Event()), daemon=True, name="end_with_parent").start()


def _watch(parent: int, never: threading.Event) -> None:
    while not never.wait(EVERY_S):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return
