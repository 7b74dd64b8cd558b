"""Bytes from a server to what they mean: an HTTP/1.1 response's head and body, and server-sent events. Pure.

    reader = ResponseReader()
    pieces = reader.feed(data)          # body bytes, however the network cut them; reader.done at the end

Why not a library: this client must run where torch and its libraries are not, and stamps a token in the very call that
receives it. What is read here is little (a status line, headers, three kinds of body), and it takes no more processor time
than aiohttp's compiled reader; docs/load.md has the measurement.
"""

from __future__ import annotations

from collections.abc import Iterator

MOST_HEAD_BYTES = 64 * 1024
"""A response whose head is longer is no answer of an inference server."""
MOST_LINE_BYTES = 64 * 1024
"""The same for a chunk's size line."""
MOST_EVENT_BYTES = 16 * 1024 * 1024
"""The same for one server-sent event."""


class BadResponseError(ValueError):
    """The server sent what is not HTTP/1.1."""


class ResponseReader:
    """Reads one response, piece by piece. After `done` it must not be fed.

    Attributes:
        status: the status code; 0 until the head is complete.
        headers: by lower-case name; the last one counts where a name is repeated.
        done: whether the body is complete.
        keep_alive: whether the server will answer another request on this connection.
        rest: bytes after the end of the response; none from a sane server.
    """

    __slots__ = ("_buffer", "_left", "_mode", "_version", "done", "headers", "status")

    def __init__(self) -> None:
        self._buffer = b""
        self._mode = "head"  # then chunk-size, chunk, chunk-end, trailer; or length; or eof
        self._left = 0
        self._version = ""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow on this connection."""
        wish = self.headers.get("connection", "").lower()
        return self.done and self._mode != "eof" and "close" not in wish and self._version == "HTTP/1.1"

    def feed(self, data: bytes) -> list[bytes]:
        """Body pieces that `data` completes. Raises BadResponseError for what is no HTTP."""
        pieces: list[bytes] = []
        self._buffer = buffer = self._buffer + data if self._buffer else data
        while buffer and not self.done:
            step = self._step(buffer, pieces)
            if step == 0:
                break
            buffer = buffer[step:]
        if self.done and buffer:
            raise BadResponseError("bytes after the end of the response")
        self._buffer = buffer
        return pieces

    def end(self) -> None:
        """The server closed the connection, which ends a body that has no other end. Raises BadResponseError for any other."""
        if self._mode == "eof":
            self.done = True
        if not self.done:
            raise BadResponseError("the response is incomplete")

    def _step(self, buffer: bytes, pieces: list[bytes]) -> int:
        """Take one unit from the front of `buffer`; how many bytes it had, 0 when it is not all there yet."""
        if self._mode == "chunk" or self._mode == "length":
            return self._body(buffer, pieces)
        if self._mode == "eof":
            pieces.append(buffer)
            return len(buffer)
        if self._mode == "head":
            return self._head(buffer)
        return self._line(buffer)

    def _body(self, buffer: bytes, pieces: list[bytes]) -> int:
        taken = min(len(buffer), self._left)
        pieces.append(buffer[:taken])
        self._left -= taken
        if not self._left:
            self._mode = "chunk-end" if self._mode == "chunk" else "length"
            self.done = self._mode == "length"
        return taken

    def _line(self, buffer: bytes) -> int:
        """A size line, the empty line after a chunk, or a trailer."""
        end = buffer.find(b"\r\n")
        if end < 0:
            if len(buffer) > MOST_LINE_BYTES:
                raise BadResponseError("a chunk without size")
            return 0
        line = buffer[:end]
        if self._mode == "chunk-end":
            if line:
                raise BadResponseError("a chunk longer than its size")
            self._mode = "chunk-size"
        elif self._mode == "chunk-size":
            self._left = _hexadecimal(line)
            self._mode = "chunk" if self._left else "trailer"
        elif not line:
            self.done = True
        return end + 2

    def _head(self, buffer: bytes) -> int:
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > MOST_HEAD_BYTES or not b"HTTP/1.".startswith(buffer[:7]):
                raise BadResponseError("no HTTP head")
            return 0
        status, *lines = buffer[:end].decode("latin-1").split("\r\n")
        words = status.split(None, 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not (words[1].isascii() and words[1].isdigit()):
            raise BadResponseError("no HTTP status line")
        self._version, code = words[0], int(words[1])
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise BadResponseError("a header without a colon")
            self.headers[name.strip().lower()] = value.strip()
        if 100 <= code < 200:  # "Continue": the real head follows
            self.headers.clear()
            return end + 4
        self.status = code
        self._begin_body(code)
        return end + 4

    def _begin_body(self, code: int) -> None:
        if code in (204, 304):
            self._mode, self.done = "length", True
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._mode = "chunk-size"
        elif (length := self.headers.get("content-length")) is not None:
            if not (length.isascii() and length.isdigit()):
                raise BadResponseError("no content length")
            self._mode, self._left = "length", int(length)
            self.done = self._left == 0
        else:
            self._mode = "eof"


def _hexadecimal(line: bytes) -> int:
    size = line.partition(b";")[0].strip()
    try:
        if not size or not size.isalnum():  # int() would take signs and underscores too
            raise ValueError
        return int(size, 16)
    except ValueError:
        raise BadResponseError("no chunk size") from None


class EventReader:
    """Splits a body into the data of its server-sent events (HTML standard, 9.2), however the bytes were cut."""

    __slots__ = ("_buffer", "_data")

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of every event that `piece` completes. Raises BadResponseError for an event without end."""
        if len(self._buffer) > MOST_EVENT_BYTES:
            raise BadResponseError("an event without end")
        *lines, self._buffer = (self._buffer + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data.clear()

    @property
    def pending(self) -> bool:
        """Whether the body stopped inside an event."""
        return bool(self._buffer.strip() or self._data)
