"""Who decides whether the next tasklet may be launched. Pure but for the times that callers pass in.

The driver tells a pace what happens (`step`, `launched`, `idle`) and asks `may` before every tasklet; it asks `start_s` when a
prompt has come to an idle engine. The decisions themselves are those of the simulated driver: planner, modes and
baselines are the same objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from systems.common.engine.sequence import Sequence
from systems.llmstation.baselines.fineinfer import FineInfer
from systems.llmstation.corun.observed import Observed, Place
from systems.llmstation.modes import FeedbackMode, FixedMode, PlannerMode
from systems.llmstation.planner import plan_fused, plan_overlapped

ALONE = 1 << 30


class Pace(Protocol):
    """See the module."""

    gated: bool
    """Whether tasklets launched after a step belong to it and wait for its start."""

    def step(self, place: Place | None, phase: str, left: int) -> None:
        """A step is about to be launched: a decode step in `place`, or one with prompts (None).

        The next tasklet is of `phase`, of which `left` are to come.
        """
        ...

    def fuses(self, place: Place) -> bool:
        """After `step` for a decode step in `place`, between two samples: whether it takes a forward phase along."""
        ...

    def launched(self, phase: str, done_in_sample: int, now_s: float) -> None:
        """A tasklet of `phase` was launched; `done_in_sample` says how many of its sample were (0: it was the last)."""
        ...

    def may(self, now_s: float, in_flight: int, serving: bool, done_in_sample: int) -> bool:
        """Whether a tasklet may be launched now. `serving`: some request is unfinished or held back."""
        ...

    def start_s(self, arrival_s: float, now_s: float, busy: bool) -> float:
        """A prompt came at `arrival_s` to an idle engine: when to look again (`now_s` or earlier: serve it).

        `busy`: a sample is under way.
        """
        ...


class Quiet:
    """No tuning at all."""

    gated = False

    def step(self, place: Place | None, phase: str, left: int) -> None:
        """Nothing."""

    def fuses(self, place: Place) -> bool:
        """Never."""
        return False

    def launched(self, phase: str, done_in_sample: int, now_s: float) -> None:
        """Nothing."""

    def may(self, now_s: float, in_flight: int, serving: bool, done_in_sample: int) -> bool:
        """Never."""
        return False

    def start_s(self, arrival_s: float, now_s: float, busy: bool) -> float:
        """At once."""
        return now_s


class Counted(Quiet):
    """So many tasklets beside every decode step, every `pause`-th without any: what profiles and benchmarks run."""

    gated = True

    def __init__(self, tasklets: int, pause: int = 0) -> None:
        self.tasklets, self.pause = tasklets, pause
        self._quota, self._steps = 0, 0

    def step(self, place: Place | None, phase: str, left: int) -> None:
        """The same number beside every decode step, none beside prompts."""
        self._steps += place is not None
        silent = place is None or (self.pause and self._steps % self.pause == 0)
        self._quota = 0 if silent else min(self.tasklets, left)

    def launched(self, phase: str, done_in_sample: int, now_s: float) -> None:
        """One less."""
        self._quota -= 1

    def may(self, now_s: float, in_flight: int, serving: bool, done_in_sample: int) -> bool:
        """While the step's number lasts."""
        return serving and self._quota > 0


class Planned(Quiet):
    """The planner (paper 4.3): before every decode step as many tasklets as keep it within the target; none beside prompts.

    The first step in a new place runs alone, and now and then one later, so that l_d0 is measured and stays true.
    """

    gated = True

    def __init__(self, mode: PlannerMode, observed: Observed) -> None:
        self.mode, self.observed = mode, observed
        self.plans: list[int] = []
        """Tasklets planned for each decode step."""
        self._quota, self._alone = 0, False

    def step(self, place: Place | None, phase: str, left: int) -> None:
        """Plan for a decode step with what is known of its latencies."""
        self._quota = 0
        if place is None:
            return
        if not (alone := self.observed.alone_is_due(place)):
            latencies = self.observed.lookup(place, phase)
            self._quota = plan_overlapped(latencies, self.observed.layers, self.mode.target_s, left)
        self._alone = alone
        self.plans.append(self._quota)

    def fuses(self, place: Place) -> bool:
        """Where all layers may be fused (see `plan_fused`); nothing else runs beside such a step then."""
        observed = self.observed
        if not self.mode.fused or self._alone or (took_s := observed.fused(place)) is None:
            return False
        layers, alone_s = observed.layers, observed.alone_s[place] / observed.layers
        if plan_fused(alone_s, took_s / layers, layers, self.mode.target_s, layers) < layers:
            return False
        self._quota, self.plans[-1] = 0, layers
        return True

    def launched(self, phase: str, done_in_sample: int, now_s: float) -> None:
        """One less."""
        self._quota -= 1

    def may(self, now_s: float, in_flight: int, serving: bool, done_in_sample: int) -> bool:
        """While the plan lasts, or nothing is served."""
        return not serving or self._quota > 0


class Waiting(Quiet):
    """The artifact's waits: after every so many tasklets of a phase, while anything is served, a pause.

    The pause counts from the end of the tasklets in flight, so that the GPU really pauses.
    """

    def __init__(self, mode: FixedMode) -> None:
        self.mode = mode
        self._issued = False
        self._pause_s = 0.0
        self._until_s = -math.inf
        self._of_phase, self._count = "", 0

    def step(self, place: Place | None, phase: str, left: int) -> None:
        """An iteration was issued."""
        self._issued = True

    def launched(self, phase: str, done_in_sample: int, now_s: float) -> None:
        """Pause after the right tasklet, if an iteration was issued since the last pause or boundary."""
        self._count = self._count + 1 if phase == self._of_phase else 1
        self._of_phase = phase
        forward = phase == "forward"
        every = self.mode.forward_tasklets if forward else self.mode.backward_tasklets
        if self._issued and self._count % every == 0:
            self._pause_s = self.mode.forward_wait_s if forward else self.mode.backward_wait_s
        self._issued = False

    def may(self, now_s: float, in_flight: int, serving: bool, done_in_sample: int) -> bool:
        """Not during a pause, which ends early when nothing is served any more."""
        if not serving:
            self._pause_s, self._until_s = 0.0, -math.inf
        if self._pause_s and not in_flight:
            self._until_s, self._pause_s = now_s + self._pause_s, 0.0
        return not self._pause_s and now_s >= self._until_s


class Steered(Waiting):
    """Waits that follow the P99 latencies of the last window of finished requests."""

    def __init__(self, mode: FeedbackMode) -> None:
        """`watch` must be called before serving starts."""
        super().__init__(mode.waits)
        self.feedback = mode
        self._finished: Callable[[], list[Sequence]] = list
        self._seen = 0

    def watch(self, finished: Callable[[], list[Sequence]]) -> None:
        """Steer by the sequences that ended so far, which `finished` gives, oldest first."""
        self._finished = finished

    def step(self, place: Place | None, phase: str, left: int) -> None:
        """Look at what has finished, then as `Waiting`."""
        super().step(place, phase, left)
        ended = self._finished()
        if len(ended) < self._seen + self.feedback.window:
            return
        records = [sequence.record() for sequence in ended[self._seen :]]
        self._seen = len(ended)
        tpots_s = [record.tpot_s for record in records if record.request.output_tokens > 1]
        tpot_s = float(np.percentile(tpots_s, 99)) if tpots_s else 0.0
        self.feedback = self.feedback.adjusted(float(np.percentile([record.ttft_s for record in records], 99)), tpot_s)
        self.mode = self.feedback.waits


class Exclusive(Quiet):
    """FineInfer: samples begin only while nothing is served and no prompt has been held back for long enough; none is cut."""

    def __init__(self, policy: FineInfer) -> None:
        self.policy = policy
        self._closed = False

    def may(self, now_s: float, in_flight: int, serving: bool, done_in_sample: int) -> bool:
        """A begun sample always goes on; a new one begins while the engine is idle or holds a prompt back."""
        if done_in_sample:
            return True
        return not serving and not self._closed

    def start_s(self, arrival_s: float, now_s: float, busy: bool) -> float:
        """Hold the prompt back for `defer_s`, then until the sample under way has ended, looking every 5 ms."""
        at_s = self.policy.look_again_s(arrival_s, now_s, busy)
        self._closed = at_s <= now_s or now_s >= arrival_s + self.policy.defer_s
        return at_s

    def step(self, place: Place | None, phase: str, left: int) -> None:
        """Serving has begun: the next idle time opens anew."""
        self._closed = False
