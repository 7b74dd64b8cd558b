"""Several knobs: a pattern search in aggressiveness space, feasible first.

Every knob runs from its safest end (0) to its boldest (1), in equal steps of position (`harness.search.axis`). Objective
and metrics are taken to grow along every knob, as each knob's `direction` declares. In this order:

1. The safest corner. When even that misses a limit, nothing is feasible.
2. The diagonal to the boldest corner, by bisection: a feasible point near the limits in few trials.
   (1 and 2 are left out when every knob has a `start` and that point is feasible: the search begins there.)
3. From the best point so far, moves of up to one step in every knob at once, bolder or safer (along the limits' surface
   a gain is only to be had by exchange: one knob bolder, another safer). First each knob alone, to learn its slopes;
   then always the move that a local linear model of ln(objective) and of the margins (`harness.search.surrogate`) likes
   best. A success moves there; after two failures per knob, or when no move promises anything, the step is halved, until
   it is one tolerance. This is a pattern search (Hooke and Jeeves 1961) whose polls are ordered by a surrogate (Booker
   et al. 1999). Moves that the declared directions rule out are not tried: bolder everywhere than a setting that failed,
   or safer everywhere than the best.

Points are compared feasible first (Deb 2000): a feasible point beats an infeasible one, the better objective wins among
the feasible, the smaller violation among the infeasible. A point that would win but is within noise of a limit is asked
again first, up to `repeats` seeds.

The procedure below reads as if it could ask at will; the first question that the history does not answer is the next probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.search.axis import Axis
from harness.search.choice import best, finish
from harness.search.noise import Judgement, Setting, judge
from harness.search.space import Answer, Probe, SearchSpace, Verdict
from harness.search.surrogate import promising_moves

Point = tuple[float, ...]
"""Knob values, in the order of the space's knobs."""

DIAGONAL = 4
"""Bisections along the diagonal: it is cut to 1/16."""
FIRST_STEP = 0.25
"""First step of the pattern search, as a share of each knob's range."""


class _UnansweredError(Exception):
    """The history ends here; `probe` is the next question."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe


def propose_coordinate(space: SearchSpace, history: Sequence[Answer]) -> Probe | Verdict:
    """The next question about several knobs, or the verdict."""
    walk = _Walk(space, history)
    try:
        outcome = walk.run()
    except _UnansweredError as question:
        if len(history) < space.budget:
            return question.probe
        outcome = "budget spent"
    return _verdict(walk, outcome)


def _verdict(walk: _Walk, outcome: str) -> Verdict:
    space = walk.space
    settings = [Setting(0.0, tuple(a)) for a in walk.seen.values()]
    order = sorted(range(len(settings)), key=lambda i: (settings[i].objective(), -i))
    judged = judge(settings, space.bounds, monotone=False)
    chosen = best([settings[i] for i in order], [judged[i] for i in order], space)
    return finish(space, outcome, chosen)


@dataclass(frozen=True, slots=True)
class _Found:
    """A point with what is believed of it."""

    point: Point
    objective: float
    judgement: Judgement

    def beats(self, other: _Found) -> bool:
        """Feasible first, then least violation, then objective."""
        if self.judgement.passes != other.judgement.passes:
            return self.judgement.passes
        if not self.judgement.passes:
            return self.judgement.margin < other.judgement.margin
        return self.objective > other.objective


class _Walk:
    """One replay of the procedure over a history; `seen` holds the answers consumed so far, by point."""

    def __init__(self, space: SearchSpace, history: Sequence[Answer]) -> None:
        self.space = space
        self.names = tuple(space.knobs)
        self.axes = tuple(Axis(k, space.tolerance) for k in space.knobs.values())
        self.known = {(self._point(a.probe.knobs), a.probe.seed): a for a in history}
        self.seen: dict[Point, list[Answer]] = {}
        self.found: dict[Point, _Found] = {}

    def _point(self, knobs: Mapping[str, float]) -> Point:
        return tuple(knobs[name] for name in self.names)

    def run(self) -> str:
        """The whole search; its outcome."""
        first = self._hinted() or self._on_diagonal()
        if not first.judgement.passes:
            return "nothing feasible"
        if first.point == self.at([1.0] * len(self.axes)):
            return "no limit in range"
        self._pattern(first)
        return "precision reached"

    def _hinted(self) -> _Found | None:
        """The point of all `start` hints, if every knob has one and it is feasible."""
        hints = tuple(a.value(a.position(a.knob.start)) for a in self.axes if a.knob.start is not None)
        found = self.ask(hints) if len(hints) == len(self.axes) else None
        return found if found and found.judgement.passes else None

    def _on_diagonal(self) -> _Found:
        """The safest corner, or the best of the diagonal when that corner is feasible."""
        current = self.ask(self.at([0.0] * len(self.axes)))
        if not current.judgement.passes:
            return current
        low, high = 0.0, 2.0  # the first middle is the boldest corner
        for _ in range(DIAGONAL + 1):
            middle = (low + high) / 2
            found = self.ask(self.at([middle] * len(self.axes)))
            low, high = (middle, high) if found.judgement.passes else (low, middle)
            current = found if found.beats(current) else current
            if low == 1.0:
                break
        return current

    def at(self, shares: Sequence[float]) -> Point:
        """The allowed point nearest to these shares of each knob's range (0 safest, 1 boldest)."""
        return tuple(
            a.value(a.position(a.safest) + a.span * min(max(u, 0.0), 1.0)) for a, u in zip(self.axes, shares, strict=True)
        )

    def shares(self, point: Point) -> list[float]:
        """How far along its range each knob is."""
        return [
            (a.position(x) - a.position(a.safest)) / a.span if a.span else 0.0 for a, x in zip(self.axes, point, strict=True)
        ]

    def ask(self, point: Point) -> _Found:
        """What is believed of `point`, asking the next seed while noise leaves it undecided."""
        if point in self.found:
            return self.found[point]
        while True:
            answers = self.seen.setdefault(point, [])
            if answers and (self._judge(point).decided or len(answers) >= self.space.repeats):
                break
            key = (point, len(answers))
            if key not in self.known:
                if not answers:
                    del self.seen[point]
                raise _UnansweredError(Probe(dict(zip(self.names, point, strict=True)), len(answers)))
            answers.append(self.known[key])
        found = _Found(point, Setting(0.0, tuple(self.seen[point])).objective(), self._judge(point))
        self.found[point] = found
        return found

    def _judge(self, point: Point) -> Judgement:
        settings = [Setting(0.0, tuple(a)) for a in self.seen.values()]
        return judge(settings, self.space.bounds, monotone=False)[list(self.seen).index(point)]

    def _pattern(self, current: _Found) -> None:
        finest = min((a.unit_near(a.safest) / a.span for a in self.axes if a.span), default=1.0)
        step, failures, alone = FIRST_STEP, 0, list(self._alone())
        while step >= finest:
            target = self._next(current, step, alone)
            found = self.ask(target) if target else None
            if found is not None and found.beats(current):
                current, failures = found, 0
            else:
                failures += 1
            if target is None or failures > 2 * len(self.axes):
                step, failures = step / 2, 0

    def _alone(self) -> Iterator[Point]:
        """One knob bolder at a time."""
        for i in range(len(self.axes)):
            yield tuple(float(k == i) for k in range(len(self.axes)))

    def _next(self, current: _Found, step: float, alone: list[Point]) -> Point | None:
        """The next point to try: a knob alone while `alone` lasts, then what the local model likes best, if it likes any."""
        here = self.shares(current.point)
        while alone:
            target = self.at([u + step * m for u, m in zip(here, alone.pop(0), strict=True)])
            if self._worth(target, current):
                return target
        for move in self._liked(current, here, step):
            target = self.at([u + m for u, m in zip(here, move, strict=True)])
            if self._worth(target, current):
                return target
        return None

    def _liked(self, current: _Found, here: Sequence[float], step: float) -> tuple[Point, ...]:
        """Moves in the order of what a local model of all answers so far promises."""
        others = [f for f in self.found.values() if f.point != current.point]
        if not others:
            return ()
        points = tuple(tuple(x - u for x, u in zip(self.shares(f.point), here, strict=True)) for f in others)
        gains = tuple(_log_ratio(f.objective, current.objective) for f in others)
        now, margins = self._margins(current.point), [self._margins(f.point) for f in others]
        walls = tuple((start, tuple(m[k] - start for m in margins)) for k, start in enumerate(now))
        return promising_moves(points, gains, walls, step)

    def _margins(self, point: Point) -> list[float]:
        setting = Setting(0.0, tuple(self.seen[point]))
        return [fmean(setting.margins(name, limit)) for name, limit in self.space.bounds.items()]

    def _worth(self, target: Point, current: _Found) -> bool:
        """Whether `target` is new and the declared directions leave it a chance against `current`."""
        if target in self.found:
            return False
        there, feasible = self.shares(target), current.judgement.passes
        bolder = (f for f in self.found.values() if feasible and not f.judgement.passes)
        if any(_at_least(there, self.shares(f.point)) for f in bolder):
            return False
        return not (feasible and _at_least(self.shares(current.point), there))


def _at_least(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True))


def _log_ratio(a: float, b: float) -> float:
    """`ln(a / b)` within +-2, for numbers that may be zero, negative or not numbers at all."""
    if a == b:
        return 0.0
    if min(a, b) > 0 and max(a, b) < math.inf:
        return max(-2.0, min(2.0, math.log(a / b)))
    return 2.0 if a > b else -2.0
