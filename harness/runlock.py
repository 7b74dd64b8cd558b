"""One run at a time in one folder, and no lock that outlives its holder.

Locks are `flock`s: the kernel drops them when the holder ends, however it ends. The file stays and names its last
holder, for the message to the one who has to wait.

Snakemake has a lock of its own, which a killed Snakemake leaves behind and which a user then has to remove by hand.
`guard` takes ours before Snakemake looks at its own; whoever has ours knows that what is left of the other is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from harness.atomic import make_folder, writing

RUN_LOCK = Path(".snakemake", "fivefold.lock")
SNAKEMAKE_LOCKS = Path(".snakemake", "locks")


class Held(Exception):  # noqa: N818
    """Another process holds the lock; `holder` says which, as far as is known."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


def take(path: Path) -> IO[bytes]:
    """The lock `path`, held until the file that this gives is closed or the process ends. Raises Held when taken."""
    with writing(path):
        make_folder(path.parent)
        file = path.open("a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        raise Held(holder) from None
    _sign(file)
    return file


@contextlib.contextmanager
def waiting_for(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `path` in the block; where another process has it, `say` so once and wait until it is free."""
    try:
        file = take(path)
    except Held as held:
        say(f"{path}: held by {held.holder}: waiting until it ends")
        file = path.open("a+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        _sign(file)
    with file:
        yield


def _sign(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n".encode())


def guard(workflow: Any) -> None:  # noqa: ANN401
    """Make `workflow`, Snakemake's, refuse to run while another Snakemake runs in the same folder.

    Dry runs, linting and the like run beside anything, and so do the sub-processes that Snakemake starts for jobs.
    Called from the Snakefile: the lock must be taken after Snakemake knows what it is asked to do, and before it
    looks at its own lock, and there is no hook between the two; hence the wrapped method.
    """
    execute = workflow.execute

    def guarded(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        plugin = kwargs.get("executor_plugin") or next(iter(args), None)
        dry = bool(plugin and plugin.common_settings.dryrun_exec)
        if dry or not workflow.is_main_process or not workflow.execution_settings.lock:
            return execute(*args, **kwargs)
        with _run_lock():
            shutil.rmtree(SNAKEMAKE_LOCKS, ignore_errors=True)
            return execute(*args, **kwargs)

    workflow.execute = guarded


def _run_lock() -> IO[bytes]:
    try:
        return take(RUN_LOCK)
    except Held as held:
        raise SystemExit(
            f"{Path.cwd()}: run: {held.holder} is running Snakemake here: wait until it ends, or run in another folder"
        ) from None
