"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from systems.common.errors import InputError


def write(path: Path, text: str) -> None:
    """Put `text` at `path` in one step: under a temporary name in the same folder, flushed to disk, renamed.

    A link stays a link, and a device or a pipe (/dev/stdout) is written to, never replaced. Raises InputError when the disk
    or the folder refuses. Then `path` is as it was before.
    """
    try:
        target = path.resolve()
        if target.is_dir():
            raise InputError(path, "--out", str(path), "is a folder: name a file in it")
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            _replace(target, text)
    except OSError as error:
        mend = f"cannot be written ({error.strerror}): free space, or choose another folder"
        raise InputError(path, "--out", str(path.parent), mend) from error


def _replace(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
