"""Feeds a trainer's tasklets to the tuning lane, never more than a few ahead, and counts what has been trained.

Tasklets are launched by the host and run later: a pause holds only once those in flight have ended, so at most
`ahead` may be (sheet 2.3: the artifact's sleeps may only drain the launch queue).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from systems.llmstation.corun.fusing import Fuser
from systems.llmstation.corun.lanes import Lanes, Mark
from systems.llmstation.training import Sample, Tasklet, Trains

RUN_AHEAD = 3
"""Tasklets in flight at most: one that runs, and enough behind it to hide the host's launches."""


def group(phase: str) -> str:
    """The phase as planner and waits know it: the loss opens the backward phase, the optimizer's step closes it."""
    return "forward" if phase == "forward" else "backward"


@dataclass(slots=True)
class Ran:
    """A tasklet that was launched: its phase (`group`) and the marks around it."""

    phase: str
    begin: Mark
    end: Mark


@dataclass(frozen=True, slots=True)
class Upcoming:
    """What comes next: a phase (`group`) and how many of its tasklets are left."""

    phase: str
    left: int


class Tuner:
    """One tuning job.

    Attributes:
        launched: tasklets launched so far.
        length: tasklets of a sample.
        log: tasklets launched and not yet taken by `take`.
    """

    length: int

    def __init__(
        self, trainer: Trains, batches: Iterator[Any], plan: tuple[Tasklet, ...], lanes: Lanes, ahead: int = RUN_AHEAD
    ) -> None:
        """`batches` never ends: each is one sample (a `training.trainer.Batch`) with the tasklets of `plan`."""
        self.trainer, self.lanes, self.ahead = trainer, lanes, ahead
        self._backward = sum(group(tasklet.phase) == "backward" for tasklet in plan)
        self.launched = 0
        self.log: deque[Ran] = deque()
        self._batches = batches
        self._flying: deque[tuple[Mark, float]] = deque()
        self._samples = 0.0
        self._begin()

    def _begin(self) -> None:
        self._batch = next(self._batches)
        self._sample: Sample = self.trainer.steps(self._batch)
        self.length = self._left = self._sample.remaining
        assert self._left > 0, "a sample without tasklets"

    @property
    def upcoming(self) -> Upcoming:
        """The next tasklet's phase (`group`), and the tasklets of that phase still to come."""
        coming = self._sample.upcoming
        assert coming is not None
        phase = group(coming.phase)
        return Upcoming(phase, self._left if phase == "backward" else self._left - self._backward)

    @property
    def done_in_sample(self) -> int:
        """Tasklets of the sample under way that were launched; 0 between two samples."""
        return self.length - self._left

    @property
    def samples(self) -> float:
        """Samples trained so far, the begun one by its share of tasklets; those in flight do not count."""
        self.in_flight()
        return self._samples

    def in_flight(self) -> int:
        """Tasklets launched and not ended. Does not wait."""
        while self._flying and self._flying[0][0].done():
            self._samples += self._flying.popleft()[1]
        return len(self._flying)

    def launch(self) -> str:
        """Put the next tasklet on the tuning lane; its phase (`group`)."""
        phase = self.upcoming.phase
        # serving runs in inference mode, in which nothing can be trained
        with self.lanes.tuning(), torch.inference_mode(False), torch.enable_grad():
            begin = self.lanes.mark(tuning=True)
            next(self._sample)
            end = self.lanes.mark(tuning=True)
        self.log.append(Ran(phase, begin, end))
        self._flying.append((end, 1 / self.length))
        self.launched += 1
        self._left -= 1
        if not self._left:
            self._begin()
        return phase

    def fuse(self, fuser: Fuser, rows: int) -> torch.Tensor:
        """Run the whole forward phase of the coming sample inside a decode step, on the serving lane; the step's tokens.

        The lanes wait for each other: the step for tasklets before it, later ones for the step. `rows`: one of `fuser.sizes`.
        """
        assert not self.done_in_sample, "a sample is under way"
        forward = self.upcoming.left
        with self.lanes.serving(), torch.inference_mode(False), torch.no_grad():
            self.lanes.hold(self.lanes.mark(tuning=True))
            sample = fuser.steps(self._batch, rows)
            next(sample)
            end = self.lanes.mark(tuning=False)
            self.lanes.gate(end)
        self._sample = sample
        self._flying.append((end, forward / self.length))
        self.launched += forward
        self._left -= forward
        return sample.decoded.tokens

    def wait_for_room(self) -> None:
        """Wait until another tasklet may be launched."""
        while self.in_flight() >= self.ahead:
            self._flying[0][0].wait()

    def drain(self) -> None:
        """Wait for every tasklet in flight."""
        if self._flying:
            self._flying[-1][0].wait()
        self.in_flight()

    def take(self) -> list[Ran]:
        """The tasklets that have ended since the last call, oldest first."""
        ended = []
        while self.log and self.log[0].end.done():
            ended.append(self.log.popleft())
        return ended

    def losses(self) -> list[float]:
        """Loss of each finished step; waits for the GPU."""
        self.drain()
        return [float(loss) for loss in self.trainer.losses]
