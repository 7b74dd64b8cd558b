r"""Frames on a byte stream, the same in both directions: a line of JSON, then as many bytes as its `size` says.

    {"k": "out", "size": 6}\nhello\n

A frame with `size` and `sha256: true` is followed by the checksum of its bytes, 64 hexadecimal digits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

CHUNK_BYTES = 1 << 18
_LONGEST_LINE = 1 << 24

Frame = dict[str, Any]


class Broken(Exception):  # noqa: N818
    """The stream has ended within a frame, or what came is no frame."""


def encode(kind: str, data: bytes = b"", **more: Any) -> bytes:  # noqa: ANN401
    """A frame as bytes, with `data` behind it where there is any."""
    told: Frame = {"k": kind, **more}
    if data:
        told["size"] = len(data)
    return json.dumps(told, separators=(",", ":")).encode() + b"\n" + data


def read_frame(stream: IO[bytes]) -> Frame | None:
    """The head of the next frame; None where the stream has ended. Raises Broken."""
    line = stream.readline(_LONGEST_LINE)
    if not line:
        return None
    try:
        told = json.loads(line)
        if not line.endswith(b"\n") or not isinstance(told["k"], str):
            raise ValueError("cut short")
    except (ValueError, KeyError, TypeError) as error:
        raise Broken(f"no frame: {line[:80]!r}") from error
    frame: Frame = told
    return frame


def read_data(stream: IO[bytes], frame: Frame) -> bytes:
    """All bytes of `frame`, for frames that are short."""
    return b"".join(chunks(stream, frame.get("size", 0)))


def chunks(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes in pieces. Raises Broken when the stream ends before."""
    while size > 0:
        piece = stream.read(min(size, CHUNK_BYTES))
        if not piece:
            raise Broken("the stream ended within a frame")
        size -= len(piece)
        yield piece


def copy_in(stream: IO[bytes], frame: Frame, write: Callable[[bytes], Any]) -> str:
    """Write the bytes of `frame`, and give their checksum, which is the one that followed them. Raises Broken."""
    digest = hashlib.sha256()
    for piece in chunks(stream, frame["size"]):
        digest.update(piece)
        write(piece)
    told = b"".join(chunks(stream, 64)).decode("ascii", "replace")
    if told != digest.hexdigest():
        raise Broken(f"{frame.get('path')}: damaged on the way")
    return told


def copy_out(file: IO[bytes], size: int, head: Frame, write: Callable[[bytes], Any]) -> None:
    """Write a frame with the first `size` bytes of `file`; where it has become shorter, zeros and a wrong checksum."""
    write(json.dumps({**head, "size": size, "sha256": True}, separators=(",", ":")).encode() + b"\n")
    digest, left = hashlib.sha256(), size
    while left > 0:
        piece = file.read(min(left, CHUNK_BYTES))
        if not piece:
            break
        digest.update(piece)
        left -= len(piece)
        write(piece)
    while left > 0:  # it was truncated meanwhile: the frame must keep its length, and must not pass for the file
        write(bytes(min(left, CHUNK_BYTES)))
        left -= min(left, CHUNK_BYTES)
        digest = hashlib.sha256(b"cut short")
    write(digest.hexdigest().encode())
