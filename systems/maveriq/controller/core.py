"""The controller's state machine: pure. It hears what happened, keeps the books, and says what is to be done.

A deployment is `loading`, then `ready`; a request is waiting (in the queue), running, or has an outcome. Whoever drives it
(`driver`, or a test) reads clocks, talks to engines and measures memory.

When an engine dies, the request that it ran goes back to the front of the queue, once; a second death fails it, and the
engine, which that request is blamed for, is started again on the same GPUs. An engine that dies twice without a request to
blame (it will not start) is given up, and everything that waits for it fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from systems.common.errors import InputError
from systems.maveriq.controller.queues import GlobalQueue, Queue, Queued
from systems.maveriq.placement import GpuState
from systems.maveriq.search import Decision, Refusal, Search, Wish

LOADING, READY = "loading", "ready"
TRIES = 2
"""How often a request is sent before it fails, and an engine started that ends by itself."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model that is deployed under a name. `deaths` counts engines lost since it last served."""

    name: str
    decision: Decision
    state: str = LOADING
    deaths: int = 0

    @property
    def gpus(self) -> tuple[int, ...]:
        """Its GPUs; part i of the placement is on `gpus[i]`."""
        return self.decision.placement.gpus


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request. `tries` counts how often it has been sent."""

    number: int
    deployment: str
    text: str
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Death:
    """What an engine's death means: whether to start it again, what runs again, and who has failed for which reason."""

    restart: bool
    retried: tuple[Ticket, ...]
    failed: tuple[Ticket, ...]
    reason: str


@dataclass
class Core:
    """See the module. Every method either does all of what it says or raises InputError and changes nothing."""

    search: Search
    queue: Queue = field(default_factory=GlobalQueue)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    _tickets: dict[int, Ticket] = field(default_factory=dict)
    _running: dict[str, int] = field(default_factory=dict)
    _busy: set[int] = field(default_factory=set)
    _last: int = 0

    def deploy(self, name: str, wish: Wish, gpus: Sequence[GpuState]) -> Deployment | Refusal:
        """Choose and reserve; the caller loads the engine and then says `ready`. Raises InputError for a name that is taken."""
        if not name or any(letter.isspace() for letter in name):
            raise InputError("controller", "id", name, "use a name without spaces")
        if name in self.deployments:
            raise InputError("controller", "id", name, "is deployed already: remove it first, or use another name")
        decision = self.search.deploy(wish, gpus)
        if isinstance(decision, Refusal):
            return decision
        self.deployments[name] = Deployment(name, decision)
        return self.deployments[name]

    def ready(self, name: str) -> None:
        """Its engine serves."""
        self.deployments[name] = replace(self.deployments[name], state=READY)

    def submit(self, name: str, text: str, front: bool = False) -> Ticket:
        """Queue a request; `front` puts it before all others. Raises InputError when nobody of that name is deployed."""
        self._known(name)
        self._last += 1
        ticket = self._tickets[self._last] = Ticket(self._last, name, text)
        self.queue.push(Queued(ticket.number, name), front)
        return ticket

    def take(self) -> Ticket | None:
        """The request to send now, if there is one; its GPUs are busy until `answered` or `died`."""
        gpus = {name: one.gpus for name, one in self.deployments.items() if one.state == READY}
        found = self.queue.take(gpus, lambda gpu: gpu >= 0 and gpu not in self._busy)
        if found is None:
            return None
        ticket = self._tickets[found.number] = replace(self._tickets[found.number], tries=self._tickets[found.number].tries + 1)
        self._running[ticket.deployment] = ticket.number
        self._busy |= set(gpus[ticket.deployment])
        return ticket

    def answered(self, number: int) -> None:
        """A running request has its answer, good or bad; its GPUs are free."""
        name = self._tickets[number].deployment
        self._free(name)
        del self._tickets[number]
        self.deployments[name] = replace(self.deployments[name], deaths=0)

    def died(self, name: str, reason: str) -> Death:
        """The engine of `name` has ended by itself (or would not start)."""
        one, running = self.deployments[name], self._free(name)
        if running is None and one.deaths + 1 >= TRIES:
            lost = self._dropped(name)
            del self.deployments[name]
            return Death(False, (), lost, f"{reason}; given up after {TRIES} engines")
        self.deployments[name] = replace(one, state=LOADING, deaths=one.deaths + (running is None))
        if running is None:
            return Death(True, (), (), reason)
        if running.tries < TRIES:
            self.queue.push(Queued(running.number, name), front=True)
            return Death(True, (running,), (), reason)
        del self._tickets[running.number]
        return Death(True, (), (running,), f"{reason}; tried {running.tries} times")

    def remove(self, name: str) -> tuple[Ticket, ...]:
        """Forget a deployment; the requests that waited for it or ran on it have failed. Raises InputError if unknown."""
        self._known(name)
        running = self._free(name)
        lost = (() if running is None else (running,)) + self._dropped(name)
        if running is not None:
            del self._tickets[running.number]
        del self.deployments[name]
        return lost

    def waiting(self) -> Mapping[str, int]:
        """Requests in the queue, by deployment."""
        counts = dict.fromkeys(self.deployments, 0)
        for request in self.queue:
            counts[request.deployment] = counts.get(request.deployment, 0) + 1
        return counts

    def running(self) -> Mapping[str, int]:
        """The number of the request that each busy deployment runs."""
        return dict(self._running)

    def _known(self, name: str) -> None:
        if name not in self.deployments:
            have = ", ".join(sorted(self.deployments)) or "nothing"
            raise InputError("controller", "id", name, f"is not deployed: deploy it first (deployed: {have})")

    def _dropped(self, name: str) -> tuple[Ticket, ...]:
        return tuple(self._tickets.pop(request.number) for request in self.queue.drop(name))

    def _free(self, name: str) -> Ticket | None:
        """Its GPUs are idle again; the ticket that it ran, if any."""
        number = self._running.pop(name, None)
        if number is None:
            return None
        self._busy -= set(self.deployments[name].gpus)
        return self._tickets[number]
