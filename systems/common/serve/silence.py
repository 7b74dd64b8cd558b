"""Connections on which nobody asks anything: opened and forgotten, or feeding a request's head byte by byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Connection = Any
"""One of uvicorn's connections: `cycle` is the request being answered or answered last, None before the first."""


class Silent:
    """Tells which connections have had no request under way for `limit_s` seconds."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: dict[Connection, tuple[object, float]] = {}

    def overdue(self, connections: Iterable[Connection], now_s: float) -> list[Connection]:
        """Those of `connections` that are due to be closed. To be called again and again, `now_s` on one clock."""
        before, self._since = self._since, {}
        for connection in connections:
            cycle = connection.cycle
            if cycle is None or cycle.response_complete:
                known, began_s = before.get(connection, (cycle, now_s))
                self._since[connection] = (cycle, began_s if known is cycle else now_s)
        return [connection for connection, (_, began_s) in self._since.items() if now_s - began_s > self._limit_s]
