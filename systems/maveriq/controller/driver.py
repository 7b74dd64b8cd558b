"""The controller on a real clock: carries out what `core` decides, with engine processes. One asyncio loop, no threads.

`Controller` is the Python API: `register`, `deploy`, `inference`, `prior_inference`, `remove`, with the artifact's arguments.
Every engine is ended by `close`, by `remove`, or by its own death; nothing outlives the controller.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.maveriq.controller.core import Core, Death, Deployment, Ticket
from systems.maveriq.controller.engines import REQUEST_S, Engine, EngineDiedError, RequestFailedError, start
from systems.maveriq.controller.launch import Launcher
from systems.maveriq.controller.library import Library
from systems.maveriq.controller.memory import Memory, Nvml
from systems.maveriq.controller.profiling import Profiler
from systems.maveriq.search import Refusal, Wish

WINDOW_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request. `error` is empty when it was answered; times are seconds, `e2e_s` with queueing."""

    number: int
    deployment: str
    text: str
    e2e_s: float
    service_s: float
    tries: int
    error: str = ""


@dataclass
class Controller:
    """See the module. Use as `async with Controller(...) as controller`."""

    core: Core
    memory: Memory
    launcher: Launcher
    library: Library
    timeout_s: float = REQUEST_S
    profiler: Profiler | None = None
    records: list[Answer] = field(default_factory=list)
    _engines: dict[str, Engine] = field(default_factory=dict)
    _loads: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _ending: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _asked: dict[int, tuple[float, asyncio.Future[Answer]]] = field(default_factory=dict)
    _served: dict[int, deque[tuple[float, float]]] = field(default_factory=dict)
    _lost: dict[str, str] = field(default_factory=dict)
    _choosing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __aenter__(self) -> Controller:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def deploy(self, name: str, wish: Wish, wait: bool = True) -> Deployment | Refusal:
        """Choose a configuration and load its engine under `name`; with `wait`, return once it serves.

        Raises InputError for a name that is taken, a wish that means nothing, or an engine that does not start.
        """
        async with self._choosing:  # two decisions on one state of the node could choose the same memory
            states = await asyncio.to_thread(self.memory.states, self.busy)
            found = self.core.deploy(name, wish, states)
            if isinstance(found, Refusal):
                return found
            self.memory.charge(name, found.decision.placement)
        self._lost.pop(name, None)
        load = self._loads[name] = asyncio.create_task(self._load(name))
        if wait:
            await asyncio.wait({load})
            if load.cancelled() or name in self._lost:
                raise InputError("controller", "engine", name, self._lost.get(name, "was removed while it loaded"))
        return found

    async def inference(self, name: str, text: str, front: bool = False) -> Answer:
        """Queue a request and wait for its answer. Raises InputError when nobody of that name is deployed."""
        return await self.submit(name, text, front)[1]

    async def prior_inference(self, name: str, text: str) -> Answer:
        """The same, before all that wait."""
        return await self.inference(name, text, front=True)

    def submit(self, name: str, text: str, front: bool = False) -> tuple[Ticket, asyncio.Future[Answer]]:
        """Queue a request; its answer comes in the future, which never raises. Raises InputError as `inference`."""
        ticket = self.core.submit(name, text, front)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[ticket.number] = (time.monotonic(), future)
        self._pump()
        return ticket, future

    async def remove(self, name: str) -> int:
        """End a deployment; the requests that waited for it fail. Returns how many those were. Raises InputError if unknown."""
        lost = self.core.remove(name)
        for ticket in lost:
            self._settle(ticket, "", 0.0, f"{name} was removed")
        load = self._loads.pop(name, None)
        if load is not None:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        engine = self._engines.pop(name, None)
        if engine is not None:
            await engine.end()
        if name in self._ending:  # the one before, which died
            await asyncio.shield(self._ending[name])
        self.memory.release(name)
        self._pump()
        return len(lost)

    async def register(self, model: str, file: Path | None = None) -> int:
        """Take the fingerprints of `model` into the table of decisions; returns how many.

        From `file`, or measured now by the profiler (minutes, with GPUs to itself). The artifact's `register` writes a file
        that nobody reads. Raises InputError for an unusable file or one without `model`, and where measuring failed.
        """
        if file is None:
            if self.profiler is None:
                raise InputError("controller", "register", model, "there is no profiler here: give a file of fingerprints")
            file = await self.profiler.run(model)
        self.library, count = await asyncio.to_thread(self.library.having, model, file)
        self.core.search = self.library.search()
        return count

    def busy(self, gpu: int) -> float:
        """The share of the last 120 s in which `gpu` ran a request."""
        now = time.monotonic()
        spans = self._served.get(gpu, deque())
        while spans and spans[0][1] < now - WINDOW_S:
            spans.popleft()
        return min(1.0, sum(end - max(begin, now - WINDOW_S) for begin, end in spans) / WINDOW_S)

    def status(self) -> list[dict[str, Any]]:
        """Every deployment: state, configuration, GPUs, waiting requests, the engine's process."""
        waiting, running = self.core.waiting(), self.core.running()
        return [
            {
                "id": name,
                "state": one.state,
                "model": one.decision.wish.model,
                "configuration": asdict(one.decision.configuration),
                "pp_map": list(one.decision.placement.pp_map),
                "gpus": list(one.gpus),
                "gib_per_gpu": list(one.decision.placement.gib),
                "best_effort": one.decision.best_effort,
                "waiting": waiting.get(name, 0),
                "running": running.get(name),
                **_told(self._engines.get(name)),
            }
            for name, one in self.core.deployments.items()
        ]

    async def close(self) -> None:
        """Fail what waits, end every engine and the profiler, return when all have ended."""
        if self.profiler is not None:
            await self.profiler.close()
        await asyncio.gather(*(self.remove(name) for name in list(self.core.deployments)), return_exceptions=True)
        await asyncio.gather(*self._ending.values(), return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(engine.end() for engine in self._engines.values()), return_exceptions=True)
        self._engines.clear()

    async def _load(self, name: str) -> None:
        """Start the engine of `name`, as often as the core says; not before the one that died has given its memory back."""
        if name in self._ending:
            await asyncio.shield(self._ending[name])
        while (one := self.core.deployments.get(name)) is not None:
            try:
                engine = await start(self.launcher(one, self.memory.devices(one.gpus)))
            except EngineDiedError as error:
                if not self._after(name, self.core.died(name, f"engine of {name}: {error}")):
                    return
                continue
            self._engines[name] = engine
            if isinstance(self.memory, Nvml):
                self.memory.settled(name)
            self.core.ready(name)
            self._keep(self._mourn(name, engine))
            self._pump()
            return

    async def _mourn(self, name: str, engine: Engine) -> None:
        """Wait for the engine's end. An end that nobody asked for is a death; one during a request is seen there too."""
        await engine.ended.wait()
        self._dead(name, engine, f"engine of {name}: ended with {engine.process.returncode}")

    def _dead(self, name: str, engine: Engine, reason: str) -> None:
        if self._engines.get(name) is not engine:
            return  # removed, or known already
        del self._engines[name]
        self._ending[name] = asyncio.create_task(self._bury(name, engine))
        if self._after(name, self.core.died(name, reason)):
            self._loads[name] = asyncio.create_task(self._load(name))

    async def _bury(self, name: str, engine: Engine) -> None:
        try:
            await engine.end()
        finally:
            del self._ending[name]

    def _after(self, name: str, death: Death) -> bool:
        """Tell those who have failed; whether the engine is to be started again."""
        for ticket in death.failed:
            self._settle(ticket, "", 0.0, death.reason)
        if not death.restart:
            self._lost[name] = death.reason
            self.memory.release(name)
        self._pump()
        return death.restart

    def _pump(self) -> None:
        """Send whatever can be sent now."""
        while (ticket := self.core.take()) is not None:
            self._keep(self._run(ticket))

    async def _run(self, ticket: Ticket) -> None:
        name = ticket.deployment
        one, engine, begun = self.core.deployments[name], self._engines[name], time.monotonic()
        try:
            text, error = await engine.complete(ticket.text, one.decision.wish.output_length, self.timeout_s), ""
        except RequestFailedError as failure:
            text, error = "", str(failure)
        except EngineDiedError as failure:
            self._dead(name, engine, f"engine of {name}: {failure}")
            return
        finally:
            self._note(one.gpus, begun)
        if self.core.running().get(name) == ticket.number:  # else it was removed meanwhile, and has failed
            self.core.answered(ticket.number)
            self._settle(ticket, text, time.monotonic() - begun, error)
        self._pump()

    def _note(self, gpus: Sequence[int], begun: float) -> None:
        for gpu in gpus:
            self._served.setdefault(gpu, deque()).append((begun, time.monotonic()))

    def _settle(self, ticket: Ticket, text: str, service_s: float, error: str) -> None:
        asked_s, future = self._asked.pop(ticket.number, (time.monotonic(), None))
        answer = Answer(
            ticket.number, ticket.deployment, text, time.monotonic() - asked_s, service_s, ticket.tries, error
        )  # fmt: skip
        self.records.append(answer)
        if future is not None and not future.done():
            future.set_result(answer)

    def _keep(self, work: Any) -> None:  # noqa: ANN401 - any coroutine
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _told(engine: Engine | None) -> dict[str, Any]:
    """An engine, for `status`: its process, the real devices of its ranks, how long it loaded, what is not as decided."""
    if engine is None:
        return {"pid": None, "devices": [], "load_s": None, "differs": []}
    return {
        "pid": engine.pid,
        "devices": list(engine.launch.devices),
        "load_s": engine.load_s,
        "differs": list(engine.launch.differs),
    }
