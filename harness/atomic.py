"""Files and folders that are there whole or not at all.

Everything is written under a temporary name in the same folder (so that the rename stays on one file system), flushed to
the disk and then renamed. A reader never sees half a file, and a killed writer leaves at most a dot-file behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from systems.registry import InputError

_MENDS = {
    errno.ENOSPC: ("disk", "full", "free some space, then run the same command again"),
    errno.EDQUOT: ("disk", "quota exceeded", "free some space or raise the quota, then run the same command again"),
    errno.EROFS: ("file system", "read-only", "choose a folder that can be written"),
    errno.EACCES: ("permission", "denied", "choose a folder that you may write, or mend its permissions"),
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses while `path` is written (full, read-only, no permission) into an InputError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in _MENDS:
            raise
        key, value, mend = _MENDS[error.errno]
        raise InputError(path, key, value, mend) from error


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, where they are missing.

    Raises InputError when a file has one of their names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(folder, "folder", "a file has this name", "move the file away, or choose another folder") from error


def temporary_beside(final: Path) -> Path:
    """A name in `final`'s folder that nobody else uses: hidden, and recognisable by its ending."""
    return final.with_name(f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Put `data` (text as UTF-8) at `path`, replacing what was there in one step; folders are made as needed.

    Raises InputError when the disk is full or the folder can't be written. Then `path` is as it was before.
    """
    temporary = temporary_beside(path)
    with writing(path):
        make_folder(path.parent)
        try:
            with temporary.open("xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                _sync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A fresh folder to fill, which becomes `final` when the block ends well and vanishes when it doesn't.

    If `final` has appeared meanwhile (two runs of one trial, whose name is the hash of its content), that one stays and
    this one is dropped.

    Raises InputError when the disk is full or the folder can't be written.
    """
    temporary = temporary_beside(final)
    with writing(final):
        make_folder(final.parent)
        try:
            temporary.mkdir()
            yield temporary
            for path in temporary.rglob("*"):
                _sync_path(path)
            sync_folder(temporary)
            _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(final.parent)


def _publish(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not final.is_dir():
            raise


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut."""
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
