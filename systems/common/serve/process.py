"""The engine's own process, so that HTTP never holds the interpreter that launches the engine's steps.

What runs in it is a function of the pipe's other end and of the settings: `run_engine` here; a system with an engine of its own
gives another one that speaks the same messages, and so has this package's HTTP half before it.

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
from typing import TYPE_CHECKING, Any

from systems.common.errors import InputError
from systems.common.serve.config import ServeConfig
from systems.common.serve.messages import Ended, Ready, Stop

if TYPE_CHECKING:
    from systems.common.serve.core import Inbox


SIGNALS = (signal.SIGINT, signal.SIGTERM)
Run = Callable[[Connection, Any], Ended]
"""Reports `Ready`, serves until `Stop`; what it returns or raises is the last report. Pickled, so a module's function."""


class EngineProcess:
    """The HTTP process's end. `connection` becomes readable with every report; use it as a context manager."""

    def __init__(self, config: Any, run: Run | None = None) -> None:  # noqa: ANN401  what `run` takes
        """Start the process, in which `run` (None: `run_engine`) loads the model and reports `Ready`, or `Ended`."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        resource_tracker.ensure_running()  # type: ignore[attr-defined]  # else `start` does it, and unblocks what is blocked here
        self._process = context.Process(target=_main, args=(theirs, config, run or run_engine), name="engine")
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

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def stop(self, limit_s: float) -> None:
        """Ask the engine to end, and wait so long for it."""
        self.send(Stop())
        self._process.join(limit_s)

    def send(self, command: object) -> None:
        """Say something (a `Command`, or what else `run` understands) to the engine; one that is gone hears nothing."""
        try:
            self.connection.send(command)
        except OSError:
            assert not self.connection.closed  # the pipe is broken: `receive` will say `Ended`

    def receive(self) -> Any:  # noqa: ANN401  what `run` reports
        """The next `Report`, or what else `run` reports; `Ended` when the process is gone without a word."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return Ended(f"its process ended with code {self._process.exitcode}")


def _main(connection: Connection, config: Any, run: Run) -> None:  # noqa: ANN401
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # ranks inherit it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        last = run(connection, config)
    except InputError as error:
        last = Ended(str(error), fault=error)
    except BaseException as error:
        last = Ended(f"{type(error).__name__}: {error}".splitlines()[0], trace=traceback.format_exc())
    with suppress(OSError):  # nobody is there any more to hear it
        connection.send(last)


def run_engine(connection: Connection, config: ServeConfig) -> Ended:
    """The engine that `config` describes, until it is told to end."""
    inbox: Inbox = SimpleQueue()
    listen(connection, inbox.put)
    from systems.common.serve.core import EngineLoop  # PyTorch
    from systems.common.serve.loading import engine
    from systems.common.torch_engine.parallel.cluster import RankError

    try:
        with engine(config) as live:
            loop = EngineLoop(live, connection.send, inbox)
            executor = live.executor
            adapters = tuple(executor.adapters.index) if executor.adapters is not None else ()
            vocab, dtype = executor.shape.vocab, executor.shape.dtype
            limits, longest, device = live.engine.config, executor.max_tokens, str(executor.device)
            connection.send(Ready(limits, longest, vocab, device, dtype, adapters, executor.choices))
            try:
                loop.run()
            except InputError as error:  # bad input is refused before: this one is a defect
                raise RuntimeError(str(error)) from error
    except RankError as error:  # one line says it all
        return Ended(str(error))
    return Ended()


def listen(connection: Connection, put: Callable[[Any], None]) -> None:
    """From now on pass on what comes, in a thread of its own; when the HTTP process is gone, be gone too."""
    threading.Thread(target=_pass_on, args=(connection, put), name="inbox", daemon=True).start()


def _pass_on(connection: Connection, put: Callable[[Any], None]) -> None:
    while True:
        try:
            put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)
