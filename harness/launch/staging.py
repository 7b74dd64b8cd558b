"""Where files from a far host are put until all of a batch are there, so that no reader ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from harness.atomic import make_folder, writing
from harness.launch.far import files
from harness.launch.far.wire import CHUNK_BYTES, Broken, Frame, chunks, copy_in

Publish = Callable[[Path, list[str]], None]
"""Given the staging folder and the paths in it, in the order in which they came: put them where they belong."""


class Staging:
    """Takes the files of one far folder; `publish` gets each batch when it is complete.

    What came of a batch that was cut short is dropped: it is still on the far host.
    """

    def __init__(self, folder: Path, publish: Publish) -> None:
        """Files are staged in a folder of its own in `folder`, which must be on the file system of their destination."""
        self._folder = folder / f".staging.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        self._publish, self._batch = publish, list[str]()

    def take(self, stream: IO[bytes], frame: Frame) -> None:
        """Read the file that `frame` brings. Raises Broken; InputError where the disk is full."""
        with writing(self._folder):
            make_folder(self._folder)
            path = files.inside(self._folder, frame["path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                try:
                    copy_in(stream, frame, file.write)
                except Broken:
                    path.unlink()
                    raise
                os.fsync(file.fileno())
        if frame["path"] not in self._batch:
            self._batch.append(frame["path"])

    def complete(self) -> None:
        """The batch is."""
        batch, self._batch = self._batch, []
        with writing(self._folder):
            self._publish(self._folder, batch)

    def close(self) -> None:
        """Drop what is left."""
        shutil.rmtree(self._folder, ignore_errors=True)


def into(folder: Path) -> Publish:
    """Put every file at its path below `folder`, in place of what was there."""

    def publish(staging: Path, batch: list[str]) -> None:
        for path in batch:
            target = folder / path
            make_folder(target.parent)
            (staging / path).replace(target)

    return publish


def skip(stream: IO[bytes], frame: Frame) -> None:
    """Read past the file that `frame` brings."""
    for _ in chunks(stream, frame["size"] + 64):
        pass


class Log:
    """A file that grows by what a role prints, and its last lines in memory."""

    def __init__(self, path: Path, last: int) -> None:
        """`path` is begun anew; `last` lines are remembered."""
        make_folder(path.parent)
        self._file = path.open("wb", 0)
        self._tail, self._last = b"", last

    def write(self, data: bytes) -> None:
        """The next piece. A full disk must not end the role: then the file has a hole, the memory has not."""
        with contextlib.suppress(OSError):
            self._file.write(data)
        self._tail = (self._tail + data)[-CHUNK_BYTES // 16 :]

    def lines(self) -> list[str]:
        """The last lines."""
        return self._tail.decode("utf-8", "replace").splitlines()[-self._last :]

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()
