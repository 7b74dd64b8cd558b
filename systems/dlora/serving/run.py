"""The manager's process: start the replicas, manage them, end them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

from systems.common.errors import InputError
from systems.common.serve.messages import Ended, Ready, Stop
from systems.common.serve.process import EngineProcess, listen
from systems.dlora.serving.control import Control
from systems.dlora.serving.engine import Start
from systems.dlora.serving.engine import run as run_replica
from systems.dlora.serving.file import ServerFile
from systems.dlora.serving.manager import HTTP, SOLVER, Manager, NobodyLeftError
from systems.dlora.serving.solver import Solver

END_S = 3.0
"""How long idle replicas may take to end."""
Inbox = SimpleQueue[tuple[int, Any]]
"""Messages, with who sent them."""


def run(connection: Connection, given: ServerFile) -> Ended:
    """Start the replicas, manage them until told to end. Raises InputError for what a replica finds to be mended."""
    inbox: Inbox = SimpleQueue()
    listen(connection, lambda message: inbox.put((HTTP, message)))
    with ExitStack() as stack:
        engines = [stack.enter_context(EngineProcess(Start(given, i), run_replica)) for i in range(given.replicas)]
        solver = None
        if given.migrates:
            solver = stack.enter_context(Solver(lambda answer: inbox.put((SOLVER, answer))))
        for index, engine in enumerate(engines):
            threading.Thread(target=_hear, args=(engine, index, inbox), name=f"replica {index}", daemon=True).start()
        ready, early = _ready(inbox, len(engines))
        if isinstance(ready, Ended):
            return ready
        hosts = given.hosts()
        control = Control(given.names, hosts, given.slots, given.max_num_seqs, given.migration_kind, given.migration.rules)
        blocks = [one.config.num_gpu_blocks for one in ready]
        manager = Manager(control, engines, blocks, connection.send, solver)
        connection.send(_together(ready, manager, engines, given))
        for source, message in early:
            inbox.put((source, message))
        ended = _serve(manager, inbox)
        for engine in engines:
            engine.send(Stop())
        limit_s = time.monotonic() + END_S
        for engine in engines:
            engine.stop(max(0.0, limit_s - time.monotonic()))
        return ended


def _hear(engine: EngineProcess, index: int, inbox: Inbox) -> None:
    """Pass on what a replica reports, up to its end."""
    while True:
        report = engine.receive()
        inbox.put((index, report))
        if isinstance(report, Ended):
            return


def _ready(inbox: Inbox, count: int) -> tuple[list[Ready] | Ended, list[tuple[int, Any]]]:
    """What the replicas say once all serve, or the end of the first that did not; and what else came meanwhile."""
    ready: dict[int, Ready] = {}
    early: list[tuple[int, Any]] = []
    while len(ready) < count:
        source, message = inbox.get()
        if isinstance(message, Ready):
            ready[source] = message
        elif isinstance(message, Ended):
            if message.fault is not None:
                raise message.fault
            return Ended(f"replica {source}: {message.reason}", trace=message.trace), early
        elif isinstance(message, Stop):
            return Ended(), early
        else:
            early.append((source, message))
    return [ready[index] for index in range(count)], early


def _together(ready: Sequence[Ready], manager: Manager, engines: Sequence[EngineProcess], given: ServerFile) -> Ready:
    """All replicas as one engine; each has as much room as the smallest."""
    if len({one.device.partition(":")[0] for one in ready}) > 1:
        found = sum(one.device.startswith("cuda") for one in ready)
        raise InputError("serve", "replicas", len(ready), f"there are GPUs for {found} of them: start fewer, or all on the cpu")
    least = min(ready, key=lambda one: one.config.num_gpu_blocks)
    about: list[Mapping[str, object]] = [
        {"pid": engine.pid, "adapters": manager.control.names(index), **one.about}
        for index, (engine, one) in enumerate(zip(engines, ready, strict=True))
    ]
    most = min(one.max_tokens for one in ready)
    return Ready(least.config, most, least.vocab, least.device, least.dtype, tuple(given.names), {"replicas": about})


def _serve(manager: Manager, inbox: Inbox) -> Ended:
    while True:
        try:
            source, message = inbox.get(timeout=manager.until_look_s())
        except Empty:
            manager.look()
            continue
        if isinstance(message, Stop):
            return Ended()
        try:
            manager.handle(source, message)
        except NobodyLeftError:
            return Ended("no replica is left")
        if manager.until_look_s() == 0.0:
            manager.look()
