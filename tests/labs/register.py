"""The register of labs on this machine: one state file each, so that what a killed lab left is found and cleaned.

A lab's state file is written before anything of it exists and removed after everything is gone. A lab is stale when its owner
(the process that holds it in a `with` block) has ended; one that a user started with `up` has no owner and stays until `down`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.labs import processes
from tests.labs.errors import LabError
from tests.labs.processes import Process
from tests.labs.rooms import Room

FOLDER = Path("/run/fivefold-labs")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(slots=True)
class State:
    """What is known of a lab from outside."""

    kind: str
    folder: str
    owner: Process | None
    settings: dict[str, Any]
    """What its constructor was given, so that another process can attach to it."""
    rooms: dict[str, Room] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)
    """Files and folders that go with it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What only this kind of lab knows, such as ports."""

    @property
    def id(self) -> str:
        """Names everything of this lab that needs a name on the machine."""
        return identity(Path(self.folder))

    @property
    def stale(self) -> bool:
        """Whether the process that should have ended it is gone (or the machine has restarted)."""
        if self.owner is not None:
            return not self.owner.alive
        return not any(room.init.alive for room in self.rooms.values())


def identity(folder: Path) -> str:
    """Ten hexadecimal digits that only a lab in `folder` has."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:10]


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """The register is nobody else's while the block runs. It vanishes with its last entry."""
    while True:
        FOLDER.mkdir(mode=0o755, exist_ok=True)
        descriptor = os.open(FOLDER, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == FOLDER.stat().st_ino:
                break
        os.close(descriptor)  # the last holder removed it while we waited
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            FOLDER.rmdir()
        os.close(descriptor)


def _file(lab_id: str) -> Path:
    return FOLDER / f"{lab_id}.json"


def write(state: State) -> None:
    """Record `state`, replacing what was recorded for its folder. Call it with the register locked."""
    path = _file(state.id)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(state)))
    temporary.replace(path)


def read(folder: Path) -> State | None:
    """What is recorded for the lab in `folder`."""
    return _load(_file(identity(folder)))


def _load(path: Path) -> State | None:
    try:
        raw: Mapping[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    owner = Process(**raw["owner"]) if raw["owner"] else None
    rooms = {name: Room(room["name"], Process(**room["init"]), room["own_pids"]) for name, room in raw["rooms"].items()}
    return State(**{**raw, "owner": owner, "rooms": rooms})


def all_states() -> list[State]:
    """Every lab on record."""
    return [state for path in sorted(FOLDER.glob("*.json")) if (state := _load(path))]


def erase(state: State) -> None:
    """End everything of the lab and forget it. Call it with the register locked; doing it twice does no harm."""
    doomed = list(_marked(state.id))
    # every room has mounts of its own, and whoever enters a room takes them; its network it may share with the machine
    mounts = {space for process, is_init in doomed if is_init for space in processes.mounts_of(process.pid)}
    processes.kill(process for process, _ in doomed)
    processes.kill(processes.members(mounts))
    for pattern in (f"fivefold-{state.id}", f"*/fivefold-{state.id}"):  # version 2, and each controller of version 1
        for group in _CGROUPS.glob(pattern):
            _remove_group(group)
    for path in map(Path, state.data):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    _file(state.id).unlink(missing_ok=True)


def _marked(lab_id: str) -> Iterator[tuple[Process, bool]]:
    """The lab's rooms by the mark on their command line (also those that nobody had the time to record).

    With each: whether it is a room's PID 1 itself, not a helper that starts it.
    """
    mark = f'"lab": "{lab_id}"'.encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, LabError):
                argv = (entry / "cmdline").read_bytes().split(b"\0")
                if any(mark in argument for argument in argv):
                    yield processes.identify(int(entry.name)), argv[0] == os.fsencode(sys.executable)


def _remove_group(group: Path) -> None:
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
