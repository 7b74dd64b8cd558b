"""The client: has a command run by the server, as if it ran here.

python -m harness.warm python -m MODULE ARGUMENT...
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

SOCKET = "FIVEFOLD_WARM"
PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Client:
    """One command, from request to exit status."""

    def __init__(self, server: socket.socket) -> None:
        self.server = server
        self.pid = 0
        self._early: list[int] = []

    def run(self, command: Sequence[str]) -> int:
        """The status of `command` as `subprocess` gives it: negative for a signal; 1 where the server is lost."""
        for passed_on in PASSED_ON:
            signal.signal(passed_on, self._signalled)
        told = json.dumps({"command": list(command), "folder": str(Path.cwd()), "environment": dict(os.environ)}).encode()
        socket.send_fds(self.server, [len(told).to_bytes(8, "big")], [0, 1, 2])
        self.server.sendall(told)
        answers = self.server.makefile("r")
        self.pid = int(answers.readline() or 0)
        for number in self._early:
            self._pass_on(number)
        status = answers.readline()
        if not status:
            sys.stderr.write(f"{' '.join(command[1:3])}: the process that started it was killed\n")
            self._pass_on(signal.SIGTERM)
        return int(status or 1)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self.pid:
            self._pass_on(number)
        else:
            self._early.append(number)

    def _pass_on(self, number: int) -> None:
        # Ctrl-C in a terminal reaches the job without us: twice would interrupt it while it tidies up
        early = number in self._early
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if self.pid and (number != signal.SIGINT or early or os.getpgid(self.pid) != os.getpgrp()):
                os.kill(self.pid, number)


def main(command: Sequence[str]) -> int:
    """Run `command`, here where there is no server."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(os.environ[SOCKET])
        except (OSError, KeyError):
            os.execvp(command[0], list(command))
        return Client(server).run(command)


def end(status: int) -> NoReturn:
    """End as the job did: with its status, or by the same signal."""
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    raise SystemExit(status)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
