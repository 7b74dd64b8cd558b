"""The server: imports libraries, forks itself for every job, tells clients how their jobs ended.

    python -m harness.warm.server DESCRIPTOR        (a listening socket)

It ends when its stdin does, which Snakemake holds open, and its jobs with it. It has one thread. Nothing is imported before a
job needs it, or may.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

EVERY = ("numpy", "yaml", "pydantic", "tqdm.std", "pyarrow", "pyarrow.parquet")
"""What every job needs."""
DRAWING = ("pandas", "matplotlib.backends.backend_pdf", "matplotlib.figure", "matplotlib.style", "fontTools.subset")
NEEDED = {"harness.draw": DRAWING, "harness.fidelity": DRAWING}
"""What all jobs of a module need besides: imported for the first one."""
PERHAPS = {"harness.series": ("scipy.optimize", "scipy.sparse")}
"""What some jobs of a module need: imported after the first one, while there is nothing else to do."""
PATIENCE_S = 10.0
"""For the rest of a request that has begun; it comes from this machine."""


class Request(NamedTuple):
    """What a client asks for: `python -m MODULE ARGUMENTS` with its own files, folder and environment."""

    command: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    files: Sequence[int]


class Server:
    """Who waits for what. `serve` gives a request in the process that is to run it, and None when all is over."""

    def __init__(self, listening: socket.socket, life: int = 0) -> None:
        """`life`: the descriptor whose end is the server's end."""
        self.listening, self.life = listening, life
        self.clients: dict[int, socket.socket] = {}
        """By the process of their job."""
        self.ending: set[int] = set()
        """Jobs that were told to end; a second time would interrupt them while they tidy up."""
        self.later: deque[str] = deque()
        """Libraries to import when there is time."""
        self.events = selectors.DefaultSelector()
        self.wake, woken = socket.socketpair()
        for end in (self.wake, woken):
            end.setblocking(False)
        self._woken = woken
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the jobs; Snakemake ends us when it ends
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        for what in (self.life, self.listening, self.wake):
            self.events.register(what, selectors.EVENT_READ)

    def serve(self) -> Request | None:
        """Answer requests until Snakemake ends; in the processes of jobs, the request."""
        while True:
            for key, _ in self.events.select(0 if self.later else None):
                if key.fileobj == self.life:
                    self._end()
                    return None
                if key.fileobj is self.listening:
                    if request := self._accept():
                        return request
                elif key.fileobj is self.wake:
                    with contextlib.suppress(BlockingIOError):
                        self.wake.recv(4096)
                    self._reap()
                else:
                    self._lost(key.data)
            if self.later:
                load(self.later.popleft())

    def _accept(self) -> Request | None:
        client, _ = self.listening.accept()
        client.settimeout(PATIENCE_S)
        files: list[int] = []
        try:
            size, files, _, _ = socket.recv_fds(client, 8, 3)
            told = json.loads(client.makefile("rb").read(int.from_bytes(size, "big")))
            request = Request(told["command"], told["folder"], told["environment"], files)
            module = request.command[2]
        except (OSError, ValueError, LookupError):  # it was killed meanwhile
            client.close()
            for file in files:
                os.close(file)
            return None
        for library in (*EVERY, *NEEDED.get(module, ())):
            load(library)
        self.later.extend(library for library in PERHAPS.get(module, ()) if library not in sys.modules)
        gc.freeze()  # so that collecting garbage in a job does not copy what it shares with the others
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of a thread of pyarrow's allocator
            pid = os.fork()
        if not pid:
            self._become_job(client)
            return request
        for file in files:
            os.close(file)
        self.clients[pid] = client
        self.events.register(client, selectors.EVENT_READ, pid)
        self._tell(pid, pid)
        return None

    def _become_job(self, client: socket.socket) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.events.close()
        for end in (self.wake, self._woken, self.listening, client, *self.clients.values()):
            end.close()

    def _tell(self, pid: int, number: int) -> None:
        with contextlib.suppress(OSError):
            self.clients[pid].sendall(f"{number}\n".encode())

    def _reap(self) -> None:
        """Tell clients whose jobs have ended, and how."""
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._tell(pid, os.waitstatus_to_exitcode(status))
            client = self.clients.pop(pid)
            with contextlib.suppress(KeyError, ValueError):  # lost before
                self.events.unregister(client)
            client.close()

    def _lost(self, pid: int) -> None:
        """A client was killed: its job ends."""
        if pid in self.clients:
            self.events.unregister(self.clients[pid])
            os.kill(pid, signal.SIGTERM)  # not waited for yet, so it is still this process
            self.ending.add(pid)

    def _end(self) -> None:
        signal.set_wakeup_fd(-1)
        for pid in self.clients.keys() - self.ending:
            os.kill(pid, signal.SIGTERM)
        for pid in self.clients:
            self._tell(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def load(module: str) -> None:
    """Import a library, if it is there."""
    with contextlib.suppress(Exception):
        importlib.import_module(module)


def run(request: Request) -> None:
    """Run the module that `request` names, in this process, as if it had been started for that."""
    for place, file in enumerate(request.files):
        os.dup2(file, place)
        os.close(file)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    python, option, module, *arguments = request.command
    assert option == "-m", request.command
    sys.orig_argv = [python, option, module, *arguments]
    sys.path[0] = request.folder
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main(argv: Sequence[str]) -> None:
    """Serve on the socket that `argv` names; it is in a folder of its own, which ends with the server."""
    listening = socket.socket(fileno=int(argv[0]))
    place = Path(listening.getsockname())
    request = Server(listening).serve()
    if request is not None:
        run(request)
    else:
        shutil.rmtree(place.parent, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
