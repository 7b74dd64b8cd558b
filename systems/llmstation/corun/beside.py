"""Tuning beside the steps of an engine: launches tasklets where the pace allows it, and tells what each step then took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from systems.llmstation.corun.fusing import Fuser
from systems.llmstation.corun.lanes import Lanes, Mark
from systems.llmstation.corun.observed import Observed, Place, Step
from systems.llmstation.corun.pace import Pace, Quiet
from systems.llmstation.corun.tuner import Ran, Tuner

NAP_S = 3e-5


@dataclass(slots=True)
class Launched:
    """A decode step (`place`) or one with prompts (None) between its marks."""

    place: Place | None
    begin: Mark
    end: Mark | None = None
    fused: bool = False


class Beside:
    """The tuning side of one engine; `pace` and `tuner` may be exchanged between runs.

    Attributes:
        seen: called with every step that ended.
        tasklets: tasklets launched beside steps, while nothing was served, and fused into decode steps.
        fuser: what makes fused steps; None for none.
    """

    def __init__(
        self, lanes: Lanes, tuner: Tuner | None = None, pace: Pace | None = None, observed: Observed | None = None
    ) -> None:
        self.lanes, self.tuner, self.pace = lanes, tuner, pace if pace is not None else Quiet()
        self.seen: list[Callable[[Step], None]] = [] if observed is None else [observed.saw]
        self.clock: Callable[[], float] = time.perf_counter
        self.tasklets = {"beside": 0, "alone": 0, "fused": 0}
        self.fuser: Fuser | None = None
        self._fusing = False
        self._steps: deque[Launched] = deque()
        self._ran: deque[Ran] = deque()
        self._open: Launched | None = None

    @property
    def tunes(self) -> bool:
        """Whether there is anything to tune."""
        return self.tuner is not None and type(self.pace) is not Quiet

    # ---- around a step

    def begin(self, place: Place | None) -> None:
        """A step is about to be launched."""
        if self.tuner is None or not self.tunes:
            return
        coming = self.tuner.upcoming
        self.pace.step(place, coming.phase, coming.left)
        self._open = Launched(place, self.lanes.mark(tuning=False))
        free = place is not None and self.fuser is not None and not self.tuner.done_in_sample
        self._fusing = free and place is not None and self.pace.fuses(place)

    def fused(self, rows: int) -> Tensor | None:
        """The tokens of a decode step of `rows` rows fused with the coming sample's forward phase, where that is planned."""
        planned, self._fusing = self._fusing, False
        if not planned or self.tuner is None or self.fuser is None or (size := self.fuser.size(rows)) is None:
            return None
        assert self._open is not None
        self._open.fused = True
        self.tasklets["fused"] += self.tuner.upcoming.left
        return self.tuner.fuse(self.fuser, size)

    def launched(self) -> None:
        """It was launched. Where nothing overlaps, its tasklets run now, as part of it."""
        if (step := self._open) is None:
            return
        self._open = None
        if self.pace.gated:
            self.lanes.gate(step.begin)
        if not self.lanes.overlaps:
            while self.pump() and self.pace.gated:
                pass
        step.end = self.lanes.mark(tuning=False)
        self._steps.append(step)

    def wait(self, pending: Callable[[], bool]) -> None:
        """Launch tasklets while `pending`."""
        if self.tunes and self.lanes.overlaps:
            while pending():
                if not self.pump():
                    time.sleep(NAP_S)

    def pump(self, serving: bool = True) -> bool:
        """Launch one tasklet if the pace and the bound on those in flight allow it; whether it did."""
        tuner = self.tuner
        if tuner is None:
            return False
        in_flight = tuner.in_flight()
        if in_flight >= tuner.ahead or not self.pace.may(self.clock(), in_flight, serving, tuner.done_in_sample):
            return False
        phase = tuner.launch()
        if not serving and len(tuner.log) > 4 * tuner.ahead:
            tuner.log.popleft()  # of idle times only the last ones can overlap a step
        self.tasklets["beside" if serving else "alone"] += 1
        self.pace.launched(phase, tuner.done_in_sample, self.clock())
        return True

    def busy(self) -> bool:
        """Whether a sample is under way, on the host or on the GPU."""
        return self.tuner is not None and (self.tuner.done_in_sample > 0 or self.tuner.in_flight() > 0)

    # ---- what steps took

    def harvest(self) -> None:
        """Tell of the steps that have ended."""
        if self.tuner is None:
            return
        while self._steps and self._steps[0].end is not None and self._steps[0].end.done():
            step = self._steps.popleft()
            self._ran.extend(self.tuner.take())
            told = self._measure(step)
            for listener in self.seen:
                listener(told)
            while self._ran and self._ran[0].end.after_s(step.begin) < 0:
                self._ran.popleft()

    def _measure(self, step: Launched) -> Step:
        assert step.end is not None and self.tuner is not None
        took_s, overlap_s = step.end.after_s(step.begin), 0.0
        durations: dict[str, list[float]] = {}
        for ran in (*self._ran, *self.tuner.log):
            if not ran.begin.done():
                break
            begin_s = ran.begin.after_s(step.begin)
            ended = ran.end.done()
            until_s = min(took_s, ran.end.after_s(step.begin)) if ended else took_s
            if (shared_s := until_s - max(0.0, begin_s)) > 0:
                overlap_s += shared_s
                if ended:
                    durations.setdefault(ran.phase, []).append(ran.end.after_s(ran.begin))
        return Step(step.place, took_s, overlap_s, durations, step.fused)
