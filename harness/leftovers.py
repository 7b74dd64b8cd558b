"""Sweeps what killed processes left behind: the temporary files and folders of `harness.atomic`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

#: On a shared file system another host's process may look dead from here; nothing takes this long to write, however.
GRACE_S = 60.0
_NAME = re.compile(r"\..+\.(?P<pid>[0-9]+)\.[0-9a-f]{8}\.tmp")


def sweep(folder: Path, now: float | None = None) -> None:
    """Remove from `folder` what processes that are no more left half-written, at least `GRACE_S` ago."""
    before = (time.time() if now is None else now) - GRACE_S
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may sweep at the same time
            found = _NAME.fullmatch(path.name)
            if found and path.lstat().st_mtime <= before and not alive(int(found["pid"])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def alive(pid: int) -> bool:
    """Whether this machine has a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
