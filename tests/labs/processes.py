"""Processes seen from outside: which are alive, which belong to a namespace, and how to end them for certain.

A zombie counts as gone: PID 1 of a small machine may take seconds to reap one, and `kill -0` succeeds until then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.labs.errors import LabError


@dataclass(frozen=True, slots=True)
class Process:
    """A process that another with the same number can't be taken for: `started` is its start time in clock ticks since boot."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        return _start_time(self.pid) == self.started

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def identify(pid: int) -> Process:
    """The process that has the number `pid` now. Raises LabError when there is none."""
    started = _start_time(pid)
    if started is None:
        raise LabError(f"process {pid} has ended")
    return Process(pid, started)


def _start_time(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout_s: float = 60,
    check: bool = True,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `argv` to its end and give back what it printed.

    Raises:
        LabError: it failed (where `check`), took longer than `timeout_s` seconds, or there is no such program.
    """
    shown = " ".join(map(str, argv))
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment, cwd=folder
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"no end after {timeout_s} s: {shown}") from error
    except FileNotFoundError as error:
        raise LabError(f"{error.filename}: no such program or folder: {shown}") from error
    if check and done.returncode:
        raise LabError(f"exit status {done.returncode}: {shown}: {tail(done.stderr or done.stdout)}")
    return done


def tail(text: str, lines: int = 3) -> str:
    """The last `lines` lines of `text` that say something, as one line."""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 10, every_s: float = 0.01) -> None:
    """Return as soon as `condition` holds. Raises LabError, naming `what`, when it doesn't within `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {timeout_s} s")
        time.sleep(every_s)


def mounts_of(pid: int) -> frozenset[str]:
    """The mount namespace of `pid`, such as `mnt:[4026532001]`; empty when it has ended."""
    try:
        return frozenset([str(Path(f"/proc/{pid}/ns/mnt").readlink())])
    except OSError:
        return frozenset()


def members(mounts: Collection[str]) -> Iterator[Process]:
    """The live processes whose mount namespace is among `mounts`, this one excepted."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and mounts_of(int(entry.name)) & set(mounts):
            with contextlib.suppress(LabError):
                yield identify(int(entry.name))


def kill(victims: Iterable[Process], timeout_s: float = 10) -> None:
    """End processes with SIGKILL and wait until they are gone. Raises LabError when one isn't in time."""
    victims = list(victims)
    for victim in victims:
        victim.signal(signal.SIGKILL)
    wait_for(lambda: not any(victim.alive for victim in victims), f"end of {len(victims)} processes", timeout_s)
