"""Co-run slowdowns of two streams of one process: serving of high priority, tuning beside it.

The engine and its driver serve; every step and tasklet lies between two events. Tuning either never pauses, or some tasklets
are launched at the start of each decode step, as a planner does it. With green contexts the tuning stream has some SMs only.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from systems.common.core import Request
from systems.common.hardware.interference import GREEN, STEADY, STREAMS
from systems.llmstation.calibrate.rows import Row, of_limit, of_steps
from systems.llmstation.corun.beside import Beside
from systems.llmstation.corun.lanes import lanes_of
from systems.llmstation.corun.observed import Step
from systems.llmstation.corun.pace import Counted, Pace, Waiting
from systems.llmstation.corun.session import Session, make_trainer
from systems.llmstation.modes import FixedMode

PLANNED = 6
"""Tasklets beside each decode step where they are planned; every fourth step runs without, as the planner's profile does."""
SKIPPED = 3
"""Steps at a run's start that are not counted."""
MOST_S = 60.0
TOKEN_S = 25e-6
"""Roughly a prompt's token on an H200: prompts come far enough apart to be served one by one beside tuning."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured per point.

    Attributes:
        context: tokens of a decoding sequence when it begins to decode.
        steps, alone_steps: decode steps with tuning beside, and without.
        prompts, alone_prompts: prompts likewise.
        samples: tuning samples alone.
    """

    context: int = 256
    steps: int = 96
    alone_steps: int = 24
    prompts: int = 16
    alone_prompts: int = 8
    samples: int = 4


TINY = Effort(16, 16, 8, 6, 5, 3)
"""For a CPU."""


class Sharing:
    """One session, whose trainer and lanes are exchanged between measurements.

    Attributes:
        tasklet_s: a tasklet of each phase alone and unlimited, by tokens of the sample.
        alone_s: steps alone, by serving phase and size.
    """

    def __init__(self, held: Session, effort: Effort) -> None:
        assert held.trainer is not None
        self.held, self.effort = held, effort
        self.tasklet_s: dict[int, dict[str, float]] = {}
        self.alone_s: dict[tuple[str, int], float] = {}
        self._limit, self._way = 1.0, STEADY

    def tune(self, tokens: int) -> None:
        """From now on tune samples of `tokens` on all SMs."""
        held = self.held
        if held.wanted.tuning_tokens != tokens or held.wanted.sms is not None:
            held.trainer = None  # its memory first
            if held.wanted.sms is not None:
                held.lanes = lanes_of(torch.device(held.wanted.device))
            held.wanted = replace(held.wanted, tuning_tokens=tokens, sms=None)
            self._renew()
        self._limit, self._way = 1.0, STEADY
        if tokens not in self.tasklet_s:
            self.tasklet_s[tokens] = self._tasklets_alone()

    def limit(self, sms: int, of: int) -> list[Row]:
        """From now on tune on `sms` of the GPU's SMs; rows that say what that alone does.

        Raises RuntimeError where the driver gives no such limit.
        """
        held = self.held
        lanes = lanes_of(torch.device(held.wanted.device), sms)
        if notes := getattr(lanes, "notes", ()):
            raise RuntimeError("; ".join(notes))
        held.lanes, held.trainer = lanes, None
        held.wanted = replace(held.wanted, sms=sms)
        self._renew()
        self._limit, self._way = sms / of, GREEN
        tokens = held.wanted.tuning_tokens
        return of_limit(self.tasklet_s[tokens], self._tasklets_alone(), tokens, self._limit, self._way)

    def _renew(self) -> None:
        held = self.held
        held.trainer = make_trainer(held.wanted.shape, held.weights, held.wanted)
        held.warm_trainer()

    def rows(self, serving: tuple[str, int], planned: bool = False) -> list[Row]:
        """Rows of one serving phase and size beside the tuning that is set, which never pauses unless it is `planned`."""
        phase, size = serving
        if serving not in self.alone_s:
            steps = self._steps(Counted(0), *self._requests(phase, size, alone=True))
            self.alone_s[serving] = statistics.median(step.took_s for step in steps)
        pace: Pace = Counted(PLANNED, pause=4) if planned else Waiting(FixedMode())
        steps = self._steps(pace, *self._requests(phase, size, alone=False))
        tokens = self.held.wanted.tuning_tokens
        layers = self.held.wanted.shape.layers
        way = STREAMS if planned else self._way
        return of_steps(serving, self.alone_s[serving], steps, self.tasklet_s[tokens], tokens, layers, self._limit, way)

    def _requests(self, phase: str, size: int, alone: bool) -> tuple[list[Request], bool]:
        """What to serve, and whether its steps are decode steps."""
        effort, most = self.effort, self.held.executor.max_tokens
        if phase == "decode":
            steps = min(effort.alone_steps if alone else effort.steps, most - effort.context)
            return [Request(i, 0.0, effort.context, steps) for i in range(size)], True
        apart_s = max(0.02, 3 * size * TOKEN_S)
        count = effort.alone_prompts if alone else effort.prompts
        return [Request(i, apart_s * i, size, 1) for i in range(count)], False

    def _steps(self, pace: Pace, requests: Sequence[Request], decode: bool) -> list[Step]:
        """The steps of the kind that is wanted, but for the first."""
        steps: list[Step] = []
        beside = Beside(self.held.lanes, self.held.tuner(), pace)
        beside.seen.append(steps.append)
        self.held.colocated(beside).serve(requests, MOST_S)
        assert beside.tuner is not None
        beside.tuner.drain()
        wanted = [step for step in steps if (step.place is not None) == decode]
        return wanted[min(SKIPPED, len(wanted) - 1) :]

    def _tasklets_alone(self) -> dict[str, float]:
        tuner = self.held.tuner()
        while tuner.launched < (self.effort.samples + 1) * tuner.length:
            tuner.wait_for_room()
            tuner.launch()
        tuner.drain()
        by_phase: dict[str, list[float]] = {}
        for ran in tuner.take()[tuner.length :]:
            by_phase.setdefault(ran.phase, []).append(ran.end.after_s(ran.begin))
        return {phase: statistics.median(times) for phase, times in by_phase.items()}


def slowdowns(sharing: Sharing, tokens: int, points: Iterable[tuple[str, int]]) -> Iterator[list[Row]]:
    """The rows of each point beside samples of `tokens` on all SMs: steady tuning, and planned tuning for decode steps."""
    sharing.tune(tokens)
    for point in points:
        yield sharing.rows(point) + (sharing.rows(point, planned=True) if point[0] == "decode" else [])
