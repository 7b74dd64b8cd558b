"""One command on one channel: what goes in, what comes out line by line, and how it ended."""

from __future__ import annotations

import codecs
import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import paramiko

OnLine = Callable[[str], None]
_CHUNK = 1 << 17


class Sink(Protocol):
    """Takes the bytes of a stream as they come."""

    def write(self, data: bytes, /) -> object:
        """Take `data`."""

    def close(self) -> None:
        """Nothing more comes."""


class Lines:
    """A sink that keeps a text and says each of its lines when it is complete."""

    def __init__(self, on_line: OnLine | None = None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._on_line, self._pieces, self._rest = on_line, [""], ""

    def write(self, data: bytes) -> None:
        """Take `data`."""
        self._take(self._decoder.decode(data))

    def close(self) -> None:
        """Nothing more comes: a last line without its end is a line too."""
        self._take(self._decoder.decode(b"", final=True))
        if self._rest and self._on_line:
            self._on_line(self._rest.removesuffix("\r"))

    def _take(self, text: str) -> None:
        self._pieces.append(text)
        if self._on_line is None:
            return
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._on_line(line.removesuffix("\r"))

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._pieces)


class Greeted:
    """A sink that passes on only what comes after the line that begins with `greeting`, and keeps the number on it."""

    def __init__(self, greeting: str, after: Sink) -> None:
        self._greeting, self._after, self._held = greeting.encode() + b" ", after, b""
        self.process: int | None = None

    @property
    def before(self) -> str:
        """What was said instead of the greeting, by a login shell that lets nobody run commands, say."""
        return self._held.decode("utf-8", "replace")

    def write(self, data: bytes) -> None:
        """Take `data`."""
        if self.process is not None:
            self._after.write(data)
            return
        self._held += data
        place = self._held.find(self._greeting)
        end = self._held.find(b"\n", place)
        if place >= 0 and end >= 0:
            self.process = int(self._held[place + len(self._greeting) : end])
            rest, self._held = self._held[end + 1 :], b""
            if rest:
                self._after.write(rest)

    def close(self) -> None:
        """Nothing more comes."""
        self._after.close()


class Exchange:
    """A running command. Its streams are read by threads of their own, so that neither can block the other."""

    def __init__(self, channel: paramiko.Channel, out: Sink, err: Sink) -> None:
        self.channel = channel
        self.failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._read, args=(channel.recv, out), daemon=True),
            threading.Thread(target=self._read, args=(channel.recv_stderr, err), daemon=True),
        ]

    def start(self, command: str, stdin: Iterable[bytes]) -> None:
        """Ask for `command` and begin to send it `stdin`."""
        self.channel.exec_command(command)
        for thread in self._threads:
            thread.start()
        sender = threading.Thread(target=self._send, args=(stdin,), daemon=True)
        sender.start()
        self._threads.append(sender)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether the command ended, or its connection did, within `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def status(self, patience_s: float) -> int | None:
        """The exit status; None when the connection ended before the host said it."""
        self.channel.status_event.wait(patience_s)
        return self.channel.exit_status if self.channel.exit_status >= 0 else None

    def _read(self, receive: Callable[[int], bytes], sink: Sink) -> None:
        try:
            while data := _received(receive):
                sink.write(data)
            sink.close()
        except BaseException as error:  # said by the thread that waits; the host must not wait for us for ever
            self._fail(error)

    def _send(self, stdin: Iterable[bytes]) -> None:
        try:
            for piece in stdin:
                if not self._sent(piece):
                    break
        except BaseException as error:  # of what makes `stdin`: a file that cannot be read, say
            self._fail(error)
        finally:
            with contextlib.suppress(OSError, EOFError):
                self.channel.shutdown_write()

    def _sent(self, piece: bytes) -> bool:
        """Whether it went; not when the command has ended, whose status says if that was wrong, or the connection has."""
        try:
            self.channel.sendall(piece)
        except (OSError, EOFError, paramiko.SSHException):
            return False
        return True

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        with contextlib.suppress(OSError, EOFError):  # the connection has ended: so has the channel
            self.channel.close()


def _received(receive: Callable[[int], bytes]) -> bytes:
    """The next bytes; none when there will be no more, also where the connection ends under paramiko's own hands."""
    try:
        return receive(_CHUNK)
    except (OSError, EOFError, paramiko.SSHException):
        return b""
