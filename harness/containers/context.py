"""What a build sends to the engine: a tar file of tracked files, the same bytes for the same content."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from systems.registry import InputError

_MTIME = 1_700_000_000  # any, as long as it is always the same
Content = bytes | Path
"""What a file holds: these bytes, or what the file at this path holds."""


def tracked(root: Path, parts: Iterable[str]) -> list[Path]:
    """The files below `parts` (relative to `root`) that git tracks and that are there, relative to `root`, sorted.

    Raises:
        InputError: `root` is no git checkout, or git tracks nothing of a part.
    """
    found: set[Path] = set()
    for part in parts:
        names = _ls_files(root, part)
        if not names and not _has_no_files(root / part):
            raise InputError(root / part, "code", part, "git tracks nothing there: commit it, or take it out of images.yaml")
        found |= {Path(name) for name in names if (root / name).is_file()}
    return sorted(found)


def _has_no_files(folder: Path) -> bool:
    return folder.is_dir() and not any(path.is_file() for path in folder.rglob("*"))


def _ls_files(root: Path, part: str) -> list[str]:
    command = ["git", "-C", str(root), "ls-files", "-z", "--", f":(literal){part}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise InputError(root, "git", "not found", "install git: images are made of tracked files only") from error
    if done.returncode:
        mend = "images are made of tracked files only: work in a git checkout"
        raise InputError(root, "git", done.stderr.decode(errors="replace").strip(), mend)
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def write_tar(files: Mapping[str, Content], to: IO[bytes]) -> None:
    """Write `files` to `to`, in order of their names, without anything that differs between two machines."""
    with tarfile.open(fileobj=to, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            _add(tar, name, files[name])


def _add(tar: tarfile.TarFile, name: str, content: Content) -> None:
    entry = tarfile.TarInfo(name)
    entry.mtime, entry.mode = _MTIME, 0o755 if executable(content) else 0o644
    if isinstance(content, bytes):
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
        return
    with content.open("rb") as file:
        entry.size = os.fstat(file.fileno()).st_size
        tar.addfile(entry, file)


def executable(content: Content) -> bool:
    """Whether it is a file that its owner may execute."""
    return isinstance(content, Path) and bool(content.stat().st_mode & 0o100)


def checksum(files: Mapping[str, Content]) -> str:
    """SHA-256 over names, modes and content of `files`."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name]
        data = content if isinstance(content, bytes) else content.read_bytes()
        digest.update(f"{name}\0{executable(content)}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
