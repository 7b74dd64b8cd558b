"""What a run in a container is, and what the engine is told for it: plain data and pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from harness.containers import leash
from harness.containers.models import REFERENCE
from systems.registry import InputError

GIB = 2**30
GRACE_S = 5
BEAT_S = 2.0
SILENCE_S = 10.0
"""How long a container lives on without a sign of life from its controller: five beats."""
HOME = "/tmp"  # of whoever runs in it: a memory disk, gone with the container
Network = Literal["none", "host", "bridge"]
_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr", "/var/run")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder or file of the engine's machine that a container sees, at the same path unless `target` says another."""

    source: Path
    writable: bool = False
    target: str | None = None

    @property
    def inside(self) -> str:
        """Where the container sees it."""
        return self.target or str(self.source)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use; None where nothing is said.

    `gpus` are indexes of the engine's machine, or `all`. `wall_s` ends it after that time.
    """

    memory_bytes: int | None = None
    cpus: float | None = None
    gpus: tuple[int, ...] | Literal["all"] = ()
    processes: int = 4096
    shared_memory_bytes: int = GIB
    scratch_bytes: int = GIB
    wall_s: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A command to run in a container of `image`, in the folder `folder`, by the user `user` (`uid:gid`)."""

    image: str
    argv: tuple[str, ...]
    mounts: tuple[Mount, ...] = ()
    variables: Mapping[str, str] | None = None
    limits: Limits = Limits()
    network: Network = "none"
    folder: str | None = None
    user: str = "10001:10001"
    labels: Mapping[str, str] | None = None


def check(run: Run) -> None:
    """Refuse what would not do what it says.

    Raises:
        InputError: no image's name, no command, a variable that is none, or a mount over the container's own system.
    """
    where = "container"
    if not re.fullmatch(REFERENCE, run.image) or len(run.image) > 255:
        raise InputError(where, "image", run.image, "write a name such as engine-cpu, or name:tag, or name@sha256:...")
    if not run.argv or not run.argv[0]:
        raise InputError(where, "command", " ".join(run.argv), "say what to run")
    for text in (*run.argv, *(run.variables or {}).values()):
        if "\0" in text:
            raise InputError(where, "command", text, "a zero byte can be in no argument and no variable")
    for name in run.variables or {}:
        if not _VARIABLE.fullmatch(name):
            raise InputError(where, "environment", name, "a variable's name has letters, digits and _")
    for mount in run.mounts:
        _check_mount(mount)


def _check_mount(mount: Mount) -> None:
    inside = PurePosixPath(mount.inside)
    over_system = any(inside.is_relative_to(system) for system in _SYSTEM) or inside == PurePosixPath("/")
    if not inside.is_absolute() or ".." in inside.parts or over_system:
        raise InputError("container", "mount", str(inside), "name an absolute path that is no part of a system")


def create_arguments(api: Any, run: Run) -> dict[str, Any]:  # noqa: ANN401
    """What `api.create_container` of the SDK is told; `api` only checks and arranges it."""
    host = api.create_host_config(**host_options(run.mounts, run.limits, run.network))
    return {
        "image": run.image,
        "entrypoint": ["python3", "-I", "-c", _leash_source(), str(SILENCE_S), "--"],
        "command": list(run.argv),
        "user": run.user,
        "working_dir": run.folder,
        "environment": {"HOME": HOME, "USER": "fivefold", "LOGNAME": "fivefold", **(run.variables or {})},
        "labels": dict(run.labels or {}),
        "stdin_open": True,
        "host_config": host,
    }


def host_options(mounts: Sequence[Mount], limits: Limits, network: Network) -> dict[str, Any]:
    """The part that says what the container may do: nothing that it needn't."""
    options: dict[str, Any] = {
        "mounts": [
            {"Type": "bind", "Source": str(mount.source), "Target": mount.inside, "ReadOnly": not mount.writable}
            for mount in _outer_first(mounts)
        ],
        "network_mode": network,
        "read_only": True,
        "tmpfs": {HOME: f"rw,exec,nosuid,nodev,mode=1777,size={limits.scratch_bytes}"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": limits.processes,
        "shm_size": limits.shared_memory_bytes,
    }
    if limits.memory_bytes:
        options |= {"mem_limit": limits.memory_bytes, "memswap_limit": limits.memory_bytes}  # no swap on top
    if limits.cpus:
        options["nano_cpus"] = round(limits.cpus * 1e9)
    if limits.gpus:
        options["device_requests"] = [_gpu_request(limits.gpus)]
    return options


def _outer_first(mounts: Sequence[Mount]) -> list[Mount]:
    """A folder below another must be mounted after it. The last one said of a path counts."""
    return sorted({mount.inside: mount for mount in mounts}.values(), key=lambda mount: len(PurePosixPath(mount.inside).parts))


def _gpu_request(gpus: tuple[int, ...] | Literal["all"]) -> dict[str, Any]:
    which = {"Count": -1} if gpus == "all" else {"Count": 0, "DeviceIDs": [str(gpu) for gpu in gpus]}
    return {"Driver": "", "Capabilities": [["gpu"]], "Options": {}, **which}


def _leash_source() -> str:
    return Path(leash.__file__).read_text(encoding="utf-8")


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": GIB, "t": 2**40}


def memory(text: str) -> int:
    """A size such as `512m` or `8g` (binary units) in bytes. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", text.strip().lower())
    if not found or not float(found[1]):
        raise InputError("container", "memory", text, "write a size such as 512m or 8g")
    return int(float(found[1]) * _UNITS[found[2]])


def shown(size_bytes: int) -> str:
    """A size as people read it."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}" if size_bytes < 1000 * factor else f"{size_bytes // factor} {unit}"
    return f"{size_bytes} bytes"
