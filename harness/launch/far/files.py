"""Files below one folder that come and go by checksum. Paths are relative, with `/`, and never lead out of the folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from harness.launch.far.wire import CHUNK_BYTES, Broken, Frame, copy_in, copy_out, encode

Stamp = tuple[int, int]
"""Size and time of change of a file: when neither has changed it is not sent again."""


def inside(root: Path, path: str) -> Path:
    """The file `path` below `root`. Raises Broken for a path that leads out, or is not in its shortest form."""
    if not path or "\0" in path or os.path.normpath(path) != path or path[0] == "/" or path.split("/")[0] == "..":
        raise Broken(f"{path!r} is no path inside a folder")
    return root / path


def checksum(path: Path) -> str:
    """The SHA-256 of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def listed(root: Path, patterns: Sequence[str]) -> list[str]:
    """The files below `root` that match one of `patterns`, in their order; hidden ones, half-written by us, are left out."""
    found: dict[str, None] = {}
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            if not any(part.startswith(".") for part in name.split("/")) and path.is_file() and not path.is_symlink():
                found[name] = None
    return list(found)


def checksums(root: Path, patterns: Sequence[str]) -> dict[str, str]:
    """The checksum of every file that `listed` gives."""
    return {path: checksum(root / path) for path in listed(root, patterns)}


def receive(root: Path, stream: IO[bytes], frame: Frame) -> None:
    """Put the file that `frame` brings below `root`, whole or not at all."""
    path = inside(root, frame["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            copy_in(stream, frame, file.write)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def send(root: Path, path: str, write: Callable[[bytes], Any], size: int | None = None) -> None:
    """Write the frame of the file `path` below `root`, or of its first `size` bytes."""
    with inside(root, path).open("rb") as file:
        length = os.fstat(file.fileno()).st_size if size is None else size
        copy_out(file, length, {"k": "file", "path": path}, write)


class Collector:
    """Sends the files that match, as they appear and again when they change.

    `patterns` are in the order of what refers to what: a file that names others comes behind them, so that whoever has it
    has those. Hence the last pattern is looked at first, and of a file only what was there then is sent.
    """

    def __init__(self, root: Path, patterns: Sequence[str]) -> None:
        self._root, self._patterns = root, patterns
        self._sent: dict[str, Stamp] = {}

    def know(self) -> None:
        """What is there now need not be sent."""
        self._sent.update(dict(self._changed()))

    def send_new(self, write: Callable[[bytes], Any]) -> None:
        """Send what is new, and then that this was all of it: only now do the files make sense together."""
        changed = self._changed()
        for path, stamp in changed:
            try:
                send(self._root, path, write, stamp[0])
            except FileNotFoundError:
                continue
            self._sent[path] = stamp
        if changed:
            write(encode("collected"))

    def _changed(self) -> list[tuple[str, Stamp]]:
        groups: list[list[tuple[str, Stamp]]] = []
        for pattern in reversed(self._patterns):
            groups.append([(path, stamp) for path in listed(self._root, [pattern]) if (stamp := self._stamp(path))])
        return [(path, stamp) for group in reversed(groups) for path, stamp in group if self._sent.get(path) != stamp]

    def _stamp(self, path: str) -> Stamp | None:
        try:
            told = (self._root / path).stat()
        except FileNotFoundError:
            return None
        return told.st_size, told.st_mtime_ns
