"""Whether a role is ready, asked from its own host: a port that accepts, an address that answers, a file, a line in its log."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ASK_S = 2.0


class LogLine:
    """Whether a line that has gone by matches a pattern; keeps at most the end of the last line."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._rest = re.compile(pattern), ""

    def feed(self, data: bytes) -> bool:
        """Whether such a line has come, with the next piece of what the role prints."""
        *lines, rest = (self._rest + data.decode("utf-8", "replace")).split("\n")
        self._rest = rest[-65536:]
        return any(self._pattern.search(line) is not None for line in [*lines, self._rest])


def answers(probe: Mapping[str, Any], folder: Path) -> bool:
    """Whether the role is ready now; for every kind but `log`."""
    if probe["kind"] == "file":
        return Path(folder, probe["path"]).exists()
    if probe["kind"] == "tcp":
        return _accepts(probe["address"], probe["port"])
    return _answers_http(probe["url"])


def _accepts(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=_ASK_S):
            return True
    except OSError:
        return False


def _answers_http(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 80, timeout=_ASK_S)
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        return int(connection.getresponse().status) < 400
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def watch(probe: Mapping[str, Any], folder: Path, over: threading.Event, tell: Callable[[], None]) -> None:
    """Ask again and again, in a thread of its own, until the role is ready (then `tell`) or it is `over`."""

    def ask() -> None:
        while not over.is_set():
            if answers(probe, folder):
                tell()
                return
            over.wait(probe["every_s"])

    threading.Thread(target=ask, daemon=True, name="probe").start()
