"""The controller's end of a leash: one command at one place, from its preparation to its end."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from harness.launch.errors import RoleLostError
from harness.launch.far import wire
from harness.launch.lines import Line
from harness.launch.places import Place, open_line
from harness.launch.staging import Staging, skip

BEAT_S = 1.0
ANSWER_S = 60.0
SILENCE_S = 15.0
"""How long a far host may be silent (it says something every second) before it counts as lost."""
_CONNECT_AGAIN = "is the host up and reachable? what ran there ends by itself"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the far end prepares: its folder, ports to find, one of `slots` to take, files to tell the checksums of.

    `list` are patterns of files whose checksums are told, `names` of files of which it is enough that they are there (their
    checksum is told as empty); `clean` is what of the folder is removed in the end.
    `required` are files there without which nothing can run.
    """

    folder: str
    ports: tuple[str, ...] = ()
    slots: Mapping[str, Any] | None = None
    list: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    clean: str = "."
    required: tuple[str, ...] = ()
    silence_s: float = 0.0
    grace_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Ready:
    """What the far end says: `slot` is None when all are taken, `found` are checksums, `missing` is what of `required` is."""

    host: str
    folder: str
    ports: Mapping[str, int]
    slot: int | None
    missing: Sequence[str]
    found: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Command:
    """What runs there. `probe` is what `Probe.told` gives; files that match `collect` come back every `collect_s` seconds."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "."
    probe: Mapping[str, Any] | None = None
    collect: Sequence[str] = ()
    collect_s: float = 1.0


Output = Callable[[bytes, bool], None]
"""Takes a piece of what the command prints; True for standard error."""


class Leashed:
    """One command on its leash. The methods up to `run` are one conversation; from then on a thread of its own listens."""

    def __init__(self, name: str, place: Place, output: Output, staging: Staging | None = None) -> None:
        """Connect to `place`. Raises InputError or OSError where that fails."""
        self.name = f"{name} on {place.name}"
        self._place, self._output, self._staging = place, output, staging
        self._line: Line = open_line(place)
        self._writing = threading.Lock()
        self._heard = time.monotonic()
        self._listening: threading.Thread | None = None
        self._closed = threading.Event()
        self.ready, self.ended = threading.Event(), threading.Event()
        self.late = False
        self.code: int | None = None
        """The exit status, minus the number of the signal that ended it; None while it runs, and when it was lost."""
        self.free_bytes = 0
        """What of the far disk was free when it ended."""
        self.failure: RoleLostError | None = None

    # -- before the command --------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> Ready:
        """Have `plan` carried out. Raises RoleLostError."""
        self._write("plan", **asdict(plan))
        told = self._answer("here")
        return Ready(**{key: told[key] for key in Ready.__slots__})

    def fetch(self, paths: Sequence[str]) -> None:
        """Take these files of the far folder, as one batch."""
        assert self._staging is not None
        for path in paths:
            self._write("want", path=path)
            self._staging.take(self._line.reader, self._answer("file"))
        self._staging.complete()

    def put_file(self, local: Path, path: str) -> None:
        """Put the file `local` at `path` there."""
        with local.open("rb") as file:
            self._put(file, os.fstat(file.fileno()).st_size, path)

    def put_bytes(self, path: str, data: bytes) -> None:
        """Put `data` at `path` there."""
        self._put(io.BytesIO(data), len(data), path)

    def _put(self, file: IO[bytes], size: int, path: str) -> None:
        try:
            with self._writing:
                wire.copy_out(file, size, {"k": "file", "path": path}, self._line.write)
        except ConnectionError as error:
            raise self._lost() from error

    def drop(self, path: str) -> None:
        """Remove a file there."""
        self._write("drop", path=path)

    def run(self, command: Command) -> None:
        """Start `command`. Raises RoleLostError when it can't be started."""
        self._write("run", **asdict(command))
        told = self._answer("started")
        assert told["pid"]
        self._heard = time.monotonic()
        self._listening = threading.Thread(target=self._listen, daemon=True, name=self.name)
        self._listening.start()
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    def _answer(self, kind: str) -> wire.Frame:
        """The next frame, which has to be of this kind. A far end that does not answer in a minute is lost."""
        timer = threading.Timer(ANSWER_S, self._line.close)
        timer.daemon = True
        timer.start()
        try:
            frame = wire.read_frame(self._line.reader)
        except (OSError, ValueError, wire.Broken) as error:
            raise self._lost() from error
        finally:
            timer.cancel()
        if frame is None:
            raise self._lost()
        if frame["k"] == "failed":
            raise RoleLostError(self.name, f"cannot start: {frame['message']}", "mend that on the host, then run again")
        assert frame["k"] == kind, frame
        return frame

    # -- while it runs -------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended (or was lost) within this time."""
        return self.ended.wait(timeout_s)

    def end(self) -> None:
        """Tell it to end; `wait` for that."""
        with contextlib.suppress(RoleLostError):
            self._write("end")

    def close(self, *, clean: bool = False) -> None:
        """Hang up, with `clean` after the far folder has been removed. What still runs is ended by the far end."""
        if clean and self._listening is not None and self.code is not None:
            with contextlib.suppress(RoleLostError):
                self._write("clean")
                self._listening.join(SILENCE_S)
        elif clean and self._listening is None:
            with contextlib.suppress(RoleLostError):
                self._write("clean")
        self._closed.set()
        self._line.close()
        if self._listening is not None:
            self._listening.join(SILENCE_S)
        if self._staging is not None:
            self._staging.close()

    def _write(self, kind: str, **more: Any) -> None:  # noqa: ANN401
        try:
            with self._writing:
                self._line.write(wire.encode(kind, **more))
        except (OSError, ValueError) as error:
            raise self._lost() from error

    def _beat(self) -> None:
        """Say every second that this process is there, and notice when the far end does not."""
        while not self._closed.wait(BEAT_S):
            with contextlib.suppress(RoleLostError):
                self._write("beat")
            if not self.ended.is_set() and time.monotonic() - self._heard > SILENCE_S:
                self.failure = self._lost("fell silent")
                self._line.close()
                return

    def _listen(self) -> None:
        reader = self._line.reader
        try:
            while (frame := wire.read_frame(reader)) is not None and self._hear(frame):
                self._heard = time.monotonic()
        except (OSError, ValueError, KeyError, wire.Broken) as error:
            self.failure = self.failure or self._lost(f"was lost ({error})")
        except Exception as error:  # a full disk here, say: whoever waits has to know
            self.failure = RoleLostError(self.name, str(error), "mend that here, then run again")
        if self.code is None and not self._closed.is_set():
            self.failure = self.failure or self._lost()
        self.ended.set()

    def _hear(self, frame: wire.Frame) -> bool:
        """Whether more comes."""
        kind = frame["k"]
        if kind in ("out", "err"):
            for piece in wire.chunks(self._line.reader, frame["size"]):
                self._output(piece, kind == "err")
        elif kind == "file" and self._staging:
            self._staging.take(self._line.reader, frame)
        elif kind == "file":
            skip(self._line.reader, frame)
        elif kind == "collected" and self._staging:
            self._staging.complete()
        elif kind in ("ready", "late"):
            self.late = kind == "late"
            self.ready.set()
        elif kind == "exit":
            self.free_bytes, self.code = frame["free"], frame["code"]
            self.ended.set()
        return bool(kind != "cleaned")

    def _lost(self, how: str = "is gone") -> RoleLostError:
        trouble = self._line.trouble()
        return RoleLostError(self.name, f"{how}{f': {trouble}' if trouble else ''}", _CONNECT_AGAIN)
