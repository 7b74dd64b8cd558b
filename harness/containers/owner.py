"""Who started a container, and what is left of those who are gone.

A container's leash ends it within seconds of its controller's end, but then it still lies there, ended. The next run on
the same engine removes it.
"""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.containers.engine import Engine
from harness.containers.models import LABEL

CONTROLLER = f"{LABEL}.controller"
STAGE = f"{LABEL}.stage"
OLD_S = 600.0


def this_process() -> str:
    """This process, told apart from every other one, now and later, of any machine."""
    return f"{_machine()} {os.getpid()} {_start_time(os.getpid())}"


def gone(controller: str) -> bool | None:
    """Whether the process that this names has ended; None when it is of another machine."""
    machine, _, process = controller.partition(" ")
    pid, _, start = process.partition(" ")
    if machine != _machine() or not pid.isdecimal():
        return None
    return _start_time(int(pid)) != start


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    return f"{platform.node()}/{boot}"


def _start_time(pid: int) -> str:
    """In the kernel's ticks since boot: a number that is used again gets another one. Zombies have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "none"
    return "none" if fields[0] in "ZX" else fields[19]


def reap(engine: Engine) -> int:
    """Remove what controllers that are gone, and builds that were cut off, have left; how many containers that were."""
    count = 0
    for label in (CONTROLLER, f"{STAGE}=system"):
        for found in engine.api.containers(all=True, filters={"label": label}):
            if _left_behind(engine, found):
                with contextlib.suppress(Exception):  # another controller may do the same right now
                    engine.api.remove_container(found["Id"], force=True, v=True)
                    count += 1
    return count


def _left_behind(engine: Engine, found: dict[str, Any]) -> bool:
    ended = gone(found["Labels"].get(CONTROLLER, ""))
    if ended is not None:
        return ended
    return found["State"] in ("exited", "dead", "created") and _age_s(engine, found["Id"]) > OLD_S


def _age_s(engine: Engine, container: str) -> float:
    """Seconds since it ended, or since it was made where it never began."""
    try:
        told = engine.api.inspect_container(container)
    except Exception:  # somebody has removed it
        return 0.0
    text = told["State"]["FinishedAt"]
    text = told["Created"] if text.startswith("0001") else text
    return (datetime.now(UTC) - datetime.fromisoformat(text[:19]).replace(tzinfo=UTC)).total_seconds()
