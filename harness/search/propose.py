"""The search: a pure function from what has been answered to the next question, or the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from harness.search.choice import finish, violation
from harness.search.coordinate import propose_coordinate
from harness.search.monotone import propose_monotone
from harness.search.space import Answer, Probe, SearchSpace, Verdict


def propose(space: SearchSpace, history: Sequence[Answer]) -> Probe | Verdict:
    """The next trial to run, or how the search ended.

    The same space and history always give the same result, so a search that was killed carries on from its recorded
    history. No knob: one trial. One knob: `harness.search.monotone`. Several: `harness.search.coordinate`.

    Raises InputError when the answers lack a metric that a limit names.
    """
    if not space.knobs:
        return _single(space, history)
    return (propose_monotone if len(space.knobs) == 1 else propose_coordinate)(space, history)


def _single(space: SearchSpace, history: Sequence[Answer]) -> Probe | Verdict:
    if not history:
        return Probe({}, 0)
    if violation(history[0], space) > 0:
        return finish(space, "nothing feasible", None, beyond=history[0])
    return finish(space, "single trial", history[0])


def search(space: SearchSpace, ask: Callable[[Probe], Answer], history: Iterable[Answer] = ()) -> tuple[Verdict, list[Answer]]:
    """Ask until there is a verdict; gives it with the whole history, that handed in included."""
    answers = list(history)
    while isinstance(step := propose(space, answers), Probe):
        answers.append(ask(step))
    return step, answers
