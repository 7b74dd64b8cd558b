"""The node on a virtual clock: GPUs that run one request at a time, and the queue in front of them (2.10).

Two engines give the same numbers for the paper's queue (a test compares them):

* `Recursion`: under one global queue with head-of-line blocking the whole system is one recursion, a request at a time:
  start_i = max(arrival_i, start_(i-1) + POLL_S, when its GPUs are free).
* `Events`: an event loop around any queue of `controller.queues`, for the queue per model.

What lies between two requests: the controller polls every 10 ms and sends one request per poll; between a request's end and
the next start on its GPUs pass `HANDOVER_S` seconds (the reply is read, the flag is cleared, the next poll comes). The sheet
finds 5 ms away from saturation and 15 to 25 ms where queues never empty, by comparison with the authors' logs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from systems.maveriq.configuration import Floats
from systems.maveriq.controller.queues import QUEUES, Queue, Queued

POLL_S, HANDOVER_S = 0.010, 0.005
WINDOW_S, SAMPLE_S = 120, 1 / 6
"""A GPU's busy share is that of the last 120 one-second samples that saw it compute (2.9); NVML looks back 1/6 s to 1 s."""


@dataclass(frozen=True, slots=True)
class Host:
    """A deployment that serves: its GPUs, and how long it takes for one request."""

    gpus: tuple[int, ...]
    service_s: float


@dataclass(frozen=True, slots=True)
class Served:
    """What came of each request offered, in order: when it started and finished (seconds; NaN: never)."""

    start_s: Floats
    finish_s: Floats


@dataclass
class Node:
    """The GPUs: until when each is taken, and which samples saw it compute."""

    count: int
    free_s: list[float] = field(default_factory=list)
    _busy: list[bytearray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_s = [-math.inf] * self.count
        self._busy = [bytearray() for _ in range(self.count)]

    def run(self, gpus: Sequence[int], start_s: float, finish_s: float, free_s: float) -> None:
        """Take `gpus` from `start_s`; they compute until `finish_s` and are free at `free_s`."""
        first, last = math.ceil(start_s), int(finish_s + SAMPLE_S)
        for gpu in gpus:
            self.free_s[gpu] = free_s
            seconds = self._busy[gpu]
            if len(seconds) <= last:
                seconds.extend(bytes(max(0, last + 1 - len(seconds))))
            for second in range(first, last + 1):
                seconds[second] = 1

    def busy(self, gpu: int, now_s: float) -> float:
        """The share of the last 120 one-second samples that saw `gpu` compute."""
        return sum(self._busy[gpu][max(0, int(now_s) - WINDOW_S) : max(0, int(now_s))]) / WINDOW_S


class Engine(Protocol):
    """A node that is offered requests in the order of their arrival."""

    node: Node

    def host(self, deployment: int, host: Host) -> None:
        """Let `deployment` serve from now on."""

    def offer(self, arrival_s: float, deployment: int) -> None:
        """A request arrives; one for a deployment that does not serve is dropped."""

    def advance(self, now_s: float) -> None:
        """Everything that starts before `now_s` has started."""

    def served(self) -> Served:
        """Let all work end; what came of every request."""


class Recursion:
    """The paper's queue in closed form."""

    def __init__(self, gpus: int, handover_s: float = HANDOVER_S) -> None:
        self.node, self._handover_s = Node(gpus), handover_s
        self._hosts: dict[int, Host] = {}
        self._polled_s = -math.inf
        self._start, self._finish = list[float](), list[float]()

    def host(self, deployment: int, host: Host) -> None:
        """Let it serve."""
        self._hosts[deployment] = host

    def offer(self, arrival_s: float, deployment: int) -> None:
        """Start and finish follow at once from what is known of those before."""
        host = self._hosts.get(deployment)
        if host is None:
            self._start.append(math.nan)
            self._finish.append(math.nan)
            return
        free_s = self.node.free_s
        start_s = max(arrival_s, self._polled_s + POLL_S, max(free_s[gpu] for gpu in host.gpus))
        finish_s = start_s + host.service_s
        self._polled_s = start_s
        self.node.run(host.gpus, start_s, finish_s, finish_s + self._handover_s)
        self._start.append(start_s)
        self._finish.append(finish_s)

    def advance(self, now_s: float) -> None:
        """Nothing is pending: all that arrived has its times."""

    def served(self) -> Served:
        """All of it."""
        return Served(np.array(self._start), np.array(self._finish))


class Events:
    """An event loop around any queue: at each arrival, each release of GPUs and each poll the queue is asked once."""

    def __init__(self, gpus: int, queue: Queue, handover_s: float = HANDOVER_S) -> None:
        self.node, self._queue, self._handover_s = Node(gpus), queue, handover_s
        self._hosts: dict[int, Host] = {}
        self._gpus: dict[str, tuple[int, ...]] = {}
        self._wakes: list[float] = []
        self._polled_s = self._now_s = -math.inf
        self._start, self._finish = list[float](), list[float]()

    def host(self, deployment: int, host: Host) -> None:
        """Let it serve."""
        self._hosts[deployment] = host
        self._gpus[str(deployment)] = host.gpus

    def offer(self, arrival_s: float, deployment: int) -> None:
        """Queue a request, after everything that happens before it."""
        self.advance(arrival_s)
        number = len(self._start)
        self._start.append(math.nan)
        self._finish.append(math.nan)
        if deployment in self._hosts:
            self._queue.push(Queued(number, str(deployment)))
            self._ask(arrival_s)

    def advance(self, now_s: float) -> None:
        """Run every wake before `now_s`."""
        while self._wakes and self._wakes[0] < now_s:
            self._ask(heapq.heappop(self._wakes))

    def _ask(self, now_s: float) -> None:
        """Send one request, if there is one to send now."""
        if now_s < self._polled_s + POLL_S:
            self._wake(self._polled_s + POLL_S)
            return
        request = self._queue.take(self._gpus, lambda gpu: self.node.free_s[gpu] <= now_s) if len(self._queue) else None
        if request is None:
            return
        host = self._hosts[int(request.deployment)]
        finish_s = now_s + host.service_s
        free_s = finish_s + self._handover_s
        self._polled_s = now_s
        self.node.run(host.gpus, now_s, finish_s, free_s)
        self._start[request.number], self._finish[request.number] = now_s, finish_s
        self._wake(free_s)
        if len(self._queue):
            self._wake(now_s + POLL_S)

    def _wake(self, at_s: float) -> None:
        if at_s not in self._wakes[:4]:
            heapq.heappush(self._wakes, at_s)

    def served(self) -> Served:
        """Let all work end."""
        self.advance(math.inf)
        return Served(np.array(self._start), np.array(self._finish))


def engine(discipline: str, gpus: int, handover_s: float = HANDOVER_S) -> Engine:
    """The engine for a queue of `controller.queues.QUEUES`."""
    return Recursion(gpus, handover_s) if discipline == "global" else Events(gpus, QUEUES[discipline](), handover_s)
