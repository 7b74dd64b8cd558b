"""What every lab is: something that comes up in seconds, belongs to a process or to nobody, and goes completely."""

from __future__ import annotations

import abc
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from tests.labs import packages, processes, register
from tests.labs.errors import LabError, LabUnavailableError
from tests.labs.register import State
from tests.labs.rooms import Room

_LONGEST_FOLDER = 80  # sockets lie below it, and a socket's path has at most 107 characters


class Lab(abc.ABC):
    """A lab in `folder`, where it puts its files; `with` brings it up and takes it down.

    Left by an exception, SIGINT or SIGTERM it goes down too. When its process is killed with SIGKILL, everything that runs in
    it ends at once (its rooms hold a leash), and the next lab on the machine clears the files that it left.
    """

    kind: ClassVar[str]
    packages: ClassVar[Mapping[str, str]] = {"unshare": "util-linux", "ip": "iproute2", "mount": "mount"}
    """Programs that it needs, each with the Debian package that has it."""

    def __init__(self, folder: str | os.PathLike[str], **settings: Any) -> None:
        self.folder = Path(folder).resolve()
        self.id = register.identity(self.folder)
        self.state = State(self.kind, str(self.folder), None, settings)
        self._leash: tuple[int, int] | None = None
        self._handles_sigterm = False

    @classmethod
    def attach(cls, folder: str | os.PathLike[str]) -> Self:
        """The lab that is up in `folder`, started by any process. Raises LabError when there is none."""
        state = register.read(Path(folder))
        if state is None or state.kind != cls.kind or state.stale:
            raise LabError(f"{folder}: no {cls.kind} lab is up here")
        lab = cls(folder, **state.settings)
        lab.state = state
        return lab

    @classmethod
    def take_down(cls, folder: str | os.PathLike[str]) -> None:
        """End the lab in `folder`, whoever started it and whatever is left of it. Raises LabError when there is none."""
        with register.locked():
            state = register.read(Path(folder))
            if state is None or state.kind != cls.kind:
                raise LabError(f"{folder}: no {cls.kind} lab is up here")
            register.erase(state)

    @property
    def logs(self) -> Path:
        """The folder of the logs, which stays when the lab goes."""
        return self.folder / "logs"

    @property
    def rooms(self) -> dict[str, Room]:
        """Every room of the lab by name."""
        return self.state.rooms

    def up(self, *, owned: bool = False) -> Self:
        """Start it and return when it answers. `owned`: it ends with this process; else it stays until `down`.

        Raises:
            LabUnavailableError: this machine can't run it.
            LabError: something in it did not start, or a lab is up in its folder; nothing is left running.
        """
        self._check_machine()
        packages.ensure({**Lab.packages, **self.packages})
        self._take_folder()
        self._leash = os.pipe() if owned else None
        try:
            self._start()
            self.state.owner = self.state.owner if owned else None
            self.record()
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """End everything in it, and remove its files but the logs."""
        with register.locked():
            register.erase(self.state)
        self.state.rooms.clear()
        for descriptor in self._leash or ():
            os.close(descriptor)
        self._leash = None

    def record(self) -> None:
        """Note in the register what is there now."""
        with register.locked():
            register.write(self.state)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            self._handles_sigterm = True
        try:
            return self.up(owned=True)
        except BaseException:
            self._restore_handler()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self.down()
        finally:
            self._restore_handler()

    def _restore_handler(self) -> None:
        if self._handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._handles_sigterm = False

    def status(self) -> dict[str, Any]:
        """What is there, as plain data."""
        owner = self.state.owner and self.state.owner.pid
        rooms = {name: room.init.pid if room.init.alive else None for name, room in self.rooms.items()}
        return {"kind": self.kind, "folder": str(self.folder), "owner": owner, "rooms": rooms}

    @property
    def environment(self) -> dict[str, str]:
        """Variables that client commands need."""
        return {}

    @abc.abstractmethod
    def command(self, argv: Sequence[str | os.PathLike[str]], folder: Path | None = None) -> list[str]:
        """What to run on this machine so that `argv` runs as a client of the lab, in `folder` (else in the current one)."""

    @abc.abstractmethod
    def _start(self) -> None:
        """Bring everything up; return when it answers."""

    @property
    def leash(self) -> int | None:
        """The descriptor that rooms watch: it reaches its end when this process ends."""
        return self._leash[0] if self._leash else None

    def _check_machine(self) -> None:
        if os.geteuid():
            raise LabUnavailableError(f"{self.kind} lab: needs root for its namespaces and daemons: run as root")
        if sys.platform != "linux":
            raise LabUnavailableError(f"{self.kind} lab: needs Linux")
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise LabError(f"{self.folder}: a path for sockets has at most {_LONGEST_FOLDER} characters: use a shorter one")
        if packages.find("unshare"):
            probe = processes.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False)
            if probe.returncode:
                raise LabUnavailableError(f"{self.kind} lab: no namespaces here: {processes.tail(probe.stderr)}")

    def _take_folder(self) -> None:
        """Clear what killed labs left, and record this one."""
        self.state.owner = processes.identify(os.getpid())
        with register.locked():
            for state in register.all_states():
                if state.stale:
                    register.erase(state)
            if register.read(self.folder):
                raise LabError(f"{self.folder}: a lab is up here already: take it down first")
            if self.folder.exists() and {path.name for path in self.folder.iterdir()} - {self.logs.name}:
                raise LabError(f"{self.folder}: holds other files, which could go with the lab: use an empty folder")
            self.logs.mkdir(parents=True, exist_ok=True)
            register.write(self.state)

    def keep(self, *paths: Path) -> None:
        """These files and folders go with the lab."""
        self.state.data.extend(map(str, paths))
        self.record()
