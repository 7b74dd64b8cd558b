"""Debian packages that a lab needs, installed when missing, without starting any daemon on the machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.labs import processes
from tests.labs.errors import LabError, LabUnavailableError

_POLICY = Path("/usr/sbin/policy-rc.d")
_SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
_INSTALL_S = 300


def find(program: str) -> str | None:
    """Where `program` is, the folders for administrators included."""
    return shutil.which(program, path=_SEARCH)


def ensure(packages: Mapping[str, str]) -> None:
    """Install the Debian packages (values) whose programs (keys) are missing.

    Raises:
        LabUnavailableError: this is no Debian, or its servers can't be reached.
    """
    missing = sorted({package for program, package in packages.items() if not find(program)})
    if not missing:
        return
    if not find("apt-get"):
        raise LabUnavailableError(f"needs {', '.join(missing)}, and there is no apt-get: install them")
    try:
        with _no_daemons():
            _install(missing)
    except LabError as error:
        raise LabUnavailableError(f"needs {', '.join(missing)}, which can't be installed: {error}") from error


def _install(names: list[str]) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": _SEARCH}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120", *names]
    if processes.run(install, timeout_s=_INSTALL_S, check=False, environment=environment).returncode:
        # package lists that are absent or out of date; one unreachable extra repository is no reason to give up
        processes.run(["apt-get", "update", "-q"], timeout_s=_INSTALL_S, check=False, environment=environment)
        processes.run(install, timeout_s=_INSTALL_S, environment=environment)


@contextlib.contextmanager
def _no_daemons() -> Iterator[None]:
    """Debian's own switch: while this file answers 101, installing a server does not start it."""
    if _POLICY.exists():  # somebody decides that already
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
