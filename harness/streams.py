"""Output that nobody reads any more: `snakemake fig8a | head`, a terminal that was closed.

Snakemake raises the broken pipe in the thread that waits for a job, and then waits for ever. What a run makes is on
disk and in its logs, so it carries on in silence instead.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import threading
from typing import TextIO

_GONE = (errno.EPIPE, errno.EIO)  # a pipe's reader, a terminal


class Lasting(io.TextIOBase):
    """A stream like `stream`, whose reader may go away: then what is written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return self._stream.encoding

    def fileno(self) -> int:
        """The stream's."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """The stream's."""
        return self._stream.isatty()

    def write(self, text: str) -> int:
        """Write or drop `text`."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, if there is a reader."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        silence(self._stream.fileno())


def silence(descriptor: int) -> None:
    """Drop what is written to `descriptor` from now on."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def outlive_readers(logger: logging.Logger) -> None:
    """Make all that `logger` says, and what is printed besides, outlive the readers of stdout and stderr."""
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(Lasting(handler.stream))
    threading.Thread(target=_watch, daemon=True, name="outlive_readers").start()


def _watch() -> None:
    """For what is not logged: silence either stream as soon as its reader goes."""
    poll = select.poll()
    watched = {1, 2}
    for stream in watched:
        poll.register(stream, 0)  # no event but those that cannot be left out: error, hang-up, not open
    while watched:
        for stream, event in poll.poll():
            poll.unregister(stream)
            watched.discard(stream)
            if not event & select.POLLNVAL:
                silence(stream)
