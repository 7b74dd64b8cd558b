"""Mode `improved` (ours): physical terms whose constants other models lend and this model's fingerprints correct.

* Latency and memory are linear in a machine's constants (`terms.py`). `data/priors.json` holds what six models on the
  authors' machine say about them, and each time what five of them say without the sixth: a model that is among them is never
  estimated with its own whole-model measurements (`Priors.of`).
* A model's fingerprints correct the constants (`hierarchy.update`); on another machine they overrule them, and the intervals
  grow with what the fingerprints leave open.
* Fingerprints used are those of `improved_points`, which cost no more than the paper's grid, where the file holds them;
  otherwise everything on one and two stages that the file has; on another machine everything that the file has. A missing
  layout is no error: the machine's constants stand in, or on another machine the paper's law (`ranks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from systems.common.errors import InputError
from systems.maveriq.configuration import (
    LEVEL,
    Configuration,
    Estimate,
    Estimates,
    Floats,
    ModelFacts,
    Precision,
    Question,
    facts_of,
)
from systems.maveriq.fingerprint import Fingerprints, Point, Setting, improved_points
from systems.maveriq.hierarchy import (
    NOISE_FACTOR,
    NOISE_FACTOR_ELSEWHERE,
    STRANGE,
    Posterior,
    Prior,
    Width,
    at_pace,
    evidence,
    noise_class,
    pace_of,
    predicted,
    slowed,
    update,
    widths,
)
from systems.maveriq.lines import Split, latency_lines, memory_lines, splits
from systems.maveriq.priors import PRIORS, Priors, read_priors
from systems.maveriq.ranks import Growth, beyond, growth, lined
from systems.maveriq.terms import (
    LATENCY_GROUPS,
    LONG_PROMPT,
    MEMORY_GROUPS,
    SHORT_PROMPT,
    dtype_of,
    latency_rows,
    latency_terms,
    memory_rows,
    memory_terms,
    settings,
)

PROMPTS = (SHORT_PROMPT, 32, 100, 320, LONG_PROMPT, 2048, 4096)
"""Prompt lengths that are tried where the user doesn't say which one the fingerprints were measured with."""
_COARSE = 3
"""Prompt lengths are compared at every third strangeness only: it is the time that a first answer takes."""
_ELSEWHERE = 1.5
"""Margins were calibrated on the machine of the priors; on another one they reach this much further."""
_BATCH_SHARE = 0.05, 0.15
"""Relative errors (RMS, latency and memory) of models left out at batches of 8 to 64, which margins of batch 1 don't know."""
_SIMILAR = 0.2
"""Up to this strangeness a machine counts as that of the priors."""
_DOUBT = 0.4
"""Least strangeness of a model whose widths are not known."""
_LEAST = 1e-3
"""Least value of what grows with the output length, as a share of the smallest fingerprint: latency rises with length."""


@dataclass(frozen=True, slots=True)
class Learned:
    """One model: the prompt length of its fingerprints, how many times slower its machine is, and its constants."""

    prompt: float
    pace: float
    latency: tuple[Prior, Posterior]
    memory: tuple[Prior, Posterior]
    splits: tuple[Split, ...]
    notes: tuple[str, ...]
    lined: frozenset[int] = frozenset()
    growth: Mapping[int, Growth] = field(default_factory=dict)

    @property
    def elsewhere(self) -> bool:
        """Whether the machine is another than that of the priors."""
        return self.pace != 1.0 or self.latency[1].strangeness > _SIMILAR

    @property
    def unlike(self) -> bool:
        """Whether it is not that machine at another pace either: the priors' terms and constants say little."""
        return self.latency[1].strangeness >= STRANGE

    def lacks(self, tp: int) -> bool:
        """Whether the paper's law must stand in for `tp` ranks."""
        return self.unlike and tp > 2 and tp not in self.lined and {1, 2} <= self.lined


class ImprovedEstimator:
    """Our estimator over one file of fingerprints. A model's constants are learned when it is first asked about."""

    def __init__(
        self,
        fingerprints: Fingerprints,
        models: Mapping[str, ModelFacts],
        *,
        priors: Priors | None = None,
        level: float = LEVEL,
        prompt_tokens: int | None = None,
        use_all: bool = False,
    ) -> None:
        """Use `fingerprints`.

        Args:
            fingerprints: the measurements.
            models: facts of the models.
            priors: what other models lend (default: `data/priors.json`, from the authors' machine).
            level: the share of truths that intervals should hold.
            prompt_tokens: length of the prompts, of fingerprints and questions alike; found from the fingerprints where None.
            use_all: learn from every point, not only from those of `improved_points`.
        """
        if not 0 < level < 1:
            raise InputError("estimator", "level", level, "use a share between 0 and 1, such as 0.9")
        self._fingerprints, self._models, self._level = fingerprints, models, level
        self._priors = priors
        self._prompt_tokens, self._use_all = prompt_tokens, use_all
        self._learned: dict[str, Learned] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The models that were fingerprinted."""
        return self._fingerprints.models

    def precisions(self, model: str) -> tuple[Precision, ...]:
        """The precisions of `model` that were fingerprinted."""
        return self._fingerprints.precisions(model)

    def estimate(self, model: str, configuration: Configuration, *, batch: int = 1, output_length: int = 100) -> Estimate:
        """One answer. Raises InputError for an unknown model or a number format of unknown size."""
        return self.estimate_many([Question(model, configuration, batch, output_length)])[0]

    def estimate_many(self, questions: Sequence[Question]) -> Estimates:
        """Answers in the order of the questions."""
        columns = np.zeros((6, len(questions)))
        notes: list[tuple[str, ...]] = [()] * len(questions)
        by_model: dict[str, list[int]] = {}
        for place, question in enumerate(questions):
            by_model.setdefault(question.model, []).append(place)
        for model, places in by_model.items():
            learned = self.learned(model)
            asked = [self._setting(questions[place]) for place in places]
            columns[:, places] = self._answers(learned, asked)
            for place, setting in zip(places, asked, strict=True):
                notes[place] = learned.notes + self._gaps(setting)
        value, low, high, gib, low_gib, high_gib = columns
        return Estimates(value, low, high, gib, low_gib, high_gib, self._level, tuple(notes))

    def learned(self, model: str) -> Learned:
        """What the fingerprints of `model` taught. Raises InputError when there are none, or when its depth is not known."""
        if model not in self._learned:
            self._fingerprints.precisions(model)
            facts = facts_of(model, self._models)
            found = self._learn(facts, self.used(model))
            everything = self._fingerprints.select(s for s in self._fingerprints.points if s.model == model)
            if found.unlike and len(everything.points) > len(self.used(model).points):
                found = self._learn(facts, everything)
            self._learned[model] = found
        return self._learned[model]

    def used(self, model: str) -> Fingerprints:
        """The fingerprints of `model` that are used."""
        mine = [s for s in self._fingerprints.points if s.model == model]
        chosen = improved_points(self._fingerprints, model)
        has = {s.layout for s in chosen}
        enough = {(1, 1), (1, 2)} | ({(2, 1), (4, 1), (8, 1)} if facts_of(model, self._models).tensor_parallel else set())
        if self._use_all or not enough <= has:
            few = [s for s in mine if s.pp <= 2]
            return self._fingerprints.select(mine if self._use_all or not few else few)
        return self._fingerprints.select(chosen)

    def _learn(self, facts: ModelFacts, used: Fingerprints) -> Learned:
        priors = read_priors(PRIORS) if self._priors is None else self._priors
        latency, memory = priors.of(facts.name)
        points = used.points
        # shapes that are not known are as good as another machine
        doubt = 0.0 if facts.is_whole else _DOUBT
        wide = widths(latency, LATENCY_GROUPS, doubt)
        prompt, pace = self._regime(latency, wide, points)
        measured, known = list(points), splits(list(points))
        found_settings = settings(measured, self._models, prompt)
        rows = latency_rows(points, self._models, prompt, found_settings)
        gib = memory_rows(points, self._models, prompt, found_settings)
        lines = latency_lines(measured, known, self._models, prompt, latency.mean)
        rows = rows._replace(lines=lines / np.array([[point.latency_s * 1e3] for point in points.values()]))
        lines = memory_lines(measured, known, self._models, prompt, memory.mean)
        gib = gib._replace(lines=lines / np.array([[point.memory_gib] for point in points.values()]))
        factors = NOISE_FACTOR if pace == 1.0 else NOISE_FACTOR_ELSEWHERE, NOISE_FACTOR_ELSEWHERE
        posterior = update(latency, at_pace(rows, pace), wide, factors)
        if posterior.noisiness > 1 and posterior.strangeness < STRANGE:  # what doesn't fit is no noise: fingerprints are exact
            wide = tuple(width for width in wide if width.strangeness >= STRANGE)
            posterior = update(latency, at_pace(rows, pace), wide, factors)
        remembered = update(memory, gib, widths(memory, MEMORY_GROUPS, doubt))
        notes = [] if facts.is_whole else [f"{facts.name}: widths not known, nominal ones used"]
        if pace != 1.0 or posterior.strangeness > _SIMILAR:
            notes.append("another machine than that of the priors: fingerprints overrule them, intervals are wider")
        pair = latency, slowed(posterior, pace)
        found = Learned(prompt, pace, pair, (memory, remembered), known, tuple(notes), lined(points))
        return replace(found, growth=self._growths(found, points))

    def _growths(self, learned: Learned, points: Mapping[Setting, Point]) -> Mapping[int, Growth]:
        """How overheads grow at the ranks of `points` that have no lines of their own."""
        found = {}
        for tp in sorted({s.tp for s in points if learned.lacks(s.tp)}):
            measured = [s for s in points if s.tp == tp]
            single, split = (self._latency(learned, [replace(s, tp=ranks) for s in measured])[0] for ranks in (1, 2))
            found[tp] = growth(tp, single, split, np.array([points[s].latency_s for s in measured]))
        return found

    def _regime(self, latency: Prior, wide: Sequence[Width], points: Mapping[Setting, Point]) -> tuple[float, float]:
        """The prompt length, and the pace of the machine, that the fingerprints speak for most."""
        best = -np.inf, float(LONG_PROMPT), 1.0
        found = settings(list(points), self._models, 0)
        for prompt in PROMPTS if self._prompt_tokens is None else (self._prompt_tokens,):
            rows = latency_rows(points, self._models, prompt, found)
            for pace in {1.0, pace_of(latency, rows)}:
                best = max(best, (evidence(latency, at_pace(rows, pace), wide[::_COARSE]), float(prompt), pace))
        return best[1:]

    def _setting(self, question: Question) -> Setting:
        c = question.configuration
        facts = facts_of(question.model, self._models)
        if c.tp > 1 and not facts.tensor_parallel:
            raise InputError(question.model, "tp", c.tp, "this model can't be split: use tp 1")
        if c.pp > facts.layers:
            raise InputError(question.model, "pp", c.pp, f"the model has {facts.layers} layers: every stage needs one")
        dtype_of(c.dtype, "estimate")
        return Setting(facts.name, c.tp, c.pp, c.dtype, c.int8_kv, facts.layers, question.output_length, question.batch)

    def _gaps(self, asked: Setting) -> tuple[str, ...]:
        """What was not measured and is the machine's constants' word alone."""
        has = self._fingerprints
        gaps = []
        if asked.precision not in has.precisions(asked.model):
            gaps.append(f"no fingerprint of {asked.dtype}{' + int8 KV' if asked.int8_kv else ''}")
        if asked.tp > has.most_ranks[asked.model]:
            gaps.append(f"no fingerprint of {asked.tp} ranks")
        return tuple(gaps)

    def _latency(self, learned: Learned, asked: Sequence[Setting]) -> tuple[Floats, Floats]:
        """Seconds and their relative standard deviation, by the terms."""
        found = settings(asked, self._models, learned.prompt)
        classes = noise_class(found.tp, found.pp)
        once, token, squared = latency_terms(found)
        length = found.length[:, None]
        prior, posterior = learned.latency
        least = _LEAST * np.abs(token) @ prior.scale
        if len(posterior.mean) > len(prior.mean):
            lines = latency_lines(asked, learned.splits, self._models, learned.prompt, prior.mean).reshape(len(asked), -1, 4)
            own = [np.where([True, True, False, False], lines, 0.0), np.where([False, False, True, True], lines, 0.0)]
            own[1] = own[1] / length[:, :, None]
            once, token = (
                np.hstack([part, line.reshape(len(asked), -1)]) for part, line in zip((once, token), own, strict=True)
            )
            squared = np.hstack([squared, np.zeros((len(asked), once.shape[1] - squared.shape[1]))])
        value, share = predicted(once + length * token + length**2 * squared, classes, prior, posterior)
        # each part at or above 0, so that a longer answer never takes less time
        start, each, grows = (np.maximum(0.0, part @ posterior.mean) for part in (once, token, squared))
        latency_s = (start + found.length * np.maximum(each, least) + found.length**2 * grows) / 1e3
        return latency_s, share * np.maximum(1.0, np.abs(value) / 1e3 / latency_s)

    def _lawful(self, learned: Learned, asked: Sequence[Setting]) -> tuple[Floats, Floats]:
        """The same by the paper's law between one and two ranks."""
        single, split = (self._latency(learned, [replace(s, tp=ranks) for s in asked]) for ranks in (1, 2))
        none = np.zeros(0)
        grown = [learned.growth.get(s.tp) or growth(s.tp, none, none, none) for s in asked]
        value, deviation = np.array(grown).T
        return beyond(np.array([float(s.tp) for s in asked]), (value, deviation), single, split)

    def _answers(self, learned: Learned, asked: Sequence[Setting]) -> Floats:
        latency_s, spread = self._latency(learned, asked)
        lacking = [place for place, s in enumerate(asked) if learned.lacks(s.tp)]
        if lacking:
            latency_s[lacking], spread[lacking] = self._lawful(learned, [asked[place] for place in lacking])
        found = settings(asked, self._models, learned.prompt)
        classes = noise_class(found.tp, found.pp)
        further = _ELSEWHERE if learned.elsewhere else 1.0
        batched = found.batch > 2
        margin = learned.latency[0].margin(self._level)
        low, high = _interval(latency_s, np.hypot(spread, batched * _BATCH_SHARE[0]), further * margin)
        prior, posterior = learned.memory
        terms = memory_terms(found)
        least = _LEAST * np.abs(terms) @ prior.scale
        if len(posterior.mean) > len(prior.mean):
            terms = np.hstack([terms, memory_lines(asked, learned.splits, self._models, learned.prompt, prior.mean)])
        gib, share = predicted(terms, classes, prior, posterior)
        gib = np.maximum(gib, least)
        low_gib, high_gib = _interval(gib, np.hypot(share, batched * _BATCH_SHARE[1]), further * prior.margin(self._level))
        return np.stack([latency_s, low, high, gib, low_gib, high_gib])


def _interval(value: Floats, share: Floats, margin: float) -> tuple[Floats, Floats]:
    """Bounds that are symmetric in the logarithm: never below 0."""
    factor = np.exp(np.minimum(margin * share, 20.0))
    return value / factor, value * factor
