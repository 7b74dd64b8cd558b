"""For pytest: a lab as a fixture, and what a lab may have left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.labs import processes, register
from tests.labs.errors import LabError, LabUnavailableError
from tests.labs.lab import Lab

L = TypeVar("L", bound=Lab)
REQUIRED = "FIVEFOLD_LABS"


@contextlib.contextmanager
def running(lab: L) -> Iterator[L]:
    """`lab` while it is up; skips the test where this machine can't run it.

    @pytest.fixture(scope="module")
    def lab(tmp_path_factory):
        with running(SshLab(tmp_path_factory.mktemp("ssh"), hosts=4)) as lab:
            yield lab
    """
    with contextlib.ExitStack() as stack:
        with skipping():
            stack.enter_context(lab)
        yield lab


@contextlib.contextmanager
def skipping() -> Iterator[None]:
    """Skips the test, in one line, for what this machine can't do; but fails if FIVEFOLD_LABS=required says that it must."""
    try:
        yield
    except LabUnavailableError as error:
        if os.environ.get(REQUIRED) == "required":
            raise
        pytest.skip(str(error))


def traces(folder: Path) -> list[str]:
    """Everything on this machine that shows that a lab is, or was, up in `folder` (its logs apart): nothing after `down`."""
    lab_id = register.identity(folder)
    marks = (os.fsencode(folder), lab_id.encode())
    found = [f"process {pid}: {line!r}" for pid, line in _command_lines() if any(mark in line for mark in marks)]
    found += [f"mount: {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    found += [f"control group: {path}" for path in Path("/sys/fs/cgroup").glob(f"*/fivefold-{lab_id}")]
    found += [f"state file: {path}" for path in register.FOLDER.glob(f"{lab_id}*")]
    return found + [f"file: {path}" for path in folder.glob("*") if path.name != "logs"]


def _command_lines() -> Iterator[tuple[int, bytes]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError, LabError):
                yield processes.identify(int(entry.name)).pid, (entry / "cmdline").read_bytes()


def namespaces() -> set[str]:
    """The network and mount namespaces that live processes are in."""
    found = set()
    for entry in Path("/proc").iterdir():
        for kind in ("net", "mnt") if entry.name.isdigit() else ():
            with contextlib.suppress(OSError):
                found.add(str((entry / "ns" / kind).readlink()))
    return found


def links() -> set[str]:
    """The network interfaces of this machine."""
    return {path.name for path in Path("/sys/class/net").iterdir()}
