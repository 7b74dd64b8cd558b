"""Which request is sent next. Pure: a queue sees which deployments could start now and names one request.

* `GlobalQueue` is the paper's: one queue for all models, and only its head is looked at. A head whose GPUs are busy holds up
  everybody behind it, also those whose GPUs are idle.
* `ModelQueues` has a queue per deployment. Heads are looked at by age; one that can't start keeps its GPUs for itself, so that
  a younger request never makes it wait longer. Whoever needs none of those GPUs goes ahead: nobody starves, idle GPUs work.

A GPU runs one request of one model at a time under both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

Gpus = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Queued:
    """A request that waits: `number` counts requests in the order of their arrival, `deployment` is whom it is for."""

    number: int
    deployment: str


class Queue(Protocol):
    """The order of requests. `gpus` maps each deployment that is ready to the GPUs that it runs on."""

    def push(self, request: Queued, front: bool = False) -> None:
        """Append a request; with `front` it goes before all others (`prior_inference`)."""

    def take(self, gpus: Mapping[str, Gpus], free: Callable[[int], bool]) -> Queued | None:
        """Remove and return the request to send now; None when none can start. `free` tells whether a GPU is idle."""

    def drop(self, deployment: str) -> list[Queued]:
        """Remove and return all requests for `deployment`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Queued]: ...


class GlobalQueue:
    """The paper's queue: strict order, head-of-line blocking."""

    def __init__(self) -> None:
        self._waiting: deque[Queued] = deque()

    def push(self, request: Queued, front: bool = False) -> None:
        """Append, or prepend."""
        (self._waiting.appendleft if front else self._waiting.append)(request)

    def take(self, gpus: Mapping[str, Gpus], free: Callable[[int], bool]) -> Queued | None:
        """The head, if its deployment is ready and all its GPUs are idle."""
        if self._waiting and all(map(free, gpus.get(self._waiting[0].deployment, (-1,)))):
            return self._waiting.popleft()
        return None

    def drop(self, deployment: str) -> list[Queued]:
        """All of one deployment."""
        gone = [request for request in self._waiting if request.deployment == deployment]
        self._waiting = deque(request for request in self._waiting if request.deployment != deployment)
        return gone

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Queued]:
        return iter(self._waiting)


class ModelQueues:
    """A queue per deployment; the oldest head first, and nobody in the way of an older one."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[tuple[int, Queued]]] = {}
        self._last, self._first = 0, 0

    def push(self, request: Queued, front: bool = False) -> None:
        """Append to the queue of its deployment, or prepend and count as the oldest of all."""
        queue = self._waiting.setdefault(request.deployment, deque())
        if front:
            self._first -= 1
            queue.appendleft((self._first, request))
        else:
            self._last += 1
            queue.append((self._last, request))

    def take(self, gpus: Mapping[str, Gpus], free: Callable[[int], bool]) -> Queued | None:
        """The oldest head that can start without a GPU that an older head waits for."""
        kept: set[int] = set()
        for name in sorted(
            (name for name, queue in self._waiting.items() if queue), key=lambda name: self._waiting[name][0][0]
        ):
            needs = gpus.get(name)
            if needs is None:  # not ready: it must not hold up others
                continue
            if all(gpu not in kept and free(gpu) for gpu in needs):
                return self._waiting[name].popleft()[1]
            kept.update(needs)
        return None

    def drop(self, deployment: str) -> list[Queued]:
        """All of one deployment."""
        return [request for _, request in self._waiting.pop(deployment, ())]

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Queued]:
        waiting = sorted((place, request.number, request) for queue in self._waiting.values() for place, request in queue)
        return iter([request for _, _, request in waiting])


QUEUES: Mapping[str, Callable[[], Queue]] = {"global": GlobalQueue, "per_model": ModelQueues}
