"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from systems.common.errors import InputError


def write(path: Path, text: str) -> None:
    """Put `text` at `path` in one step: under a temporary name in the same folder, flushed to disk, renamed.

    Raises InputError when the disk or the folder refuses. Then `path` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        mend = f"cannot be written ({error.strerror}): free space, or choose another folder"
        raise InputError(path, "--out", str(path.parent), mend) from error
