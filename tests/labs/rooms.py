"""Rooms: a process tree with its own network, mounts, host name and processes, which ends as one.

Nothing of a room is registered anywhere (no name under /run/netns, no mount that others see): when its PID 1 dies, the kernel
kills what runs in it and takes down its links, bridges, mounts and memory disks. That is what makes teardown complete.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.labs import processes
from tests.labs.errors import LabError
from tests.labs.processes import Process

_INIT = Path(__file__).with_name("room_init.py")
_START_S = 20


@dataclass(frozen=True, slots=True)
class Room:
    """A running room. `own_pids`: whether processes in it have numbers of their own (and end with its PID 1)."""

    name: str
    init: Process
    own_pids: bool = True

    def command(self, argv: Sequence[str | os.PathLike[str]], folder: Path = Path("/")) -> list[str]:
        """What to run on the machine so that `argv` runs in the room, with `folder` (as the room sees it) as its own.

        Raises LabError when the room has ended: its PID may be another process's by now.
        """
        if not self.init.alive:
            raise LabError(f"{self.name} is off")
        spaces = ["--net", "--mount", "--uts", *(["--pid"] if self.own_pids else [])]
        return ["nsenter", f"--target={self.init.pid}", *spaces, "--", "env", f"--chdir={folder}", *map(str, argv)]

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        timeout_s: float = 60,
        check: bool = True,
        stdin: str | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path = Path("/"),
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` in the room to its end. Raises LabError as `processes.run` does."""
        return processes.run(self.command(argv, folder), timeout_s=timeout_s, check=check, stdin=stdin, environment=environment)

    def spawn(self, argv: Sequence[str | os.PathLike[str]], log: Path, environment: Mapping[str, str] | None = None) -> int:
        """Start `argv` in the room as a daemon that writes to `log`; gives its PID as the room sees it."""
        line = f"setsid {shlex.join(map(str, argv))} </dev/null >>{shlex.quote(str(log))} 2>&1 & echo $!"
        return int(self.run(["sh", "-c", line], environment=environment).stdout)

    def see(self, path: str | Path) -> Path:
        """The file `path` of the room, as this process can open it (only while the room lives)."""
        return Path(f"/proc/{self.init.pid}/root", str(path).lstrip("/"))

    def ended(self, pid: int) -> bool:
        """Whether the process with number `pid` in this room has ended; for rooms with PIDs of their own."""
        try:
            return self.see(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    def close(self) -> None:
        """End everything in the room and wait until it has ended; a room that has ended already is fine."""
        mounts = processes.mounts_of(self.init.pid) if self.init.alive else frozenset()
        processes.kill([self.init])
        processes.kill(processes.members(mounts))  # those that entered without its PIDs, such as a client that runs on


class OpeningRoom:
    """A room on its way up, so that several can start at once."""

    def __init__(self, name: str, report: int, log: Path, own_pids: bool) -> None:
        self.name, self._report, self._log, self._own_pids = name, report, log, own_pids

    def ready(self) -> Room:
        """The room, as soon as it is prepared. Raises LabError, with the end of its log, when that fails."""
        try:
            said = os.read(self._report, 32) if select.select([self._report], [], [], _START_S)[0] else b""
        finally:
            os.close(self._report)
        if not said:
            raise LabError(f"room {self.name} did not start: {processes.tail(self._log.read_text(errors='replace'))}")
        return Room(self.name, processes.identify(int(said)), self._own_pids)


def open_room(
    lab_id: str,
    name: str,
    steps: Sequence[Sequence[str]],
    log: Path,
    *,
    leash: int | None,
    own_network: bool = True,
    own_pids: bool = True,
    within: Room | None = None,
) -> OpeningRoom:
    """Begin a room: fresh namespaces, `steps` run in them, then it waits.

    Args:
        lab_id: whose it is; stands on its command line as `"lab": "ID"`, where `register.erase` finds it.
        name: its host name.
        steps: argv lists that prepare it (mounts), run inside in this order.
        log: where what they print goes.
        leash: descriptor whose end of file ends the room; None for a room that outlives its maker.
        own_network: a network of its own, else the machine's.
        own_pids: a process tree of its own.
        within: take over that room's mounts instead of the machine's.
    """
    report, write = os.pipe()
    plan = {"lab": lab_id, "steps": [["hostname", name], *steps], "report": write, "leash": leash}
    spaces = [
        "--mount",
        "--uts",
        *(["--net"] if own_network else []),
        *(["--pid", "--fork", "--kill-child"] if own_pids else []),
    ]
    inside = ["nsenter", f"--target={within.init.pid}", "--mount", "--"] if within else []
    program = [sys.executable, "-I", "-S", str(_INIT), json.dumps(plan)]
    keep = [write] if leash is None else [write, leash]
    with log.open("ab") as output:
        # setsid --fork: the room is nobody's child, so Ctrl-C does not reach it and a short-lived command can leave it running
        subprocess.run(
            ["setsid", "--fork", *inside, "unshare", *spaces, "--propagation", "slave", "--", *program],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=keep,
            check=True,
        )
    os.close(write)
    return OpeningRoom(name, report, log, own_pids)
