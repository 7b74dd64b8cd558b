"""A farm: machines with an address, a host name, processes and a disk of their own, on a network that nobody else sees.

The controller is the room in which client commands run; it owns the bridges and has no default route. What can go wrong with
the machines is in `faults`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tests.labs import machines, netns, processes
from tests.labs.errors import LabError
from tests.labs.lab import Lab
from tests.labs.machines import CONTROLLER, HEAD, JUMP
from tests.labs.rooms import OpeningRoom, Room, open_room

_START_FILES = (".bashrc", ".bash_profile", ".bash_login", ".profile", ".zshenv", ".zshrc", ".ssh/rc")


class Farm(Lab):
    """Machines without any service; `SshLab` and `SlurmLab` add those.

    Methods that do something to a machine take its name (`node02`) or its place, counted from 0.
    """

    head: ClassVar[bool] = False
    """Whether there is a machine `head` too, for what a cluster has once."""
    shares_home: ClassVar[bool] = False
    """Whether root's home folder there is this machine's, as on a cluster; else each machine has an empty one of its own."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        hosts: int = 4,
        jump: bool = False,
        hide: Sequence[str] = (),
        keep: Sequence[str] = (),
        disk_mib: int = 4096,
        **settings: Any,
    ) -> None:
        """A farm that is not up yet.

        Args:
            folder: where its files go.
            hosts: how many machines.
            jump: put them behind a further machine, the only one that the controller reaches.
            hide: folders of this machine that look empty on the machines of the farm (such as the checkout).
            keep: folders below hidden ones that are there all the same, to be read (such as a virtual environment). The Python
                that this process' own comes from always is.
            disk_mib: size of each machine's disk, which is in memory and takes only what is written.
            settings: of a kind of lab.

        Raises:
            LabError: more machines than it has addresses for.
        """
        if not 1 <= hosts <= 200:
            raise LabError("use 1 to 200 hosts")
        hide, keep = ([str(Path(path).resolve()) for path in paths] for paths in (hide, keep))
        super().__init__(folder, hosts=hosts, jump=jump, hide=hide, keep=keep, disk_mib=disk_mib, **settings)
        self._hide, self._keep, self._disk_mib, self._jump = hide, keep, disk_mib, jump
        self.machines = {machine.name: machine for machine in machines.machines(hosts, jump, self.head)}

    @property
    def nodes(self) -> list[str]:
        """The names of the machines that were asked for: without jump host and head."""
        return [name for name in self.machines if name not in (JUMP, HEAD)]

    # -- what clients do ---------------------------------------------------------------------------------------------

    @property
    def controller(self) -> Room:
        """The room of client commands."""
        return self.rooms[CONTROLLER]

    def command(self, argv: Sequence[str | os.PathLike[str]], folder: Path | None = None) -> list[str]:
        """What to run on this machine so that `argv` runs in the controller, in `folder` (else in the current one)."""
        return self.controller.command(argv, folder or Path.cwd())

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        timeout_s: float = 60,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command in the controller to its end.

        Raises:
            LabError: it failed (where `check`) or took longer than `timeout_s` seconds.
        """
        full = {**os.environ, **self.environment, **(environment or {})}
        return processes.run(self.command(argv), timeout_s=timeout_s, check=check, environment=full, stdin=stdin)

    def python(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.CompletedProcess[str]:
        """`run` with this Python: `lab.python(["-m", "harness.doctor"])`."""
        return self.run([sys.executable, *argv], **options)

    def popen(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """A client command in the controller that runs on; its PID is the command's own."""
        options.setdefault("env", {**os.environ, **self.environment})
        return subprocess.Popen(self.command(argv), **options)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """While the block runs, this thread, and what it starts, has the controller's network (but not its /etc/hosts)."""
        with netns.network_of(self.controller.init.pid):
            yield

    def connect(self, address: str, port: int, timeout_s: float = 3) -> socket.socket:
        """A TCP connection from the controller, for a client library that takes a socket."""
        return netns.connect(self.controller.init.pid, address, port, timeout_s)

    def on(self, host: int | str, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `argv` on a machine as if at its keyboard: no SSH, no network."""
        return self.rooms[self.name_of(host)].run(argv, **options)

    def name_of(self, host: int | str) -> str:
        """The machine that `host` means: its name, or its place counted from 0."""
        names = list(self.machines)
        if isinstance(host, str) and host.isdigit():
            host = int(host)
        if isinstance(host, int) and 0 <= host < len(names):
            return names[host]
        if host in names:
            return str(host)
        raise LabError(f"no machine {host!r}: one of {', '.join(names)}")

    def is_on(self, host: int | str) -> bool:
        """Whether the machine runs (cut off or frozen, it does)."""
        return self.rooms[self.name_of(host)].init.alive

    def disk(self, host: int | str) -> Path:
        """The disk of a machine as this process sees it, also while the machine is off."""
        return self.controller.see(machines.disk(self.folder, self.name_of(host)))

    @property
    def binds(self) -> Mapping[str, Path]:
        """Folders that every machine and the controller see (keys) in place of their own: which ones (values)."""
        return {"/etc/hosts": self.folder / "hosts"}

    # -- coming up ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for name in self.machines:
            machines.disk(self.folder, name).mkdir(parents=True, exist_ok=True)
        self.keep(self.folder / "disks", self.folder / "hosts")
        (self.folder / "hosts").write_text(machines.hosts_file(self.machines.values()))
        steps = machines.controller_steps(self.folder, self.machines, self._disk_mib, self.binds)
        self.rooms[CONTROLLER] = self._open(CONTROLLER, steps, own_pids=False).ready()
        self.controller.run(["ip", "-batch", "-"], stdin=machines.bridges(self._jump))
        self._boot(list(self.machines))

    def _open(self, name: str, steps: list[list[str]], **options: Any) -> OpeningRoom:
        return open_room(self.id, name, steps, self.logs / f"{name}.log", leash=self.leash, **options)

    def _boot(self, names: Sequence[str]) -> None:
        """Start machines side by side and plug them in."""
        home = str(Path(pwd.getpwuid(0).pw_dir).resolve())
        hide = self._hide if self.shares_home else [home, *self._hide]
        keep = [*self._keep, sys.base_prefix]
        opening = [
            self._open(
                name,
                machines.machine_steps(self.folder, name, hide, keep, self._silent(home), self.binds),
                within=self.controller,
            )
            for name in names
        ]
        self.rooms.update({name: room.ready() for name, room in zip(names, opening, strict=True)})
        plugs = [machines.plug_in(self.machines[name], self.rooms[name].init.pid) for name in names]
        self.controller.run(["ip", "-batch", "-"], stdin="\n".join(plugs))
        for name in names:
            self.rooms[name].run(["ip", "-batch", "-"], stdin=machines.take_addresses(self.machines[name]))
        self._serve(names)

    def _silent(self, home: str) -> list[str]:
        """What shells would read when they start: this machine's settings are not those of the farm's machines."""
        files = [f"{home}/{name}" for name in _START_FILES] if self.shares_home else []
        return [path for path in (*files, "/etc/bash.bashrc", "/etc/ssh/sshrc") if Path(path).is_file()]

    def _serve(self, names: Sequence[str]) -> None:
        """Start the services of machines that have just booted, and return when they answer."""
