"""What the samples of all trainers share: walking through their plan, one tasklet at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from systems.llmstation.training import Tasklet

P = ParamSpec("P")
R = TypeVar("R")


def quietly(work: Callable[P, R]) -> Callable[P, R]:
    """Run without autograd, and outside a serving loop's inference mode, whose tensors could not be trained."""

    @wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return work(*args, **kwargs)

    return wrapped


class Turn:
    """Whose step it is: a trainer has room for the gradients of one, so a step ends for good when the next begins."""

    def __init__(self) -> None:
        self._step = 0

    def begin(self) -> int:
        """The number of a new step."""
        self._step += 1
        return self._step

    def check(self, step: int) -> None:
        """Refuses a step that a newer one has replaced."""
        assert step == self._step, "another step of this trainer has begun since: one at a time"


class PlannedSample(ABC):
    """One training step under way (see `Sample`): runs its plan."""

    def __init__(self, plan: tuple[Tasklet, ...], turn: Turn) -> None:
        self._plan, self._turn = plan, turn
        self._at, self._step_number = 0, turn.begin()

    @property
    def upcoming(self) -> Tasklet | None:
        """See `Sample`."""
        return self._plan[self._at] if self._at < len(self._plan) else None

    @property
    def remaining(self) -> int:
        """See `Sample`."""
        return len(self._plan) - self._at

    def __iter__(self) -> Iterator[Tasklet]:
        return self

    def __next__(self) -> Tasklet:
        if (tasklet := self.upcoming) is None:
            raise StopIteration
        self._turn.check(self._step_number)
        self._run(tasklet)
        self._at += 1
        return tasklet

    @abstractmethod
    def _run(self, tasklet: Tasklet) -> None:
        """Launch one tasklet."""


class EagerSample(PlannedSample):
    """Runs each phase by the method of its name, kernel by kernel."""

    @quietly
    def _run(self, tasklet: Tasklet) -> None:
        {"forward": self._forward, "loss": self._loss, "backward": self._backward, "step": self._step}[tasklet.phase](tasklet)

    @abstractmethod
    def _forward(self, tasklet: Tasklet) -> None: ...

    @abstractmethod
    def _loss(self, tasklet: Tasklet) -> None: ...

    @abstractmethod
    def _backward(self, tasklet: Tasklet) -> None: ...

    @abstractmethod
    def _step(self, tasklet: Tasklet) -> None: ...
