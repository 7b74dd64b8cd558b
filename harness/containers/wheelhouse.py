"""Wheels for builds without a network: fetched by this machine, checked against the hashes of the lock files."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.atomic import atomic_folder
from harness.containers.models import SITE
from harness.datasets import default_cache
from systems.registry import InputError

_LONGEST_S = 1800


def wheels(locks: Sequence[Path], python: str, index_url: str | None = None, cache: Path | None = None) -> Path:
    """A folder of wheels with everything that `locks` pin; made on first use, from then on found.

    Args:
        locks: files of pinned packages with hashes.
        python: the Python that the wheels are for, such as `3.11`: it must be this machine's.
        index_url: a package index to ask besides pip's own, for the last of `locks`.
        cache: where such folders are kept; by default below this user's cache.

    Raises:
        InputError: this is another Python, or pip failed.
    """
    here = ".".join(platform.python_version_tuple()[:2])
    if here != python:
        mend = f"wheels for Python {python} are made by Python {python}: use that one here, or `packages: index`"
        raise InputError(SITE, "packages", "wheelhouse", f"this is Python {here}: {mend}")
    told = [python.encode(), platform.machine().encode(), *(lock.read_bytes() for lock in locks)]
    name = hashlib.sha256(b"\0".join(told)).hexdigest()[:20]
    final = (cache or default_cache().parent / "wheels") / name
    if not final.is_dir():
        with atomic_folder(final) as folder:
            for lock in locks:
                _fetch(lock, folder, index_url if lock == locks[-1] else None)
    return final


def _fetch(lock: Path, folder: Path, index_url: str | None) -> None:
    # `wheel`, not `download`: what comes as a source archive must be built here, where its build tools can be fetched
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--require-hashes", "--wheel-dir", str(folder), "--requirement", str(lock)]
    command += ["--extra-index-url", index_url] if index_url else []
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LONGEST_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(lock, "pip wheel", f"not done after {_LONGEST_S} s", "look at the network, then run again") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines() or ["?"]
        raise InputError(lock, "pip wheel", said[0], "mend that (no network? disk full?), then run again")


def pins(lock: str) -> str:
    """The text `lock` less its hashes, which are those of the indexes' files and not of wheels built here."""
    return re.sub(r"[ \t]*\\\n[ \t]*--hash=\S+", "", lock)
