"""Which of the probed settings is the answer, and which of its trials stands for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from harness.search.noise import Judgement, Setting, margin, metric_of, pooled_noise
from harness.search.space import Answer, SearchSpace, Verdict


def violation(answer: Answer, space: SearchSpace) -> float:
    """The margin of one answer under its worst limit; above 0 it misses one. `math.inf` when its objective is not a number."""
    if not math.isfinite(answer.objective):
        return math.inf
    return max((margin(metric_of(answer, name), limit) for name, limit in space.bounds.items()), default=-math.inf)


def representative(setting: Setting, space: SearchSpace) -> Answer:
    """The seed that stands for a setting: of those that themselves meet the limits (else of all), the median by objective."""
    good = [a for a in setting.answers if violation(a, space) <= 0] or list(setting.answers)
    good.sort(key=lambda a: (a.objective, a.probe.seed))
    return good[(len(good) - 1) // 2]


def best(settings: Sequence[Setting], judgements: Sequence[Judgement], space: SearchSpace) -> Answer | None:
    """The answer of the search: the best objective among settings believed to pass, or the nearest to the target.

    The last passing setting keeps its place against a safer one unless that one's objective is better by more than the
    noise of repeated answers (the 97 % interval of the difference, on a log scale). A setting none of whose trials met
    the limits is not chosen.
    """
    if space.target:
        return _nearest(settings, judgements, space)
    passing = [s for s, j in zip(settings, judgements, strict=True) if j.passes and _met(s, space)]
    if not passing:
        return None
    noise = pooled_noise([math.log(a.objective) for a in s.answers] for s in settings if _positive(s))
    chosen = passing[-1]
    for other in reversed(passing[:-1]):
        doubt = noise.reach(1 / len(other.answers) + 1 / len(chosen.answers)) if _positive(chosen) else 0.0
        if other.objective() > chosen.objective() * math.exp(doubt):
            chosen = other
    return representative(chosen, space)


def _positive(setting: Setting) -> bool:
    return all(0 < a.objective < math.inf for a in setting.answers)


def _met(setting: Setting, space: SearchSpace) -> bool:
    return any(violation(a, space) <= 0 for a in setting.answers)


def is_on_target(judgement: Judgement, space: SearchSpace) -> bool:
    """Whether there is a target and this setting's metric is within the tolerance of it."""
    return space.target is not None and abs(judgement.margin) <= math.log1p(space.tolerance)


def _nearest(settings: Sequence[Setting], judgements: Sequence[Judgement], space: SearchSpace) -> Answer | None:
    if not any(j.passes or is_on_target(j, space) for j in judgements):
        return None
    setting, _ = min(zip(settings, judgements, strict=True), key=lambda at: abs(at[1].margin))
    return sorted(setting.answers, key=lambda a: (abs(violation(a, space)), a.probe.seed))[0]


def finish(
    space: SearchSpace,
    outcome: str,
    chosen: Answer | None,
    bracket: tuple[float, float] | None = None,
    beyond: Answer | None = None,
) -> Verdict:
    """A verdict with the chosen answer, or with the infeasible value when there is none."""
    if chosen is None and outcome != "budget spent":
        outcome = "nothing feasible"
    note = "; ".join(_said(a, space.bounds) for a in (chosen, beyond) if a is not None)
    if chosen is None:
        return Verdict(outcome, None, space.infeasible, None, bracket, beyond, note)
    return Verdict(outcome, chosen.probe.knobs, chosen.objective, chosen, bracket, beyond, note)


def _said(answer: Answer, bounds: Mapping[str, float]) -> str:
    where = ", ".join(f"{k} {v:g}" for k, v in answer.probe.knobs.items())
    what = ", ".join(f"{name} {answer.metrics[name]:.4g} (limit {limit:g})" for name, limit in bounds.items())
    return f"at {where}: {what}" if what else f"at {where}"
