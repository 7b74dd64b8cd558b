"""Constants of a machine, learned from some models and lent to another: a linear model with two levels. Pure numpy.

Every measurement is terms x constants. A model's constants are the machine's plus what is its own:

    theta_model = mean + own,   own ~ N(0, spread^2),   terms theta_model / measured = 1 + noise

* `fit` finds mean, spread and noise from models that were measured whole (expectation maximisation: both are unknown).
* `update` takes them as a prior and learns a new model's constants from its fingerprints (linear Gaussian, closed form).
* Another machine: `update` also asks how far that prior is off. `strangeness` s widens it, each constant by itself and each
  group of constants together (half the bandwidth halves them all), and `noisiness` r scales the noise; the pair with the
  highest evidence for the fingerprints wins. With s = 0 the prior is believed, with a large s the fingerprints alone speak.
  `pace_of` sees to machines that are faster or slower altogether.

All measurements are divided by what was measured, so that errors are relative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from systems.maveriq.configuration import Floats

Index = NDArray[np.int64]
STRANGENESS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
NOISINESS = (0.03, 0.1, 0.3, 1.0, 3.0)
_OWN_SHARE = 0.1
"""What a model's constants are thought to differ by, relative, before any was seen; it weighs as two models."""
_OWN_WEIGHT = 2.0
_FLOOR = 0.002
"""A constant that the fit finds to be 0 may still be worth this share of a measurement."""
_ROUNDS = 40
_WHOLE_NOISE, _PRINT_NOISE = 0.02, 0.05
_NOISE_WEIGHT = 5.0
_SHARED = 2.0
"""Whole models: rows of one configuration (output lengths) share most of their error, so each counts for less."""
NOISE_FACTOR, NOISE_FACTOR_ELSEWHERE = 1.5, 4.0
"""Noise is thought to be what it was on the machine of the priors, up to about this factor; another one's may be far less."""
STRANGE, _LINES = 0.4, 1.0
"""From this strangeness on a machine may also break the terms' form: `Rows.lines` count, each up to about `_LINES` times the
strangeness of its own size."""
_SAME_PACE = 0.2
"""Up to this (logarithm) a machine may be as fast as that of the priors: `strangeness` can see to it."""
_ANCHOR = 1e-6
"""Constants that nothing was measured about (no such layout) are known to 1000 times the least that matters: not at all."""
CLASSES = 8


def noise_class(tp: Floats, pp: Floats) -> Index:
    """Which measurements are equally noisy: by TP 1, 2 to 3, 4 to 7, 8 and more, and by whether there is one stage."""
    ranks = np.clip(np.floor(np.log2(tp)), 0, 3)
    return np.asarray(ranks + 4 * (pp > 1), dtype=np.int64)


class Rows(NamedTuple):
    """Measurements: terms divided by what was measured ([n, terms]), and their noise class.

    `lines` are further columns, known to be 0 on a machine like the others: what a strange machine adds that no term says.
    """

    terms: Floats
    noise_class: Index
    lines: Floats | None = None


class Known(NamedTuple):
    """One model for `fit`: its whole-model and its fingerprint measurements."""

    whole: Rows
    prints: Rows


@dataclass(frozen=True, slots=True)
class Prior:
    """What `fit` learned. `covariance` is the uncertainty of `mean`; `floor` the least size of each constant that matters.

    `margins` maps a level to how many standard deviations an interval must reach to hold that share of the truths, as
    found on models left out.
    """

    terms: tuple[str, ...]
    mean: Floats
    covariance: Floats
    spread: Floats
    floor: Floats
    whole_noise: Floats
    print_noise: Floats
    margins: Mapping[float, float]

    @property
    def scale(self) -> Floats:
        """The size of each constant."""
        return np.maximum(self.mean, self.floor)

    def margin(self, level: float) -> float:
        """Standard deviations to either side for `level`, interpolated between the levels that were calibrated."""
        levels = sorted(self.margins)
        return float(np.interp(level, levels, [self.margins[at] for at in levels]))


@dataclass(frozen=True, slots=True)
class Posterior:
    """A model's constants after its fingerprints, how the prior had to be changed for them, and the log evidence."""

    mean: Floats
    covariance: Floats
    strangeness: float
    noisiness: float
    evidence: float


def fit(models: Sequence[Known], terms: tuple[str, ...]) -> Prior:
    """Mean, spread and noise from models measured whole. Constants are kept at or above 0."""
    everything = np.vstack([model.whole.terms for model in models])
    floor = _FLOOR / np.maximum(np.abs(np.vstack([everything, *(m.prints.terms for m in models)])).max(axis=0), 1e-12)
    # in units of the floors all constants are of like size, which matrices want
    models = [Known(*(rows._replace(terms=rows.terms * floor) for rows in model)) for model in models]
    found = _fit(models, _not_negative(everything * floor), np.ones(len(terms)))
    return Prior(
        terms, found.mean * floor, found.covariance * np.outer(floor, floor), found.spread * floor, floor, *found[3:], {}
    )


class _Found(NamedTuple):
    """What `_fit` found, in units of the floors."""

    mean: Floats
    covariance: Floats
    spread: Floats
    whole_noise: Floats
    print_noise: Floats


def _fit(models: Sequence[Known], start: Floats, floor: Floats) -> _Found:
    mean, spread = start, _OWN_SHARE * np.maximum(start, floor)
    whole_noise, print_noise = np.full(CLASSES, _WHOLE_NOISE), np.full(CLASSES, _PRINT_NOISE)
    for _ in range(_ROUNDS):
        data = [_weigh(model, whole_noise, print_noise) for model in models]
        mean, covariance = _means(data, spread, start, floor)
        owns = [_own(information, pull, mean, spread) for information, pull in data]
        spread = _spread(owns, mean, floor)
        whole_noise = _noise([(m.whole, mean + own, v) for m, (own, v) in zip(models, owns, strict=True)], _WHOLE_NOISE)
        print_noise = _noise([(m.prints, mean + own, v) for m, (own, v) in zip(models, owns, strict=True)], _PRINT_NOISE)
    return _Found(mean, covariance, spread, whole_noise, print_noise)


def _not_negative(rows: Floats) -> Floats:
    """Least squares with constants at or above 0: a start for `fit`. Projected gradient steps on scaled columns."""
    size = np.maximum(np.linalg.norm(rows, axis=0), 1e-12)
    scaled = rows / size
    square, pull = scaled.T @ scaled, scaled.T @ np.ones(len(rows))
    step = 1 / np.linalg.eigvalsh(square)[-1]
    found = np.zeros(rows.shape[1])
    ahead, pace = found, 1.0
    for _ in range(3000):  # accelerated (Nesterov): some columns are nearly parallel
        after = np.maximum(0.0, ahead - step * (square @ ahead - pull))
        faster = (1 + np.sqrt(1 + 4 * pace**2)) / 2
        ahead, found, pace = after + (pace - 1) / faster * (after - found), after, faster
    return np.asarray(found / size)


def _weigh(model: Known, whole_noise: Floats, print_noise: Floats) -> tuple[Floats, Floats]:
    """A model's information matrix and what its measurements pull towards."""
    noise = np.concatenate([_SHARED * whole_noise[model.whole.noise_class], print_noise[model.prints.noise_class]])
    rows = np.vstack([model.whole.terms, model.prints.terms]) / noise[:, None]
    return rows.T @ rows, rows.T @ (1 / noise)


def _means(data: Sequence[tuple[Floats, Floats]], spread: Floats, start: Floats, floor: Floats) -> tuple[Floats, Floats]:
    """Generalised least squares for the machine's constants, what is the models' own integrated out; weakly held to `start`."""
    anchor = np.diag(_ANCHOR / np.maximum(start, floor) ** 2)
    information, pull = anchor.copy(), anchor @ start
    for matrix, towards in data:
        kept = np.linalg.inv(np.diag(1 / spread**2) + matrix)
        information += matrix - matrix @ kept @ matrix
        pull += towards - matrix @ kept @ towards
    covariance = np.linalg.inv(information)
    return np.maximum(covariance @ pull, 0.0), np.asarray(covariance)


def _own(information: Floats, pull: Floats, mean: Floats, spread: Floats) -> tuple[Floats, Floats]:
    """What is a model's own, and its covariance."""
    covariance = np.linalg.inv(np.diag(1 / spread**2) + information)
    return np.asarray(covariance @ (pull - information @ mean)), np.asarray(covariance)


def _spread(owns: Sequence[tuple[Floats, Floats]], mean: Floats, floor: Floats) -> Floats:
    seen = sum(own**2 + np.diag(covariance) for own, covariance in owns)
    expected = _OWN_WEIGHT * (_OWN_SHARE * np.maximum(mean, floor)) ** 2
    return np.sqrt((expected + seen) / (_OWN_WEIGHT + len(owns)))


def _noise(found: Sequence[tuple[Rows, Floats, Floats]], expected: float) -> Floats:
    """Relative noise by class, drawn towards `expected` where a class has few rows."""
    squares, count = np.zeros(CLASSES), np.zeros(CLASSES)
    for rows, constants, covariance in found:
        error = (rows.terms @ constants - 1) ** 2 + _variance(rows.terms, covariance)
        squares += np.bincount(rows.noise_class, error, CLASSES)
        count += np.bincount(rows.noise_class, minlength=CLASSES)
    return np.sqrt((squares + _NOISE_WEIGHT * expected**2) / (count + _NOISE_WEIGHT))


def _variance(rows: Floats, covariance: Floats) -> Floats:
    return np.asarray(np.maximum(np.einsum("ij,jk,ik->i", rows, covariance, rows), 0.0))


def predicted(rows: Floats, noise_class: Index, prior: Prior, posterior: Posterior) -> tuple[Floats, Floats]:
    """The terms' value, and the relative standard deviation of a whole model's truth around it."""
    value = rows @ posterior.mean
    own = prior.whole_noise[noise_class] * max(1.0, posterior.noisiness)
    share = np.sqrt(_variance(rows, posterior.covariance)) / np.maximum(np.abs(value), 1e-300)
    return value, np.hypot(share, own)


class Width(NamedTuple):
    """A prior's covariance at one strangeness, and a root of it (root root' = covariance)."""

    strangeness: float
    covariance: Floats
    root: Floats

    def with_lines(self, count: int) -> Width:
        """The same with `count` further constants of mean 0, whose size grows with strangeness."""
        size = len(self.covariance)
        wide, root = np.zeros((2, size + count, size + count))
        lines = _LINES * self.strangeness * np.eye(count)
        wide[:size, :size], wide[size:, size:] = self.covariance, lines**2
        root[:size, :size], root[size:, size:] = self.root, lines
        return Width(self.strangeness, wide, root)


def widths(prior: Prior, groups: Mapping[str, tuple[str, ...]], least: float = 0.0) -> tuple[Width, ...]:
    """How wide `prior` may be for another machine: one for each strangeness of at least `least`. `groups` change together."""
    tried = []
    for strangeness in STRANGENESS:
        if strangeness >= least:
            covariance = _widened(prior, groups, strangeness)
            scaled = covariance / np.outer(prior.scale, prior.scale)
            tried.append(Width(strangeness, covariance, _root(scaled) * prior.scale[:, None]))
    return tuple(tried)


def update(
    prior: Prior, rows: Rows, tried: Sequence[Width], factors: tuple[float, float] = (NOISE_FACTOR, NOISE_FACTOR)
) -> Posterior:
    """A model's constants after its fingerprints `rows`, at the width with the most evidence (no rows: the least width).

    `factors` say how far the noise may be from the priors', below `STRANGE` and from there on.
    """
    noise = prior.print_noise[rows.noise_class]
    tried = tried if len(noise) else tried[:1]
    with_lines = [rows.lines is not None and width.strangeness >= STRANGE for width in tried]
    broken = [width for width, lined in zip(tried, with_lines, strict=True) if lined]
    plain = [_directions(prior, rows, width) for width, lined in zip(tried, with_lines, strict=True) if not lined]
    best = max(((*one.evidence(factors), one) for one in plain), key=lambda found: found[0], default=None)
    if broken:
        hopes = _evidence_with_lines(prior, rows, broken, factors)
        if best is None or hopes.max() > best[0]:
            one = _directions(prior, rows, broken[int(np.argmax(hopes))])
            best = *one.evidence(factors), one
    assert best is not None
    evidence, noisiness, one = best
    return one.posterior(evidence, noisiness)


def evidence(prior: Prior, rows: Rows, tried: Sequence[Width]) -> float:
    """How much the fingerprints `rows`, without lines, speak for `prior` at the best of some widths: a logarithm."""
    return max(_directions(prior, rows, width).evidence((NOISE_FACTOR, NOISE_FACTOR))[0] for width in tried)


@dataclass(frozen=True, slots=True)
class _Directions:
    """With prior covariance root root' the measurements speak of independent directions, each with a strength."""

    strangeness: float
    mean: Floats
    covariance: Floats
    root: Floats
    strength: Floats
    seen: Floats
    unseen: float
    count: int

    def evidence(self, factors: tuple[float, float]) -> tuple[float, float]:
        """The most there is, and at which noisiness."""
        noisiness = np.array(NOISINESS if self.count else (1.0,))
        total = noisiness[:, None] ** 2 + self.strength**2
        square = np.sum(self.seen**2 / total, axis=1) + self.unseen / noisiness**2
        grown = np.sum(np.log(total), axis=1) + 2 * max(0, self.count - len(self.strength)) * np.log(noisiness)
        found = -0.5 * (grown + square) - _reluctance(self.strangeness, noisiness, factors)
        at = int(np.argmax(found))
        return float(found[at]), float(noisiness[at])

    def posterior(self, evidence: float, noisiness: float) -> Posterior:
        """The constants at that noisiness."""
        total = noisiness**2 + self.strength**2
        rest = self.covariance - self.root @ self.root.T  # directions that no measurement speaks of
        moved = self.mean + self.root @ (self.strength / total * self.seen)
        covariance = rest + (self.root * noisiness**2 / total) @ self.root.T
        return Posterior(moved, covariance, self.strangeness, noisiness, evidence)


def _directions(prior: Prior, rows: Rows, width: Width) -> _Directions:
    noise = prior.print_noise[rows.noise_class]
    error = (1 - rows.terms @ prior.mean) / noise
    terms, mean, (strangeness, covariance, root) = rows.terms, prior.mean, width
    if rows.lines is not None and strangeness >= STRANGE:
        terms, mean = np.hstack([terms, rows.lines]), np.append(mean, np.zeros(rows.lines.shape[1]))
        _, covariance, root = width.with_lines(rows.lines.shape[1])
    scaled = terms / noise[:, None]
    left, strength, turn = np.linalg.svd(scaled @ root, full_matrices=False)
    seen = left.T @ error
    unseen = max(0.0, float(error @ error - seen @ seen))
    return _Directions(strangeness, mean, covariance, root @ turn.T, strength, seen, unseen, len(noise))


def _reluctance(strangeness: float, noisiness: Floats, factors: tuple[float, float]) -> Floats:
    """What a change must win back: indifferent fingerprints leave prior and noise as they were learned."""
    return np.asarray(np.log1p(strangeness) + 0.5 * (np.log(noisiness) / np.log(factors[strangeness >= STRANGE])) ** 2)


def _evidence_with_lines(prior: Prior, rows: Rows, tried: Sequence[Width], factors: tuple[float, float]) -> Floats:
    """The evidence at each of some widths with lines, at its best noisiness: what `_Directions` finds, without its large SVD.

    Lines are many and independent, so they are integrated out of the noise first (their own eigenvectors, once for all widths)
    and what is left has the size of the terms: with W the noise and lines, K = W + S C S' has
    log |K| = log |W| + log |1 + root' S' W^-1 S root|, and its inverse follows from the same matrix.
    """
    assert rows.lines is not None
    noise = prior.print_noise[rows.noise_class][:, None]
    terms, lines, error = rows.terms / noise, rows.lines / noise, (1 - rows.terms @ prior.mean) / noise[:, 0]
    sizes, vectors = np.linalg.eigh(lines.T @ lines)
    kept = sizes > 1e-12 * sizes[-1]
    sizes, along = sizes[kept], (lines @ vectors[:, kept]) / np.sqrt(sizes[kept])
    terms_in, error_in = along.T @ terms, along.T @ error
    square, pull, whole = terms.T @ terms, terms.T @ error, float(error @ error)
    best = []
    for width in tried:
        lined = (_LINES * width.strangeness) ** 2 * sizes
        variance = np.array(NOISINESS)[:, None] ** 2
        share = lined / (variance + lined)  # of what lies along the lines, how much they take away; [noisiness, lines]
        rest = (square - (terms_in.T[None] * share[:, None]) @ terms_in) / variance[:, :, None]
        left = (pull - (share * error_in) @ terms_in) / variance
        matrix = np.eye(len(square)) + width.root.T @ rest @ width.root
        towards = left @ width.root
        found = np.linalg.solve(matrix, towards[:, :, None])[:, :, 0]
        quadratic = (whole - share @ error_in**2) / variance[:, 0] - np.sum(towards * found, axis=1)
        grown = len(error) * np.log(variance[:, 0]) + np.log1p(lined / variance).sum(axis=1) + np.linalg.slogdet(matrix)[1]
        against = _reluctance(width.strangeness, np.array(NOISINESS), factors)
        best.append(float(np.max(-0.5 * (grown + quadratic) - against)))
    return np.array(best)


def pace_of(prior: Prior, rows: Rows) -> float:
    """How many times slower than `prior` the machine of `rows` is, by their median; 1 where it may be the same machine."""
    if not len(rows.terms):
        return 1.0
    predicted_share = np.sort(np.maximum(rows.terms @ prior.mean, 1e-12))
    pace = float(1 / predicted_share[len(predicted_share) // 2])  # np.median would load numpy.ma first
    return pace if abs(np.log(pace)) > _SAME_PACE else 1.0


def at_pace(rows: Rows, pace: float) -> Rows:
    """The rows as a machine would have measured them that is `pace` times faster: for a prior that knows only that one."""
    if pace == 1.0:
        return rows
    return rows._replace(terms=rows.terms * pace, lines=None if rows.lines is None else rows.lines * pace)


def slowed(posterior: Posterior, pace: float) -> Posterior:
    """Constants of a machine that is `pace` times slower."""
    if pace == 1.0:
        return posterior
    return replace(posterior, mean=posterior.mean * pace, covariance=posterior.covariance * pace**2)


def _root(covariance: Floats) -> Floats:
    """A matrix whose square (times its transpose) is `covariance`; what rounding made negative counts as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _widened(prior: Prior, groups: Mapping[str, tuple[str, ...]], strangeness: float) -> Floats:
    """The prior's covariance for a model of a machine that is `strangeness` away from those it was learned on."""
    width = prior.covariance + np.diag(prior.spread**2 * (1 + (5 * strangeness) ** 2))
    for terms in groups.values():
        together = np.where([term in terms for term in prior.terms], prior.scale, 0.0)
        width = width + (2 * strangeness) ** 2 * np.outer(together, together)
    return width
