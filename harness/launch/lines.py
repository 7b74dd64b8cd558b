"""Byte streams to a process somewhere: what all kinds of places come down to.

A `Line` is open while the far process may live. When it is closed, or this process ends in whatever way, the far end reads
the end of its standard input.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Protocol

_TAIL_BYTES = 4096
_LAST_WORD_S = 2.0
_PIECES = 64  # so many wait to be sent before the sender waits


class Line(Protocol):
    """A byte stream to a far process."""

    reader: IO[bytes]

    def write(self, data: bytes) -> None:
        """Send all of `data`. Raises OSError when the line is cut."""

    def close(self) -> None:
        """Hang up, and wait until what carried the line has ended."""

    def trouble(self) -> str:
        """What the carrier said about an end that nobody asked for; empty when it said nothing."""


class ProcessLine:
    """A line to a child process of this one, which may itself carry it on (`srun`, `docker run -i`)."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None, end_s: float = 15.0) -> None:
        """Start `argv` in a session of its own, out of reach of Ctrl-C; after `close` it has `end_s` to end by itself."""
        self._words = tempfile.TemporaryFile()  # noqa: SIM115
        self._end_s = end_s
        self._process = subprocess.Popen(
            list(argv),
            env={**os.environ, **env} if env else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._stdin: IO[bytes] = self._process.stdin
        self.reader = self._process.stdout

    def write(self, data: bytes) -> None:
        """Send all of `data`."""
        self._stdin.write(data)
        self._stdin.flush()

    def close(self) -> None:
        """Hang up; a carrier that does not end by itself is killed."""
        with contextlib.suppress(OSError, ValueError):
            self._stdin.close()
        try:
            self._process.wait(self._end_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def trouble(self) -> str:
        """The end of what the child wrote to standard error; one that is about to end gets a moment to say why."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORD_S)
        size = os.fstat(self._words.fileno()).st_size
        return os.pread(self._words.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace").strip()


class _Pipe:
    """A sink (as `harness.remote` writes to) that becomes a file to read from."""

    def __init__(self) -> None:
        source, target = os.pipe()
        self.reader: IO[bytes] = os.fdopen(source, "rb")
        self._writer = os.fdopen(target, "wb", 0)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._writer.write(view) :]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


Carry = Callable[[_Pipe, Iterator[bytes]], None]
"""Run the far process with what it reads and where it writes, until it ends; may raise."""


class CarriedLine:
    """A line that a blocking call carries, in a thread of its own."""

    def __init__(self, carry: Carry, hang_up: Callable[[], None]) -> None:
        """`hang_up` ends whatever `carry` goes through, after the far end had time to end by itself."""
        self._pipe, self._hang_up = _Pipe(), hang_up
        self.reader = self._pipe.reader
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_PIECES)
        self._cut = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._carry, args=(carry,), daemon=True, name="line")
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Send all of `data`, after what is waiting to be sent."""
        while not self._cut.is_set():
            with contextlib.suppress(queue.Full):
                self._pieces.put(data, timeout=0.2)
                return
        raise BrokenPipeError("the line is cut")

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._end_of_pieces()
        self._thread.join(10.0 if not self._cut.is_set() else 0.5)
        self._hang_up()
        self._thread.join(5.0)

    def trouble(self) -> str:
        """The error that ended it. The output may have ended a moment before that is known, and that takes the input's end."""
        with contextlib.suppress(queue.Full):
            self._pieces.put_nowait(None)
        self._cut.wait(_LAST_WORD_S)
        return str(self._error or "")

    def _end_of_pieces(self) -> None:
        while not self._cut.is_set():
            with contextlib.suppress(queue.Full):
                self._pieces.put(None, timeout=0.2)
                return

    def _carry(self, carry: Carry) -> None:
        try:
            carry(self._pipe, iter(self._pieces.get, None))
        except Exception as error:
            self._error = error
        finally:
            self._cut.set()
            self._pipe.close()
