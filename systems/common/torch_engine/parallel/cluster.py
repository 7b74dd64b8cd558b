# mypy: disable-error-code="no-untyped-call"
"""Rank 0's side of the other ranks: starts them, watches them, ends them.

When one dies, the others are killed, what rank 0 waits for on its GPU is broken off, and the call raises one RankError.
Should rank 0 not come back from a collective within `GRACE_S` even so, its process ends with that line on stderr.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from systems.common.errors import InputError
from systems.common.torch_engine.comm import break_off, leave
from systems.common.torch_engine.parallel.rank import KEY
from systems.common.torch_engine.parallel.spec import ENVIRONMENT, ONE_HOST
from systems.common.torch_engine.parallel.wire import Wire

GRACE_S = 10.0
CONNECT_S = 120.0
ROOT = Path(__file__).parents[4]


class RankError(RuntimeError):
    """A rank died; all have ended. One line."""


def _input_error(said: Any) -> InputError:  # noqa: ANN401 - from JSON
    where, key, value, mend = said
    return InputError(where, key, tuple(value) if isinstance(value, list) else value, mend)


class Cluster:
    """The processes of ranks 1 and up, on this host.

    Attributes:
        wires: a connection to each, by rank - 1.
        failure: what ended them, or None.
        on_death: called when one has died, from a thread of its own.
    """

    def __init__(self, ranks: int, host: str = "127.0.0.1") -> None:
        self.ranks, self.host = ranks, host
        self.wires: list[Wire] = []
        self.failure: str | None = None
        self.on_death: Callable[[], None] | None = None
        self._leashes: list[Wire] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._words: list[IO[bytes]] = []
        self._failed, self._ending = threading.Event(), False
        self._waiting_since: float | None = None
        self._wake: tuple[int, int] | None = None
        self._watchdog: threading.Thread | None = None
        atexit.register(self.end)

    # ---- start

    def start(self) -> None:
        """Start the processes and wait until all have connected. Raises RankError when one ends instead."""
        key = secrets.token_hex(16)
        with socket.create_server((self.host, 0), backlog=2 * self.ranks) as server:
            port = server.getsockname()[1]
            environment = {**os.environ, **ENVIRONMENT, KEY: key}
            environment |= {name: value for name, value in ONE_HOST.items() if name not in os.environ}
            path = os.environ.get("PYTHONPATH")
            environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
            for name in ONE_HOST:  # rank 0's own links
                os.environ.setdefault(name, ONE_HOST[name])
            for rank in range(1, self.ranks):
                words = tempfile.TemporaryFile()  # noqa: SIM115 - kept until the rank has ended
                self._words.append(words)
                command = [sys.executable, "-m", "systems.common.torch_engine.parallel.rank"]
                command += ["--leader", f"{self.host}:{port}", "--rank", str(rank)]
                self._processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, env=environment, process_group=0
                    )
                )
            self._accept(server, key)
        self._wake = os.pipe()
        self._watchdog = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watchdog.start()

    def _accept(self, server: socket.socket, key: str) -> None:
        server.settimeout(0.1)
        found: dict[tuple[str, int], Wire] = {}
        deadline = time.monotonic() + CONNECT_S
        while len(found) < 2 * (self.ranks - 1):
            gone = next((r for r, process in enumerate(self._processes, 1) if process.poll() is not None), None)
            if gone is not None or time.monotonic() > deadline:
                self._fail(self._obituary(gone) if gone is not None else f"not all ranks connected within {CONNECT_S:.0f} s")
                raise RankError(self.failure)
            with contextlib.suppress(TimeoutError, EOFError, ValueError, AssertionError):
                connection, _ = server.accept()
                connection.settimeout(5.0)  # who connects speaks first
                wire = Wire(connection)
                hello = wire.receive_json()
                if not secrets.compare_digest(str(hello["key"]), key):
                    wire.close()
                    continue
                connection.settimeout(None)
                found[str(hello["purpose"]), int(hello["rank"])] = wire
        self.wires = [found["plans", rank] for rank in range(1, self.ranks)]
        self._leashes = [found["leash", rank] for rank in range(1, self.ranks)]

    # ---- messages

    def tell(self, **message: object) -> None:
        """Send all ranks a message. Raises RankError when one is gone."""
        with self.guard():
            for wire in self.wires:
                wire.send_json(**message)

    def broadcast(self, kind: bytes, payload: bytes | memoryview) -> None:
        """Send all ranks the same bytes. Raises OSError when one is gone (`guard` makes that a RankError)."""
        for wire in self.wires:
            wire.send(kind, payload)

    def answers(self) -> list[dict[str, object]]:
        """A message from each rank.

        Raises:
            InputError: what a rank found wrong with its input.
            RankError: a rank is gone.
        """
        with self.guard():
            found: list[dict[str, object]] = []
            for wire in self.wires:
                message = wire.receive_json()
                if error := message.get("error"):
                    self._ending = True
                    raise _input_error(error)
                found.append(message)
            return found

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around whatever needs the other ranks: what goes wrong because one is gone is raised as RankError.

        As InputError where that rank's last message says that its input was to blame.
        """
        if self.failure is not None:
            raise self._death(self.failure)
        self._waiting_since = time.monotonic()
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            # the watchdog sees the death itself a moment later; without one it is an error of this rank
            if isinstance(error, RankError) or not (self._failed.wait(2.0) or isinstance(error, (OSError, EOFError))):
                raise
            raise self._death(self.failure or f"a rank is gone: {error}") from error
        finally:
            self._waiting_since = None
        if self.failure is not None:
            raise self._death(self.failure)

    def _death(self, line: str) -> InputError | RankError:
        """The error to raise: the dead may have left a message."""
        for wire in self.wires:
            with contextlib.suppress(EOFError, OSError, ValueError, AssertionError):
                while select.select([wire.connection], [], [], 0)[0]:
                    if error := wire.receive_json().get("error"):
                        return _input_error(error)
        return RankError(line)

    # ---- death

    def _watch(self) -> None:
        assert self._wake is not None
        poll = select.poll()
        for leash in self._leashes:
            poll.register(leash.connection, select.POLLIN | select.POLLHUP)
        poll.register(self._wake[0], select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        if self._ending or self._wake[0] in ready:
            return
        rank = next(r for r, leash in enumerate(self._leashes, 1) if leash.connection.fileno() in ready)
        self._fail(self._obituary(rank))
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            if self._waiting_since is None:
                return
            time.sleep(0.05)  # not readiness: the last resort's delay
        print(self.failure, file=sys.stderr, flush=True)
        os._exit(70)

    def _obituary(self, rank: int) -> str:
        """How a rank ended, in one line with its last words."""
        process, words = self._processes[rank - 1], self._words[rank - 1]
        try:
            code = process.wait(2.0)
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        words.seek(0)
        lines = [line for line in words.read().decode(errors="replace").splitlines() if line.strip()]
        return f"rank {rank} of {self.ranks} died ({how})" + (f": {lines[-1].strip()[:300]}" if lines else "")

    def _fail(self, line: str) -> None:
        self.failure = line + "; all ranks have ended"
        self._kill()
        break_off()
        self._failed.set()
        if self.on_death is not None:
            self.on_death()

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)

    # ---- end

    def end(self, patience_s: float = 10.0, close_mine: Callable[[], None] = leave) -> None:
        """End all ranks: ask, then kill; rank 0 itself by `close_mine`. Safe to call twice, and called at exit."""
        atexit.unregister(self.end)
        self._ending = True
        if self.failure is None:
            with contextlib.suppress(OSError):
                for wire in self.wires:
                    wire.send_json(end=True)
            close_mine()
            deadline = time.monotonic() + patience_s
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()) if self.wires else 0.0)
        else:
            close_mine()
        self._kill()
        if self._wake is not None:
            os.write(self._wake[1], b"x")
            if self._watchdog is not None and self._watchdog is not threading.current_thread():
                self._watchdog.join(5.0)
            for end in self._wake:
                os.close(end)
            self._wake = None
        for wire in [*self.wires, *self._leashes]:
            wire.close()
        for words in self._words:
            words.close()
        self.wires, self._leashes, self._processes, self._words = [], [], [], []
