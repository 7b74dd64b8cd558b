"""The machines of a farm: what each is called, where it is plugged in, how its room is prepared. Text only, no processes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WORK_DIR = Path("/srv/fivefold")
"""Where every machine has its own disk."""
CONTROLLER = "controller"
JUMP = "jump"
HEAD = "head"
_NEAR, _FAR = "10.77.0", "10.78.0"  # in namespaces of their own, so every farm may use the same


@dataclass(frozen=True, slots=True)
class Plug:
    """A network interface of a machine: `link` is its other end, on the bridge `bridge` in the controller."""

    device: str
    link: str
    bridge: str
    address: str

    @property
    def hardware(self) -> str:
        """Its MAC address: a machine that comes back has the one that its peers remember."""
        return "02:00:" + ":".join(f"{int(part):02x}" for part in self.address.split("."))


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine of a farm; the first plug has the address that it is known by."""

    name: str
    plugs: tuple[Plug, ...]

    @property
    def address(self) -> str:
        """Where it is reached."""
        return self.plugs[0].address


def machines(count: int, jump: bool, head: bool) -> tuple[Machine, ...]:
    """`count` machines node01, node02 ..., then the jump host and the head where they are wanted.

    With a jump host the others are on a second bridge, which of all machines only it and they are plugged into.
    """
    net, bridge = (_FAR, "br1") if jump else (_NEAR, "br0")
    nodes = [Machine(f"node{i:02}", (Plug("eth0", f"v{i}", bridge, f"{net}.{10 + i}"),)) for i in range(1, count + 1)]
    if jump:
        nodes.append(Machine(JUMP, (Plug("eth0", "vj0", "br0", f"{_NEAR}.2"), Plug("eth1", "vj1", "br1", f"{_FAR}.2"))))
    if head:
        nodes.append(Machine(HEAD, (Plug("eth0", "vh", bridge, f"{net}.3"),)))
    return tuple(nodes)


def bridges(jump: bool) -> str:
    """Commands for `ip -batch`: the controller's bridges. It has an address on the first one only, and no default route."""
    lines = ["link set lo up", "link add br0 type bridge", f"address add {_NEAR}.1/24 dev br0", "link set br0 up"]
    return "\n".join([*lines, *(["link add br1 type bridge", "link set br1 up"] if jump else [])])


def plug_in(machine: Machine, pid: int) -> str:
    """Commands for `ip -batch` in the controller: plug the machine whose PID 1 is `pid` into its bridges."""
    return "\n".join(
        f"link add {plug.link} type veth peer name {plug.device} address {plug.hardware} netns {pid}\n"
        f"link set {plug.link} master {plug.bridge} up"
        for plug in machine.plugs
    )


def take_addresses(machine: Machine) -> str:
    """Commands for `ip -batch` in the machine."""
    return "\n".join(
        [
            "link set lo up",
            *(f"address add {plug.address}/24 dev {plug.device}\nlink set {plug.device} up" for plug in machine.plugs),
        ]
    )


def hosts_file(known: Iterable[Machine]) -> str:
    """/etc/hosts of every machine and of the controller."""
    return "\n".join(["127.0.0.1 localhost", f"{_NEAR}.1 {CONTROLLER}", *(f"{m.address} {m.name}" for m in known), ""])


def controller_steps(folder: Path, names: Iterable[str], disk_mib: int, binds: Mapping[str, Path]) -> list[list[str]]:
    """Mounts of the controller: the machines' disks (they outlive a machine that is killed), and `binds`."""
    disks = [disk(folder, name) for name in names]
    return _script(
        *(["mount", "-t", "tmpfs", "-o", f"size={disk_mib}m,mode=755", "disk", str(path)] for path in disks),
        *_bind(binds),
    )


def machine_steps(
    folder: Path, name: str, hide: Sequence[str], keep: Sequence[str], silent: Sequence[str], binds: Mapping[str, Path]
) -> list[list[str]]:
    """Mounts of a machine: own processes, /run and disk, and `binds`.

    Folders in `hide` look empty, save for the lab's own and for those in `keep`, which cannot be written there; files in
    `silent` look empty.
    """
    hide = [path for path in dict.fromkeys(hide) if not _below(path, set(hide) - {path})]
    kept = [path for path in map(os.path.realpath, keep) if _below(path, hide)]
    stowed = {path: f"/run/kept/{number}" for number, path in enumerate(kept)}
    return _script(
        ["mount", "-t", "proc", "proc", "/proc"],
        ["mount", "-t", "tmpfs", "-o", "mode=755", "run", "/run"],
        ["mkdir", "-p", "/run/sshd", "/run/lab", *stowed.values()],
        ["mount", "--rbind", str(folder), "/run/lab"],
        *(["mount", "--bind", path, stow] for path, stow in stowed.items()),
        *(["mount", "-t", "tmpfs", "-o", "mode=755", "hidden", path] for path in hide),
        *_back(str(folder), "/run/lab", options=["--rbind"], wanted=bool(hide)),
        *(step for path, stow in stowed.items() for step in _back(path, stow, options=["--bind", "-o", "ro"])),
        *(["mount", "--bind", os.devnull, path] for path in silent),
        ["mount", "-t", "tmpfs", "-o", "mode=755", "srv", "/srv"],
        ["mkdir", str(WORK_DIR)],
        ["mount", "--bind", str(disk(folder, name)), str(WORK_DIR)],
        *_bind(binds),
    )


def _below(path: str, folders: Collection[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _back(path: str, stow: str, options: Sequence[str], *, wanted: bool = True) -> list[list[str]]:
    return [["mkdir", "-p", path], ["mount", *options, stow, path]] if wanted else []


def _bind(binds: Mapping[str, Path]) -> list[list[str]]:
    return [["mount", "--bind", str(source), target] for target, source in binds.items()]


def disk(folder: Path, name: str) -> Path:
    """Where the disk of a machine is mounted, in the controller."""
    return folder / "disks" / name


def _script(*steps: list[str]) -> list[list[str]]:
    """All steps as one shell call: a process each would take most of the start."""
    return [["sh", "-ec", "\n".join(map(shlex.join, steps))]]
