"""Packages for hosts without a network: fetched once on this machine, checked by pip against the lock file's hashes, kept."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import threading
from pathlib import Path

from harness.atomic import atomic_folder
from harness.datasets import default_cache
from systems.registry import InputError

LONGEST_S = 1800
# what the lock file has as a source archive is built on the host, and these build it
BUILD_TOOLS = ("setuptools==80.9.0", "wheel==0.45.1")
_LOCK = threading.Lock()


def default_folder() -> Path:
    """Where wheelhouses are kept."""
    return default_cache().parent / "wheelhouse"


def here() -> tuple[str, str]:
    """The Python and the kind of machine that this machine can fetch packages for, such as ("3.11", "x86_64")."""
    return ".".join(platform.python_version_tuple()[:2]), platform.machine()


def ensure(lock: Path, keep_in: Path | None = None) -> Path:
    """The folder with every package of the lock file `lock` for this Python and this kind of machine.

    Several threads may ask at once: one fetches, the others wait.

    Raises:
        InputError: pip failed.
    """
    told = [*(word.encode() for word in here()), *(tool.encode() for tool in BUILD_TOOLS), lock.read_bytes()]
    name = hashlib.sha256(b"\0".join(told)).hexdigest()[:20]
    final = (keep_in or default_folder()) / name
    with _LOCK:
        if not final.is_dir():
            with atomic_folder(final) as folder:
                _pip(lock, folder, "--require-hashes", "--no-deps", "--requirement", str(lock))
                _pip(lock, folder, "--no-deps", "--only-binary=:all:", *BUILD_TOOLS)
    return final


def _pip(lock: Path, folder: Path, *words: str) -> None:
    """Download, and once more where that failed: an index that does not answer looks like one that lacks the package."""
    try:
        _download(lock, folder, *words)
    except InputError:
        _download(lock, folder, *words)


def _download(lock: Path, folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            lock, "pip download", f"not done after {LONGEST_S} s", "look at the network, then run again"
        ) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["?"]
        raise InputError(lock, "pip download", said[-1], "mend that (no network? disk full?), then run again")
