"""The checks of `harness.doctor`, one function each, most of them pure: what was found goes in, a finding comes out.

Imports nothing but the standard library at the top, as the packages may be what is missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from harness import provenance
from systems.registry import InputError

MINIMUM_PYTHON = (3, 11)
NEWEST_TRIED = (3, 13)
FREE_GIB = 1.0
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)\s*(?:;\s*(.*?))?\s*\\?$", re.MULTILINE)


class Level(StrEnum):
    """How a finding is to be read."""

    OK = "ok"
    OPTIONAL = "optional"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table: what was looked at, what was found, and how to mend it."""

    level: Level
    what: str
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where to look: the checkout, and what its configuration says."""

    root: Path
    results: Path
    inventory: Path
    backend: str = "simulated"
    mirror: Path | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True)
class Pin:
    """A line of a lock file: this version of this package, where `marker` holds (empty: everywhere)."""

    name: str
    version: str
    marker: str = ""

    def applies(self) -> bool:
        """Whether it is meant for this Python on this machine; never, if that takes a package that is not here."""
        if not self.marker:
            return True
        try:
            from packaging.markers import Marker
        except ImportError:
            return False
        return Marker(self.marker).evaluate()


def pins(lock: str) -> list[Pin]:
    """What the text of a lock file pins, for every kind of machine."""
    return [Pin(name, version, marker or "") for name, version, marker in _PIN.findall(lock)]


def check_python(version: tuple[int, int]) -> Finding:
    """The interpreter that runs this."""
    found = f"{version[0]}.{version[1]}"
    if version < MINIMUM_PYTHON:
        return Finding(Level.MISSING, "Python", found, "use 3.11 or newer: make PYTHON=python3.12 doctor")
    if version > NEWEST_TRIED:
        return Finding(Level.OPTIONAL, "Python", found, "newer than any that was tried: 3.11 to 3.13 were")
    return Finding(Level.OK, "Python", found)


def check_packages(wanted: Sequence[Pin], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """Every package of the lock file; `installed` gives the version that is here, or None."""
    here = {pin: installed(pin.name) for pin in wanted if pin.applies()}
    absent = [pin.name for pin, version in here.items() if version is None]
    others = [f"{pin.name} {has} (lock: {pin.version})" for pin, has in here.items() if has not in (None, pin.version)]
    right = f"{len(here) - len(absent) - len(others)} of {len(here)} as in requirements.lock"
    if absent:
        yield Finding(Level.MISSING, "packages", f"not installed: {', '.join(absent)}", "run `make clean environment`")
    if others:
        mend = "results may differ in the last digits: `make clean environment` installs the locked ones"
        yield Finding(Level.OPTIONAL, "packages", f"{right}; {', '.join(others)}", mend)
    if not absent and not others:
        yield Finding(Level.OK, "packages", right)


def installed_version(name: str) -> str | None:
    """The version of the package `name` in this environment, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_torch(version: str | None, backend: str) -> Finding:
    """PyTorch, which the measured backend alone needs."""
    if version:
        return Finding(Level.OK, "torch", version)
    level = Level.MISSING if backend == "measured" else Level.OPTIONAL
    return Finding(level, "torch", "not installed", "for the measured backend: `make torch`")


def check_gpus(gpus: Sequence[Mapping[str, str]]) -> Finding:
    """The GPUs that `nvidia-smi` lists."""
    if not gpus:
        return Finding(Level.OPTIONAL, "GPU", "none found", "the simulated backend needs none")
    names = [gpu["name"] for gpu in gpus]
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return Finding(Level.OK, "GPU", f"{counted}, driver {gpus[0]['driver']}")


def check_disk(folder: Path) -> Finding:
    """Free space where results go."""
    free = shutil.disk_usage(_existing(folder)).free / 2**30
    level = Level.OK if free >= FREE_GIB else Level.MISSING
    mend = "" if level is Level.OK else f"free some space: {FREE_GIB:g} GiB at least"
    return Finding(level, "free disk", f"{free:.1f} GiB at {folder}", mend)


def check_writable(folder: Path) -> Finding:
    """Whether files can be made in `folder`, or where it would be made."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return Finding(Level.OK, "write", str(folder))
    except OSError as error:
        mend = "choose another folder: `results` in config/config.yaml"
        return Finding(Level.MISSING, "write", f"{folder}: {error.strerror}", mend)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())


def check_commit(state: Mapping[str, object]) -> Finding:
    """What provenance will say about the code."""
    commit = str(state["commit"])
    if commit == provenance.UNKNOWN:
        return Finding(Level.OPTIONAL, "git", "no commit known", "provenance needs a git clone with a commit, and git")
    if state["dirty"]:
        mend = "commit before a run that is to be cited"
        return Finding(Level.OPTIONAL, "git", f"{commit[:12]} and uncommitted changes", mend)
    return Finding(Level.OK, "git", commit[:12])


def check_inventory(path: Path, root: Path) -> Iterator[Finding]:
    """The file of hosts and each host in it; hosts that are not this machine are connected to, for a few seconds at most."""
    from harness.inventory import load_inventory

    inventory = load_inventory(path)
    count = len(inventory.hosts)
    yield Finding(Level.OK, "hosts", f"{path}: {count} host{'s' if count != 1 else ''}")
    if any(host.endpoint for host in inventory.hosts):
        from harness.load import check

        yield from (check(host) for host in inventory.hosts if host.endpoint)
    if any(host.gpus or not (host.local or host.only_endpoint) for host in inventory.hosts):
        from harness.provision import status

        yield from status.findings(inventory, status.wanted(status.testbeds(root)))


def check_figures(root: Path) -> tuple[list[Finding], frozenset[str]]:
    """All figure files, and the datasets that they need."""
    from harness.figure_file import load_figure

    bad: list[Finding] = []
    needed: set[str] = set()
    paths = sorted((root / "figures").glob("*/*.yaml"))
    for path in paths:
        try:
            needed |= set(load_figure(path).datasets)
        except InputError as error:
            bad.append(from_error("figures", error))
    good = len(paths) - len(bad)
    return [*bad, Finding(Level.OK if good else Level.OPTIONAL, "figures", f"{good} usable")], frozenset(needed)


def check_datasets(place: Place, needed: frozenset[str]) -> Iterator[Finding]:
    """The mirror, then every dataset that a figure needs (its bytes are checked), then how many of the others are at hand."""
    from harness.datasets import default_cache, load_registry, resolve, whereabouts

    if place.mirror is None:
        mend = "name a folder in config/config.yaml, or go on: what is missing is downloaded"
        yield Finding(Level.OPTIONAL, "dataset mirror", "none", mend)
    else:
        yield Finding(Level.OK, "dataset mirror", str(place.mirror))
    entries = load_registry().datasets
    at = {name: whereabouts(entry, place.mirror, default_cache()) for name, entry in entries.items()}
    for name in sorted(needed):
        if at.get(name) in ("mirror", "cache"):
            try:
                resolve(name, place.mirror, default_cache(), offline=True)
            except InputError as error:
                yield from_error(name, error)
                continue
        yield check_dataset(name, at.get(name, "nowhere"), place.offline)
    others = [where for name, where in at.items() if name not in needed]
    yield Finding(
        Level.OK, "other datasets", f"{sum(where in ('mirror', 'cache') for where in others)} of {len(others)} at hand"
    )


def check_dataset(name: str, where: str, offline: bool) -> Finding:
    """One dataset by where it would be taken from (harness.datasets.whereabouts)."""
    if where in ("mirror", "cache"):
        return Finding(Level.OK, name, f"in the {where}, checksum right")
    if "download" in where and not offline:
        return Finding(Level.OK, name, "not here: is downloaded when a figure needs it")
    if "stand-in" in where:
        mend = f"for the real one: `python -m harness.datasets {name}` says how"
        return Finding(Level.OPTIONAL, name, "synthetic stand-in, and figures will say so", mend)
    return Finding(Level.MISSING, name, "not here", f"`python -m harness.datasets {name}` says how to get it")


def check_tools(which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """Programs for work on other machines; for information, nothing here is required."""
    for what, command, use in (
        ("Docker", ["docker", "version", "--format", "{{.Server.Version}}"], "runs in containers"),
        ("Slurm", ["sbatch", "--version"], "runs on a cluster, `--profile slurm`"),
        ("SSH", ["ssh", "-V"], "runs on other hosts"),
    ):
        if which(command[0]) is None:
            yield Finding(Level.OPTIONAL, what, "not here", f"for {use}")
            continue
        answer = _answer(command)
        mend = "" if answer else f"for {use}: it is installed but does not answer"
        yield Finding(Level.OK if answer else Level.OPTIONAL, what, answer or "no answer", mend)


def _answer(command: Sequence[str]) -> str:
    """The first line that a program prints, empty when it fails or is silent for 5 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip() or done.stderr.strip() or "here").splitlines()[0]


def from_error(what: str, error: InputError) -> Finding:
    """What a check of `what` found out by failing."""
    return Finding(Level.MISSING, what, str(error))
