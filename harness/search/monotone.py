"""One knob whose objective and limits' metrics grow with it: walk up faster and faster until a limit breaks, then bisect.

MLPerf's peak search doubles and bisects; the doubling here accelerates (x2, x4, x16, ... on a log scale), and every
verdict on a setting counts noise (`harness.search.noise`). The state is worked out afresh from the history at each call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.search.axis import Axis
from harness.search.choice import best, finish, is_on_target, representative
from harness.search.noise import Judgement, Setting, judge
from harness.search.space import Answer, Probe, SearchSpace, Verdict

CLIFF = 2.0
"""A metric that grows by this factor within one tolerance of knob has jumped: nothing can be read off in between."""
FINE = 0.5
"""Where noise was seen it takes its share of the tolerance: the bracket is closed to this part of it, or to half as much
again while no end of it is certain (more settings near the limit make a better line)."""


@dataclass(frozen=True)
class _State:
    """The history in order of position; `cut` settings at the front are believed to pass."""

    space: SearchSpace
    name: str
    axis: Axis
    settings: Sequence[Setting]
    judgements: Sequence[Judgement]

    @property
    def cut(self) -> int:
        return sum(j.passes for j in self.judgements)

    def value(self, index: int) -> float:
        return self.settings[index].answers[0].probe.knobs[self.name]

    def ask(self, value: float, seed: int = 0) -> Probe:
        return Probe({self.name: value}, seed)


def propose_monotone(space: SearchSpace, history: Sequence[Answer]) -> Probe | Verdict:
    """The next question about one knob, or the verdict."""
    state = _state(space, history)
    question = _question(state)
    if isinstance(question, Probe):
        return _verdict(state, "budget spent") if len(history) >= space.budget else question
    return _verdict(state, question)


def _state(space: SearchSpace, history: Sequence[Answer]) -> _State:
    ((name, knob),) = space.knobs.items()
    axis = Axis(knob, space.tolerance)
    found: dict[float, list[Answer]] = {}
    for answer in history:
        found.setdefault(answer.probe.knobs[name], []).append(answer)
    settings = sorted((Setting(axis.position(v), tuple(a)) for v, a in found.items()), key=lambda s: s.position)
    return _State(space, name, axis, settings, judge(settings, space.bounds))


def _question(state: _State) -> Probe | str:
    """The next probe, or the outcome when there is nothing left to ask."""
    axis, cut, last = state.axis, state.cut, len(state.settings) - 1
    if last < 0:
        start = axis.knob.start
        return state.ask(axis.safest if start is None else axis.value(axis.position(start)))
    if (again := _doubtful(state, (cut - 1, cut))) is not None:
        return again
    if any(is_on_target(j, state.space) for j in state.judgements):
        return "precision reached"
    if cut == 0:
        return "nothing feasible" if state.value(0) == axis.safest else state.ask(_walk(state, -1))
    if cut > last:
        return "no limit in range" if state.value(last) == axis.boldest else state.ask(_walk(state, 1))
    low, high = state.value(cut - 1), state.value(cut)
    middle = axis.middle(low, high)
    noisy = any(j.reach > 0 for j in state.judgements)
    width = axis.width(low, high) / (1 + 1e-3)  # the readable digits' share
    if middle is not None and width > (FINE if noisy else 1.0):
        return state.ask(middle)
    end = _closed(state)
    if end == "limited by noise" and middle is not None and width > FINE / 2:
        return state.ask(middle)
    return end


def _doubtful(state: _State, among: Iterable[int]) -> Probe | None:
    """Of the settings `among`, the undecided one with the fewest seeds that may be asked again, the next seed of it."""
    seeds = {i: len(state.settings[i].answers) for i in among if 0 <= i < len(state.settings)}
    left = [i for i, n in seeds.items() if n < state.space.repeats and not state.judgements[i].decided]
    again = min(left, key=lambda i: seeds[i], default=None)
    return None if again is None else state.ask(state.value(again), seeds[again])


def _walk(state: _State, sign: int) -> float:
    """Onward from the outermost setting, each step longer than the last: twice, or fourfold from a hint that starts fine."""
    hinted = state.axis.knob.start is not None
    outer, inner = (-1, -2) if sign > 0 else (0, 1)
    value = state.value(outer)
    if len(state.settings) > 1:
        gap = abs(state.settings[outer].position - state.settings[inner].position)
        distance = gap * (4 if hinted else 2)
    else:
        distance = state.axis.unit_near(value) if hinted else state.axis.stride
    return state.axis.step(value, sign * distance)


def _closed(state: _State) -> Probe | str:
    """The bracket is narrow enough: what kind of end is this, or whose seeds could still make it certain?"""
    if _is_cliff(state):
        return "cliff"
    if _is_certain(state):
        return "precision reached"
    low, high = _certain_bracket(state)
    unsure = [i for i in range(len(state.settings)) if low < i < high]
    return _doubtful(state, sorted(unsure, key=lambda i: abs(i - state.cut + 0.5))) or "limited by noise"


def _is_cliff(state: _State) -> bool:
    """Whether the worst metric at least doubles per tolerance of bracket, beyond what noise could do."""
    below, above = (state.judgements[i] for i in (state.cut - 1, state.cut))
    width = max(1.0, state.axis.width(state.value(state.cut - 1), state.value(state.cut)))
    return above.margin - below.margin >= width * math.log(CLIFF) + math.hypot(below.reach, above.reach)


def _certain_bracket(state: _State) -> tuple[int, int]:
    """Indices of the last setting that surely passes and the first that surely fails (-1 and the count when there is none)."""
    count, sure = len(state.settings), [j.decided or state.space.repeats == 1 for j in state.judgements]
    low = max((i for i in range(state.cut) if sure[i]), default=-1)
    return low, min((i for i in range(state.cut, count) if sure[i]), default=count)


def _is_certain(state: _State) -> bool:
    """Whether the last passing setting is within the tolerance of everywhere that the limit may be."""
    low, high = _certain_bracket(state)
    if low < 0 or high == len(state.settings):
        return False
    if (low, high) == (state.cut - 1, state.cut):
        return True
    last = state.value(state.cut - 1)
    return max(state.axis.width(state.value(low), last), state.axis.width(last, state.value(high))) <= 1 + 1e-3


def _verdict(state: _State, outcome: str) -> Verdict:
    cut, count = state.cut, len(state.settings)
    low, high = _certain_bracket(state)
    ends = (state.value(low) if low >= 0 else state.axis.safest, state.value(high) if high < count else state.axis.boldest)
    beyond = representative(state.settings[cut], state.space) if cut < count else None
    chosen = best(state.settings, state.judgements, state.space)
    return finish(state.space, outcome, chosen, ends if 0 < cut < count else None, beyond)
