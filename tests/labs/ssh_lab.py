"""Hosts with real SSH servers on one machine.

python -m tests.labs.ssh_lab up DIR --hosts 4
python -m tests.labs.ssh_lab exec DIR -- ssh -F DIR/ssh_config node01 hostname
python -m tests.labs.ssh_lab cut DIR node02       (join, kill, boot, hang ...: see --help)
python -m tests.labs.ssh_lab down DIR

with SshLab(folder, hosts=4) as lab:
    lab.run(["ssh", "-F", lab.ssh_config, "node01", "hostname"])
    with lab.inside():
        fabric.Connection(lab.hosts[0].address, ...)
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tests.labs import inventory, keys, netns, packages, processes
from tests.labs.engine import Engine
from tests.labs.errors import LabError
from tests.labs.faults import FaultyFarm
from tests.labs.machines import JUMP, WORK_DIR

_SSHD = "/usr/sbin/sshd"


@dataclass(frozen=True, slots=True)
class SshHost:
    """What a client needs to know of a host; `host_key` is the one pinned when the lab came up, whatever it shows later."""

    name: str
    address: str
    port: int
    user: str
    key_file: Path
    host_key: str
    work_dir: Path
    """Its own disk, as the host sees it."""
    root: Path
    """The same disk, as this process sees it."""


class SshLab(FaultyFarm):
    """Hosts node01, node02 ..., each with an sshd on port 22 that lets root in with the lab's client key."""

    kind: ClassVar[str] = "ssh"
    packages: ClassVar[Mapping[str, str]] = {"sshd": "openssh-server", "ssh": "openssh-client"}

    @property
    def key_file(self) -> Path:
        """The client's private key."""
        return self.folder / "client"

    @property
    def known_hosts(self) -> Path:
        """The pinned host keys, as OpenSSH reads them."""
        return self.folder / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`: strict about host keys, reaches the hosts by name, and through the jump host where there is one."""
        return self.folder / "ssh_config"

    @property
    def hosts(self) -> tuple[SshHost, ...]:
        """node01, node02 ... in order."""
        return tuple(self._host(name) for name in self.nodes)

    @property
    def jump(self) -> SshHost | None:
        """The host that all others are behind, in a lab with `jump=True`."""
        return self._host(JUMP) if JUMP in self.machines else None

    def inventory(self, path: Path, **more: Any) -> Path:
        """Write an inventory of the hosts to `path`; `more` are further keys for each host (`gpus`, `tags` ...)."""
        return inventory.write(path, self.hosts, more)

    # -- what goes wrong, beyond `FaultyFarm` ----------------------------------------------------------------------------

    def change_host_key(self, host: int | str) -> str:
        """From now on the host shows a new key (given back), as if it were another machine. Sessions go on."""
        name = self.name_of(host)
        new = keys.new_key(self._etc(name) / "key", name)
        self._stop_listener(name)
        self._start_sshd([name])
        return new

    def refuse_key(self, host: int | str) -> None:
        """From now on the host lets nobody in."""
        (self._etc(self.name_of(host)) / "authorized_keys").write_text("")

    def accept_key(self, host: int | str) -> None:
        """Let the client's key in again."""
        (self._etc(self.name_of(host)) / "authorized_keys").write_text(keys.public_key(self.key_file) + "\n")

    def kill_sshd(self, host: int | str) -> None:
        """End its sshd and every session's; what sessions left in the background runs on. `start_sshd` mends it."""
        room = self.rooms[self.name_of(host)]
        for member in processes.members(processes.mounts_of(room.init.pid)):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{member.pid}/exe").readlink() == Path(_SSHD):
                    processes.kill([member])

    def start_sshd(self, host: int | str, delay_s: float = 0) -> None:
        """Start the sshd of a host that has none; with `delay_s` return at once, and it begins to answer that much later."""
        name = self.name_of(host)
        if not delay_s:
            self._start_sshd([name])
            return
        later = f"sleep {delay_s}; exec {_SSHD} -f {self._etc(name)}/sshd_config -E {self.logs}/{name}.log"
        self.rooms[name].spawn(["sh", "-c", later], self.logs / f"{name}.log")

    def start_slowly(self, host: int | str, delay_s: float) -> None:
        """The host's sshd is gone, and back `delay_s` seconds later; connections are refused meanwhile."""
        self.kill_sshd(host)
        self.start_sshd(host, delay_s)

    # -- more on a host than an sshd ----------------------------------------------------------------------------------

    def start_engine(self, host: int | str) -> Engine:
        """Start a Docker Engine on a host, where its commands look for one; it goes with the host. One in a lab."""
        packages.ensure({"dockerd": "docker.io"})
        (self.folder / "data").mkdir()
        self.keep(self.folder / "data")
        engine = Engine(self.rooms[self.name_of(host)], self.folder, self.id, private=False, listens=Path("/run/docker.sock"))
        engine.start()
        return engine

    # -- coming up ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        made = ("client", "client.pub", "known_hosts", "ssh_config", "etc")
        self.keep(*(self.folder / name for name in made))
        keys.new_key(self.key_file, "client")
        for name in self.machines:
            keys.new_key(self._etc(name) / "key", name)
            (self._etc(name) / "sshd_config").write_text(keys.sshd_config(self._etc(name)))
            self.accept_key(name)
            (self._etc(name) / "pinned").write_text(keys.public_key(self._etc(name) / "key"))
        self.known_hosts.write_text("".join(f"{m.name},{m.address} {self._pinned(m.name)}\n" for m in self.machines.values()))
        self.ssh_config.write_text(self._client_config())
        super()._start()

    def _serve(self, names: Sequence[str]) -> None:
        super()._serve(names)
        self._start_sshd(names)

    def _start_sshd(self, names: Sequence[str]) -> None:
        for name in names:
            self.rooms[name].run([_SSHD, "-f", self._etc(name) / "sshd_config", "-E", self.logs / f"{name}.log"])
        processes.wait_for(lambda: all(map(self._answers, names)), f"sshd of {', '.join(names)}")

    def _answers(self, name: str) -> bool:
        behind_jump = JUMP in self.machines and name != JUMP
        near = self.rooms[JUMP] if behind_jump else self.controller
        return netns.answers(near.init.pid, self.machines[name].address, 22, b"SSH-")

    def _stop_listener(self, name: str) -> None:
        room = self.rooms[name]
        listener = int(room.see("/run/sshd.pid").read_text())
        room.run(["kill", f"-{signal.SIGTERM.value}", str(listener)])
        processes.wait_for(lambda: room.ended(listener), f"end of the sshd of {name}")

    def _host(self, name: str) -> SshHost:
        if not self.rooms:
            raise LabError("the lab is not up")
        address = self.machines[name].address
        return SshHost(name, address, 22, "root", self.key_file, self._pinned(name), WORK_DIR, self.disk(name))

    def _etc(self, name: str) -> Path:
        return self.folder / "etc" / name

    def _pinned(self, name: str) -> str:
        return (self._etc(name) / "pinned").read_text()

    def _client_config(self) -> str:
        common = ["User root", f"IdentityFile {self.key_file}", "IdentitiesOnly yes", "BatchMode yes", "ConnectTimeout 5"]
        strict = ["StrictHostKeyChecking yes", f"UserKnownHostsFile {self.known_hosts}", "GlobalKnownHostsFile /dev/null"]
        blocks = []
        for machine in self.machines.values():
            jump = ["ProxyJump jump"] if JUMP in self.machines and machine.name != JUMP else []
            blocks.append([f"Host {machine.name}", f"HostName {machine.address}", *jump, *common, *strict])
        return "\n".join("\n  ".join(block) for block in blocks) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    from tests.labs import cli

    faults = ("cut", "join", "kill", "power_off", "boot", "hang", "thaw", "fill_disk", "free_disk", "change_host_key")
    return cli.main((SshLab,), argv, (*faults, "refuse_key", "accept_key", "kill_sshd", "start_sshd"), _options)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", type=int, default=4, help="how many (4)")
    parser.add_argument("--jump", action="store_true", help="put them behind a jump host")
    parser.add_argument("--hide", nargs="*", default=[], metavar="FOLDER", help="folders that look empty on the hosts")
    parser.add_argument("--keep", nargs="*", default=[], metavar="FOLDER", help="folders below those that are there to be read")
    parser.add_argument("--disk-mib", type=int, default=4096, help="size of each host's disk in MiB, in memory (4096)")


if __name__ == "__main__":
    sys.exit(main())
