"""The engine's own process, so that HTTP never holds the interpreter that launches the engine's steps.

The pipe ties the two together: when the HTTP process ends, however, the pipe closes and this one ends at once. Signals
are the HTTP process's business (a service manager sends them to all).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING

from systems.common.errors import InputError
from systems.common.serve.config import ServeConfig
from systems.common.serve.messages import Command, Ended, Ready, Report, Stop

if TYPE_CHECKING:
    from systems.common.serve.core import Inbox


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EngineProcess:
    """The HTTP process's end. `connection` becomes readable with every report; use it as a context manager."""

    def __init__(self, config: ServeConfig) -> None:
        """Start the process; it loads the model and reports `Ready`, or `Ended`."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        resource_tracker.ensure_running()  # type: ignore[attr-defined]  # else `start` does it, and unblocks what is blocked here
        self._process = context.Process(target=_main, args=(theirs, config), name="engine", daemon=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: none ends the engine before it can ignore them
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        theirs.close()

    def __enter__(self) -> EngineProcess:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()

    def stop(self, limit_s: float) -> None:
        """Ask the engine to end, and wait so long for it."""
        self.send(Stop())
        self._process.join(limit_s)

    def send(self, command: Command) -> None:
        """Say something to the engine; one that is gone hears nothing."""
        try:
            self.connection.send(command)
        except OSError:
            assert not self.connection.closed  # the pipe is broken: `receive` will say `Ended`

    def receive(self) -> Report:
        """The next report; `Ended` when the process is gone without a word."""
        try:
            report: Report = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return Ended(f"its process ended with code {self._process.exitcode}")
        return report


def _main(connection: Connection, config: ServeConfig) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # ranks inherit it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        last = _run(connection, config)
    except InputError as error:
        last = Ended(str(error), fault=error)
    except BaseException as error:
        last = Ended(f"{type(error).__name__}: {error}".splitlines()[0], trace=traceback.format_exc())
    with suppress(OSError):  # nobody is there any more to hear it
        connection.send(last)


def _run(connection: Connection, config: ServeConfig) -> Ended:
    inbox: Inbox = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox.put), name="inbox", daemon=True).start()
    from systems.common.serve.core import EngineLoop  # PyTorch
    from systems.common.serve.loading import engine
    from systems.common.torch_engine.parallel.cluster import RankError

    try:
        with engine(config) as live:
            loop = EngineLoop(live, connection.send, inbox)
            executor = live.executor
            adapters = tuple(executor.adapters.index) if executor.adapters is not None else ()
            vocab, dtype = executor.shape.vocab, executor.shape.dtype
            connection.send(Ready(live.engine.config, executor.max_tokens, vocab, str(executor.device), dtype, adapters))
            try:
                loop.run()
            except InputError as error:  # bad input is refused before: this one is a defect
                raise RuntimeError(str(error)) from error
    except RankError as error:  # one line says it all
        return Ended(str(error))
    return Ended()


def _listen(connection: Connection, put: Callable[[Command], None]) -> None:
    """Pass on what comes; when the HTTP process is gone, be gone too."""
    while True:
        try:
            put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)
