"""Messages between rank 0 and another rank over one TCP connection: a kind, a length, the bytes."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

HEADER = struct.Struct("<cQ")
JSON, PLAN, ADAPTER = b"J", b"P", b"A"


class Wire:
    """One connection; `send` and `receive` block."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection

    @classmethod
    def connect(cls, host: str, port: int, timeout_s: float = 30.0) -> Wire:
        """Reach rank 0. Raises OSError when nobody listens there."""
        connection = socket.create_connection((host, port), timeout=timeout_s)
        connection.settimeout(None)
        return cls(connection)

    def send(self, kind: bytes, *parts: bytes | memoryview) -> None:
        """Send one message. Raises OSError when the other side is gone."""
        self.connection.sendall(b"".join([HEADER.pack(kind, sum(map(len, parts))), *parts]))

    def send_json(self, **message: Any) -> None:  # noqa: ANN401 - anything JSON holds
        """Send a message of kind JSON."""
        self.send(JSON, json.dumps(message).encode())

    def receive(self) -> tuple[bytes, bytearray]:
        """The next message. Raises EOFError when the other side is gone."""
        kind, length = HEADER.unpack(self._exactly(HEADER.size))
        return kind, self._exactly(length)

    def receive_json(self) -> dict[str, Any]:
        """The next message, of kind JSON."""
        kind, payload = self.receive()
        assert kind == JSON, kind
        return dict(json.loads(bytes(payload)))

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def _exactly(self, length: int) -> bytearray:
        buffer = bytearray(length)
        view, got = memoryview(buffer), 0
        while got < length:
            try:
                more = self.connection.recv_into(view[got:])
            except ConnectionResetError:
                more = 0
            if not more:
                raise EOFError("the other side is gone")
            got += more
        return buffer
