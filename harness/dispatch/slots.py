"""Which host is next: one that has a slot free for a job, by locks that end with their holder.

A slot of a host is taken twice: here, so that the jobs of one run spread over the hosts without asking them, and on the
host itself (by the leash), so that two controllers do not share what one of them has reserved.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness.atomic import make_folder
from harness.inventory import Host

FOLDER = Path(".snakemake", "fivefold-slots")
_AGAIN_S = 0.2


def count_of(host: Host, otherwise: int) -> int:
    """How many jobs may run on `host` at once."""
    return int(getattr(host, "slots", None) or otherwise)


@contextlib.contextmanager
def taken(hosts: Sequence[Host], slots: int, say: Callable[[str], None], folder: Path = FOLDER) -> Iterator[Host]:
    """One of `hosts` with a free slot, which is held in the block; says once when it has to wait for one."""
    make_folder(folder)
    waited = threading.Event()
    told = False
    while (found := _free(hosts, slots, folder)) is None:
        if not told:
            say(f"all slots of {', '.join(host.name for host in hosts)} are taken: waiting for one")
            told = True
        waited.wait(_AGAIN_S * random.uniform(0.5, 1.5))
    host, lock = found
    with lock:
        yield host


def _free(hosts: Sequence[Host], slots: int, folder: Path) -> tuple[Host, contextlib.AbstractContextManager[object]] | None:
    """A free slot: first slots of all hosts before second ones, so that jobs spread."""
    for number in range(max(count_of(host, slots) for host in hosts)):
        for host in random.sample(list(hosts), len(hosts)):
            if number >= count_of(host, slots):
                continue
            where = hashlib.sha256(f"{host.user}@{host.address}:{host.port}".encode()).hexdigest()[:12]
            file = (folder / f"{host.name}-{where}-{number}").open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            return host, file
    return None
