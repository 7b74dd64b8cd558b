"""The same work on many hosts at once; one that fails does not stop the others."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TextIO, TypeVar

from harness.inventory import Host
from systems.registry import InputError

AT_ONCE = 32
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gathered(Generic[T]):
    """What came of the work, by host: `done` where it went well, `failed` where not; both in the order of the hosts."""

    done: dict[str, T] = field(default_factory=dict)
    failed: dict[str, InputError] = field(default_factory=dict)


def fan_out(hosts: Sequence[Host], work: Callable[[Host], T], *, at_once: int = AT_ONCE) -> Gathered[T]:
    """Do `work` on every one of `hosts`, at most `at_once` at a time, and wait for all of them.

    An InputError (every RemoteError is one) counts as that host's failure; anything else is a mistake in the program, and
    is raised when all have ended.
    """
    gathered: Gathered[T] = Gathered()
    with ThreadPoolExecutor(max_workers=max(1, min(at_once, len(hosts)))) as pool:
        running = [(host, pool.submit(work, host)) for host in hosts]
    for host, future in running:
        try:
            gathered.done[host.name] = future.result()
        except InputError as error:
            gathered.failed[host.name] = error
    return gathered


class Console:
    """Lines of several hosts on one stream, each whole and with its host before it."""

    def __init__(self, hosts: Sequence[Host], stream: TextIO | None = None) -> None:
        self._wide = max((len(host.name) for host in hosts), default=0)
        self._stream, self._lock = stream, threading.Lock()

    def of(self, host: Host) -> Callable[[str], None]:
        """What says a line of `host`."""

        def say(line: str) -> None:
            shown = "".join(letter if letter.isprintable() or letter == "\t" else "?" for letter in line)
            with self._lock:
                stream = self._stream or sys.stderr
                stream.write(f"{host.name:<{self._wide}} | {shown}\n")
                stream.flush()

        return say
