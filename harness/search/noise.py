"""What the answers so far say about each setting, noise counted.

The *margin* of an answer under one limit is `ln(metric / limit)`: negative while the limit holds, -0.05 when 5 % below it.
Noise on a latency is near enough multiplicative, so in this measure it has one size everywhere.

The rule, in three steps:

1. **How large is the noise?** The pooled standard deviation `s` of the margins of settings that were asked with more
   than one seed. Before any was, a setting whose margin is within `GUARD` of zero counts as undecided, whatever it says.
2. **What is the margin at a setting?** The mean over its seeds; but settings within `NEAR` noise widths of the limit are
   judged together by one weighted straight line of margin against knob position (a calibration line: the knob is where
   the line crosses zero), since neighbours inform each other and a lone early mistake is outvoted. Then margins are made
   to rise with the knob by isotonic regression (pool adjacent violators), because a monotone system's do.
3. **Is it decided?** When the margin is further from zero than Student's t (97 %, two-sided) times its standard error.
   An undecided setting is asked again with the next seed until it is decided, or has had `repeats` seeds. That is a
   sequential test in the spirit of Wald (1945), "Sequential tests of statistical hypotheses", with the variance
   estimated from the data as Stein (1945) does.

A system whose repeated seeds agree exactly has `s = 0`: everything is decided and nothing is asked twice again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.search.space import Answer
from systems.registry import InputError

GUARD = 0.25
"""Margins this close to zero are not taken at their word before the noise is known."""
NEAR = 4.0
"""Settings within this many noise widths of a limit share one line."""
CLIP = 2.0
"""Margins are cut off here: a limit missed by a factor of 7.4 or by infinity is the same verdict."""
STUDENT = (math.inf, 21.20, 5.64, 3.90, 3.30, 3.00, 2.83, 2.71, 2.63, 2.57, 2.53)
"""Two-sided 97 % points of Student's t for 0, 1, ... 10 degrees of freedom; beyond, 2.17 + 3.3 / degrees is within 1 %."""


def margin(metric: float, limit: float) -> float:
    """`ln(metric / limit)` cut off at `CLIP`; NaN and inf are as bad as can be, zero and below as good as can be."""
    if not math.isfinite(metric):
        return CLIP
    return -CLIP if metric <= 0 else max(-CLIP, min(CLIP, math.log(metric) - math.log(limit)))


def student(degrees: int) -> float:
    """Two-sided 97 % point of Student's t."""
    return STUDENT[degrees] if degrees < len(STUDENT) else 2.17 + 3.3 / degrees


@dataclass(frozen=True, slots=True)
class Setting:
    """All answers at one knob setting. `position` is along the axis (0 where there is none)."""

    position: float
    answers: tuple[Answer, ...]

    def margins(self, metric: str, limit: float) -> list[float]:
        """The margin of every answer under one limit; one whose objective is not a number has missed every limit."""
        return [margin(metric_of(a, metric), limit) if math.isfinite(a.objective) else CLIP for a in self.answers]

    def numbers(self) -> list[float]:
        """Margins where there is no limit: an answer fails only by an objective that is not a number."""
        return [-CLIP if math.isfinite(a.objective) else CLIP for a in self.answers]

    def objective(self) -> float:
        """The mean objective; -inf when any is not a number."""
        values = [a.objective for a in self.answers]
        return fmean(values) if all(map(math.isfinite, values)) else -math.inf


def metric_of(answer: Answer, name: str) -> float:
    """The metric `name` of an answer; InputError when it has none of that name."""
    try:
        return answer.metrics[name]
    except KeyError:
        known = ", ".join(sorted(answer.metrics)) or "nothing"
        raise InputError("search", "limits", name, f"the experiment does not report it; it reports {known}") from None


@dataclass(frozen=True, slots=True)
class Judgement:
    """The margin believed at one setting under the worst of its limits.

    `reach` is how far noise may have moved it (half its 97 % interval; 0 while noise was not measured), `decided` whether
    it is certain on which side of the limit it lies.
    """

    margin: float
    reach: float
    decided: bool

    @property
    def passes(self) -> bool:
        """Whether the limits are believed to hold."""
        return self.margin <= 0


@dataclass(frozen=True, slots=True)
class Noise:
    """Pooled standard deviation of repeated answers, with its degrees of freedom (0: not known)."""

    deviation: float
    degrees: int

    @property
    def seen(self) -> bool:
        """Whether repeated answers were found to differ."""
        return self.deviation > 0

    def reach(self, variance_share: float) -> float:
        """Half the 97 % interval of an estimate whose variance is this share of one answer's."""
        return student(self.degrees) * self.deviation * math.sqrt(variance_share) if self.seen else 0.0

    def judgement(self, margin: float, reach: float) -> Judgement:
        """`margin` with its certainty."""
        return Judgement(
            margin, reach, abs(margin) > (reach if self.degrees else GUARD) or (self.degrees > 0 and not self.seen)
        )


def pooled_noise(groups: Iterable[Sequence[float]]) -> Noise:
    """Within-group standard deviation over all groups of repeated values; differences below 1e-12 are none."""
    squares, degrees = 0.0, 0
    for group in groups:
        mean = fmean(group)
        squares += sum((x - mean) ** 2 for x in group if abs(x - mean) > 1e-12)
        degrees += len(group) - 1
    return Noise(math.sqrt(squares / degrees) if degrees else 0.0, degrees)


def judge(settings: Sequence[Setting], bounds: Mapping[str, float], monotone: bool = True) -> list[Judgement]:
    """What is believed of each setting (in order of position) from all answers together.

    With `monotone` false, settings have nothing to do with each other beyond sharing one noise.
    """
    limits = [_judge_limit([s.margins(*bound) for s in settings], settings, monotone) for bound in bounds.items()]
    if not bounds:
        limits = [_judge_limit([s.numbers() for s in settings], settings, monotone)]
    return [_worst(at) for at in zip(*limits, strict=True)]


def _worst(judgements: Sequence[Judgement]) -> Judgement:
    """A setting passes when every limit does, and is decided when a limit surely fails or all surely hold."""
    worst = max(judgements, key=lambda j: j.margin)
    decided = all(j.decided for j in judgements) or (not worst.passes and worst.decided)
    return Judgement(worst.margin, worst.reach, decided)


def _judge_limit(groups: Sequence[Sequence[float]], settings: Sequence[Setting], monotone: bool) -> list[Judgement]:
    noise = pooled_noise(g for g in groups if max(map(abs, g)) < CLIP)  # what was cut off says nothing about noise
    believed = [(fmean(g), noise.reach(1 / len(g))) for g in groups]
    if monotone and noise.seen:
        believed = _along_a_line(settings, groups, believed, noise)
    margins = [m for m, _ in believed]
    if monotone:
        margins = rising(margins, [len(g) for g in groups])
    return [noise.judgement(m, reach) for m, (_, reach) in zip(margins, believed, strict=True)]


def _along_a_line(
    settings: Sequence[Setting], groups: Sequence[Sequence[float]], believed: list[tuple[float, float]], noise: Noise
) -> list[tuple[float, float]]:
    """`believed`, with the settings near the limit replaced by their common line, if they have a rising one."""
    near = [i for i, (m, _) in enumerate(believed) if abs(m) <= NEAR * noise.deviation]
    if len(near) < 3:
        return believed
    weights = [len(groups[i]) for i in near]
    total = sum(weights)
    centre = sum(w * settings[i].position for w, i in zip(weights, near, strict=True)) / total
    level = sum(w * believed[i][0] for w, i in zip(weights, near, strict=True)) / total
    offsets = [settings[i].position - centre for i in near]
    spread = sum(w * d * d for w, d in zip(weights, offsets, strict=True))
    slope = sum(w * d * believed[i][0] for w, d, i in zip(weights, offsets, near, strict=True)) / spread
    if slope <= 0:
        return believed
    fitted = list(believed)
    for i, d in zip(near, offsets, strict=True):
        fitted[i] = (level + slope * d, noise.reach(1 / total + d * d / spread))
    return fitted


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The closest non-decreasing sequence, least squares (pool adjacent violators: Ayer et al. 1955)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, v, n), (b, w, m) = blocks[-2:]
            blocks[-2:] = [((a * v + b * w) / (v + w), v + w, n + m)]
    return [value for value, _, count in blocks for _ in range(count)]
