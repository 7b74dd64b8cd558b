"""dockerd by hand: started, asked, stopped and killed, without systemd."""

from __future__ import annotations

import http.client
import json
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.labs import packages, processes
from tests.labs.errors import LabError
from tests.labs.rooms import Room

_PID_FILE = "/run/docker.pid"  # in the room's own /run
_START_S = 30


class _Connection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True, slots=True)
class Engine:
    """The dockerd in `room`, with its files in `folder`; its containers' control groups are below `fivefold-<lab_id>`."""

    room: Room
    folder: Path
    lab_id: str
    private: bool
    listens: Path | None = None
    """Where, as the room sees it; else `docker.sock` in `folder`."""

    @property
    def socket(self) -> Path:
        """Where it listens, as this process sees it (while the room lives)."""
        return self.room.see(self.listens) if self.listens else self.folder / "docker.sock"

    def ask(self, path: str, timeout_s: float = 5) -> bytes:
        """The body of its answer to GET `path`. Raises OSError when it is not there."""
        connection = _Connection(self.socket, timeout_s)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def info(self) -> dict[str, Any]:
        """What it says of itself."""
        said: dict[str, Any] = json.loads(self.ask("/info"))
        return said

    def start(self) -> None:
        """Start it and return when it answers. Raises LabError, with the end of its log, when it ends instead."""
        log = self.folder / "logs" / "dockerd.log"
        pid = self.room.spawn([packages.find("dockerd") or "dockerd", *self._options()], log)

        def ready() -> bool:
            if self.room.ended(pid):
                raise LabError(f"dockerd ended: {processes.tail(log.read_text(errors='replace'), 1)}")
            return self._answers()

        processes.wait_for(ready, "dockerd", _START_S)

    def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        self._end(signal.SIGTERM, 30)

    def kill(self) -> None:
        """SIGKILL, and wait for its end; its containerd dies with it, its containers do not."""
        self._end(signal.SIGKILL, 10)
        self.room.see(_PID_FILE).unlink(missing_ok=True)  # it would be taken for that of a live daemon at the next start

    def _end(self, number: signal.Signals, timeout_s: float) -> None:
        pid = int(self.room.see(_PID_FILE).read_text())
        self.room.run(["kill", f"-{number.value}", str(pid)])
        processes.wait_for(lambda: self.room.ended(pid), "end of dockerd", timeout_s)

    def _answers(self) -> bool:
        try:
            return self.ask("/_ping") == b"OK"
        except (OSError, http.client.HTTPException):
            return False

    def _options(self) -> list[str]:
        own = [
            f"--data-root={self.folder / 'data'}",
            "--exec-root=/run/docker",
            f"--pidfile={_PID_FILE}",
            f"--host=unix://{self.listens or self.socket}",
            f"--cgroup-parent=/fivefold-{self.lab_id}",
            "--log-level=warn",
        ]
        # on the machine's network: hands off its links and its firewall
        aloof = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]
        return own if self.private else own + aloof
