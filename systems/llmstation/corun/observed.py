"""From what steps and tasklets took to the planner's latencies. Pure: fed with seconds, by whoever measures them.

A decode iteration of N_d layers took T; tuning overlapped with it for O seconds. Alone it takes T0 = N_d l_d0. While tuning
overlaps, layers take l_d, so O / l_d of them are done, and the rest at l_d0 (`planner`):

    T = O + (N_d - O / l_d) l_d0      =>      l_d = O l_d0 / (O + T0 - T)

On one thread (a CPU) nothing overlaps and the iteration is T = T0 + O: l_d is infinite, cut at `MOST` times l_d0, and the
planner's bound becomes slack / l_p, as it must.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from systems.llmstation.latency_source import LatencySource, Situation
from systems.llmstation.planner import CoRunLatencies

MOST = 1e3
REFRESH = 256
"""After so many steps in a place, one more runs alone."""
WEIGHT = 0.25
"""Of a new measurement in the running mean."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a decode step's latency depends on when alone: its rows (as the graph that serves them counts) and context."""

    decodes: int
    context: int


@dataclass(frozen=True, slots=True)
class Step:
    """A step that ended.

    Attributes:
        place: of a decode step; None for one with prompts.
        took_s: seconds it took.
        overlap_s: seconds of it beside which a tasklet ran.
        tasklets_s: by phase, the seconds that each tasklet which ended took.
        fused: whether it was a decode step with a sample's forward phase in it.
    """

    place: Place | None
    took_s: float
    overlap_s: float = 0.0
    tasklets_s: dict[str, list[float]] = field(default_factory=dict)
    fused: bool = False


def co_run(alone_s: float, took_s: float, overlap_s: float, tasklet_s: float, layers: int) -> CoRunLatencies:
    """The latencies that an iteration of `layers` layers shows; see the module. All arguments are seconds and positive."""
    alone = alone_s / layers
    spared_s = overlap_s + alone_s - took_s  # of the overlap, what decoding used
    shared = alone * MOST if spared_s <= overlap_s / MOST else overlap_s * alone / spared_s
    return CoRunLatencies(alone, min(max(alone, shared), alone * MOST), tasklet_s)


class Observed:
    """The latencies seen so far, in the planner's own `LatencySource`.

    Attributes:
        source: record, profile and regression, in this order.
        layers: decode tasklets of an iteration, N_d.
        alone_s: seconds of a decode step alone by place (running mean).
        fused_s: seconds of a fused step by place (running mean); `fused_profile` by rows, as timed beforehand.
    """

    def __init__(self, layers: int, tuning_tokens: int, source: LatencySource | None = None) -> None:
        self.layers, self.tuning_tokens = layers, tuning_tokens
        self.source = source if source is not None else LatencySource({})
        self.alone_s: dict[Place, float] = {}
        self.fused_s: dict[Place, float] = {}
        self.fused_profile: Mapping[int, float] = {}
        self._since: dict[Place, int] = {}

    def situation(self, place: Place, phase: str) -> Situation:
        """The key of the latency source."""
        return Situation(place.decodes, place.context, self.tuning_tokens, phase)

    def alone_is_due(self, place: Place) -> bool:
        """Whether the coming step in `place` should run without tuning, to measure it alone. Counts the step."""
        count = self._since[place] = self._since.get(place, REFRESH) + 1
        return place not in self.alone_s or count > REFRESH

    def lookup(self, place: Place, phase: str) -> CoRunLatencies:
        """The best known latencies; l_d0 as measured in this place wherever it was. No tasklets until anything is known."""
        try:
            known = self.source.lookup(self.situation(place, phase))
        except KeyError:  # no record, no profile, nothing to regress on: one tasklet as long as all decode layers
            alone = self.alone_s[place] / self.layers
            return CoRunLatencies(alone, alone * 2, alone * self.layers)
        if (alone_s := self.alone_s.get(place)) is None:
            return known
        alone = alone_s / self.layers
        return CoRunLatencies(alone, max(alone, known.decode_s * alone / known.decode_alone_s), known.tuning_s)

    def fused(self, place: Place) -> float | None:
        """Seconds that a fused step in `place` takes, as far as is known; None where nothing is."""
        if (known := self.fused_s.get(place)) is not None:
            return known
        rows = min((rows for rows in self.fused_profile if rows >= place.decodes), default=None)
        return None if rows is None else max(self.fused_profile[rows], self.alone_s.get(place, 0.0))

    def saw(self, step: Step) -> None:
        """Learn from a decode step that ended."""
        if step.place is None:
            return
        if step.fused:
            before = self.fused_s.get(step.place, step.took_s)
            self.fused_s[step.place] = before + WEIGHT * (step.took_s - before)
            return
        if step.overlap_s <= 0:
            before = self.alone_s.get(step.place, step.took_s)
            self.alone_s[step.place] = before + WEIGHT * (step.took_s - before)
            self._since[step.place] = 0
            return
        if len(step.tasklets_s) != 1 or step.place not in self.alone_s:
            return  # at a change of phase it is not known whose harm it was
        ((phase, seconds),) = step.tasklets_s.items()
        mean_s = sum(seconds) / len(seconds)
        seen = co_run(self.alone_s[step.place], step.took_s, min(step.overlap_s, step.took_s), mean_s, self.layers)
        self.source.record(self.situation(step.place, phase), seen, WEIGHT)
