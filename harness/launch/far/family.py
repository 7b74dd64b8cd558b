"""A process with all its descendants, started and ended as one.

On Linux no descendant gets away: orphans are handed to this process (it is their "subreaper"), also those that made a
session of their own, and the process itself is killed by the kernel when this one is. Elsewhere its process group is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LINUX = sys.platform == "linux"
_LIBC = ctypes.CDLL(None, use_errno=True) if _LINUX else None
_KILL_S = 5.0


def _prctl(option: int, value: int) -> None:
    if _LIBC is not None:
        _LIBC.prctl(option, value, 0, 0, 0)


def start(argv: Sequence[str], env: Mapping[str, str], cwd: str) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own, with pipes for what it prints. Raises OSError when it can't be started."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    return subprocess.Popen(
        list(argv),
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        bufsize=0,
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )


def descendants() -> list[int]:
    """Every living process below this one, zombies left out."""
    if not _LINUX:
        return []
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(folder.name)] = int(parent)
    return [pid for pid in parents if _below(pid, os.getpid(), parents)]


def _below(pid: int, ancestor: int, parents: Mapping[int, int]) -> bool:
    seen = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM to `child` and all below; what is there `grace_s` seconds later gets SIGKILL, until nothing is left."""
    _until_gone(child, signal.SIGTERM, grace_s, once=True)
    _until_gone(child, signal.SIGKILL, _KILL_S, once=False)


def kill(child: subprocess.Popen[bytes]) -> None:
    """As `end`, without asking first."""
    _until_gone(child, signal.SIGKILL, _KILL_S, once=False)


def _until_gone(child: subprocess.Popen[bytes], number: int, seconds: float, once: bool) -> None:
    limit = time.monotonic() + seconds
    first = True
    while _members(child) and (first or time.monotonic() < limit):
        if first or not once:
            _signal(child, number)
        first = False
        _reap(child)
        time.sleep(0.02)


def _members(child: subprocess.Popen[bytes]) -> bool:
    _reap(child)
    return child.returncode is None or bool(descendants())


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(child.pid, number)
    for pid in descendants():
        with contextlib.suppress(OSError):
            if os.getpgid(pid) != child.pid:  # has left the group
                os.kill(pid, number)


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Take leave of the dead: `child` by its own means, then whatever orphans have been handed to this process."""
    child.poll()
    while child.returncode is not None:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return
