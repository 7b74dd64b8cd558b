"""Fit the exponents of the paper's parallelism law by gradient descent (sheet 2.5), and say how good they are.

    python -m systems.maveriq.fit --fingerprints FINGERPRINTS.csv --whole WHOLE.csv [--seed 0] [--out TABLE.csv]

One fit per precision. Two methods: from fingerprints (R and TPo from them, PPo = R (1 - 2^-alpha)) and from whole models on
three layouts. Loss is the mean of |estimate - truth| / truth over output lengths of 10 to 200; Adam at 0.1, halved after 20
epochs without progress, at most 1000 epochs, stopped after 100 without progress, exponents at or above 1e-6, the best ones
kept. Unlike the authors' fit it is seeded, and gradients flow through everything that depends on an exponent (theirs rebuild R,
TPo and PPo without gradients).
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from systems.common.errors import InputError
from systems.maveriq.configuration import Floats, ModelFacts, Precision, known_models
from systems.maveriq.dual import Dual, choose, constant, parameter, raised
from systems.maveriq.estimator_paper import PaperEstimator
from systems.maveriq.exponents import published_exponents
from systems.maveriq.files import write
from systems.maveriq.fingerprint import Fingerprints, Setting, read_fingerprints
from systems.maveriq.law import Exponents

METHODS = ("fingerprint", "full_model", "full_model_shipped")
ALL_POINTS, FIVE_POINTS, LEAVE_ONE_OUT = WAYS = ("all points", "five points per model", "leave one model out")
STARTS: Mapping[str, tuple[float, float, float, float]] = {
    "fingerprint": (0.05, 0.75, 0.5, 0.1),
    "full_model": (0.05, 0.75, 0.5, 1.2),
    "full_model_shipped": (0.05, 0.75, 0.5, 1.2),
}
LEARNING_RATE, EPOCHS, PATIENCE, STOP, LEAST = 0.1, 1000, 20, 100, 1e-6
_BETA_1, _BETA_2, _TINY = 0.9, 0.999, 1e-8
POINTS_PER_MODEL = 5
JUDGED_AT = 100
"""Output length at which the authors report errors (sheet 5, F-prof)."""


class Points(NamedTuple):
    """Whole-model latencies of one precision and what the law starts from, as arrays, seconds.

    `known` holds per point the latencies of five layouts at its output length: (1,1), (2,1) and, for whole models, the two
    smallest pipelines that fit, (1,p) and (1,p+1) with p >= 2, and (2,p); NaN where a layout was not measured.
    """

    model: np.ndarray
    tp: Floats
    pp: Floats
    length: Floats
    truth_s: Floats
    known: Floats
    shallow: Floats
    """p."""

    def keep(self, which: np.ndarray) -> Points:
        """Some of them."""
        return Points(*(column[which] for column in self))


def points_from_fingerprints(estimator: PaperEstimator, whole: Fingerprints, precision: Precision) -> Points:
    """Training points of the fingerprint method: R and L(2,1) come from fingerprints, the truth from whole models."""
    settings = _of(whole, precision)
    known = []
    for s in settings:
        found = estimator.extrapolated(s.model, precision, s.batch)
        lines = (line.ttft_s + s.output_length * line.tpot_s for line in (found.single, found.split))
        known.append([*lines, np.nan, np.nan, np.nan])
    return _points(whole, settings, known, [2.0] * len(settings))


def points_from_whole(whole: Fingerprints, models: Mapping[str, ModelFacts], precision: Precision) -> Points:
    """Training points of the full-model method: everything from whole models, on the smallest layouts that they fit."""
    settings = _of(whole, precision)
    known, shallow = [], []
    for s in settings:

        def latency(tp: int, pp: int, of: Setting = s) -> float:
            point = whole.points.get(Setting(of.model, tp, pp, *precision, of.layers, of.output_length, of.batch))
            return np.nan if point is None else point.latency_s

        first = 2 if not np.isnan(latency(1, 2)) else 3
        split = latency(1, 1) / 2 if not models[s.model].tensor_parallel else latency(2, 1)
        known.append([latency(1, 1), split, latency(1, first), latency(1, first + 1), latency(2, first)])
        shallow.append(float(first))
    return _points(whole, settings, known, shallow)


def _of(whole: Fingerprints, precision: Precision) -> list[Setting]:
    return sorted(s for s in whole.points if s.precision == precision and s.batch == 1)


def _points(
    whole: Fingerprints, settings: Sequence[Setting], known: Sequence[Sequence[float]], shallow: Sequence[float]
) -> Points:
    columns = np.array([(s.tp, s.pp, s.output_length, whole.points[s].latency_s) for s in settings], dtype=np.float64)
    tp, pp, length, truth_s = columns.reshape(-1, 4).T
    names = np.array([s.model for s in settings])
    return Points(names, tp, pp, length, truth_s, np.array(known).reshape(-1, 5), np.array(shallow))


def estimated(points: Points, exponents: Floats, method: str) -> Dual:
    """The law's latencies, seconds, and their derivatives by the four exponents."""
    count = len(points.truth_s)
    alpha, beta, gamma, delta = (parameter(exponents, place, count) for place in range(4))
    single, ranks, stages = _bases(points, (alpha, gamma, delta), method)
    shared = single / (raised(points.pp, alpha) * points.tp)
    return shared + raised(points.tp - 1, beta) / raised(points.pp, gamma) * ranks + raised(points.pp - 1, delta) * stages


def _bases(points: Points, exponents: tuple[Dual, Dual, Dual], method: str) -> tuple[Dual, Dual, Dual]:
    """R, TPo and PPo. Where a model doesn't fit on one GPU, R solves the law for the two smallest pipelines."""
    alpha, gamma, delta = exponents
    one, two, first, second, both = (constant(np.nan_to_num(column), 4) for column in points.known.T)
    p = points.shallow
    if method == "fingerprint":
        # the authors' lookup of L(1,2) forces PP = 1 (sheet 2.4)
        return one, (two - one / 2.0).positive(), (one - one / raised(np.full_like(p, 2.0), alpha)).positive()
    # L(1,p) = R / p^a + (p-1)^d PPo, and the same for p + 1: eliminate PPo
    steep = raised(p / (p - 1), delta)
    below = constant(np.ones_like(p), 4) / raised(p + 1, alpha) - steep / raised(p, alpha)
    if method == "full_model_shipped":  # their first case has 2^(d-1) where the algebra gives 2^(d-a)
        shipped = constant(np.ones_like(p), 4) / raised(p + 1, alpha) - raised(np.full_like(p, 2.0), delta) / 2.0
        below = choose(p == 2, shipped, below)
    solved = (second - steep * first) / below
    fits = ~np.isnan(points.known[:, 0])
    single = choose(fits, one, solved)
    stages = ((first - single / raised(p, alpha)) / raised(p - 1, delta)).positive()
    # L(2,p) = R / (2 p^a) + TPo / p^g + (p-1)^d PPo, where (2,1) does not fit either
    deep = (both - single / (raised(p, alpha) * 2.0) - raised(p - 1, delta) * stages) * raised(p, gamma)
    ranks = choose(~np.isnan(points.known[:, 1]), two - single / 2.0, deep).positive()
    return single, ranks, stages


def adam(loss: Callable[[Floats], tuple[float, Floats]], start: Sequence[float]) -> tuple[Floats, float, int]:
    """Minimise `loss` (value and gradient) from `start`: the best parameters, their loss, and the epochs taken."""
    now = np.array(start, dtype=np.float64)
    first, second = np.zeros_like(now), np.zeros_like(now)
    best, best_loss, since, waited, rate, steps = now, np.inf, 0, 0, LEARNING_RATE, 0
    for epoch in range(EPOCHS):
        value, gradient = loss(now)
        if value < best_loss - 1e-9:
            best, best_loss, since, waited = now, value, 0, 0
        else:
            since, waited = since + 1, waited + 1
        if since >= STOP:
            return best, best_loss, epoch + 1
        if waited > PATIENCE:
            rate, waited = rate / 2, 0
        if not np.isfinite(gradient).all():
            now = np.maximum((now + best) / 2, LEAST)
            continue
        steps += 1
        first = _BETA_1 * first + (1 - _BETA_1) * gradient
        second = _BETA_2 * second + (1 - _BETA_2) * gradient**2
        move = first / (1 - _BETA_1**steps) / (np.sqrt(second / (1 - _BETA_2**steps)) + _TINY)
        now = np.maximum(now - rate * move, LEAST)
    return best, best_loss, EPOCHS


def fit_exponents(points: Points, method: str = "fingerprint") -> Exponents:
    """The exponents with the least mean relative error on `points`."""

    def loss(exponents: Floats) -> tuple[float, Floats]:
        off = estimated(points, exponents, method) / points.truth_s - 1.0
        return float(np.mean(np.abs(off.value))), np.mean(np.sign(off.value) * off.slope, axis=1)

    with np.errstate(all="ignore"):  # a step may leave the numbers' range: such steps are skipped
        return Exponents(*(float(value) for value in adam(loss, STARTS[method])[0]))


def few(points: Points, seed: int) -> Points:
    """Five random points per model, as the authors keep them."""
    random = np.random.default_rng(seed)
    chosen = [
        random.choice(places, min(POINTS_PER_MODEL, len(places)), replace=False)
        for places in (np.flatnonzero(points.model == model) for model in sorted(set(points.model)))
    ]
    return points.keep(np.sort(np.concatenate(chosen)))


def errors(points: Points, exponents: Exponents, method: str = "fingerprint") -> Floats:
    """Relative errors at the output length that the authors judge by."""
    judged = points.keep(points.length == JUDGED_AT)
    with np.errstate(all="ignore"):
        return np.asarray(estimated(judged, np.array(exponents), method).value / judged.truth_s - 1)


@dataclass(frozen=True, slots=True)
class Row:
    """One way of fitting: errors over all configurations of all precisions, relative, and the seconds that its fits took."""

    method: str
    fitted_on: str
    median: float
    mean: float
    p90: float
    fit_s: float


def table(
    fingerprints: Fingerprints,
    whole: Fingerprints,
    models: Mapping[str, ModelFacts],
    seed: int = 0,
    methods: Sequence[str] = METHODS,
    ways: Sequence[str] = WAYS,
) -> list[Row]:
    """How good exponents are: published, refit on all points, on five per model, and for each model on the others."""
    estimator = PaperEstimator(fingerprints, models)
    precisions = sorted({s.precision for s in whole.points})
    rows = []
    for method in methods:
        data = {}
        for precision in precisions:
            of_prints = method == "fingerprint"
            data[precision] = (
                points_from_fingerprints(estimator, whole, precision)
                if of_prints
                else points_from_whole(whole, models, precision)
            )
        rows += [_published(method, data), *(_refit(method, way, data, seed) for way in ways)]
    return [row for row in rows if row is not None]


def _published(method: str, data: Mapping[Precision, Points]) -> Row | None:
    if method == "full_model":  # theirs go with the algebra that they shipped
        return None
    exponents = published_exponents("fingerprint" if method == "fingerprint" else "full_model")
    offs = [errors(points, exponents[precision], method) for precision, points in data.items() if precision in exponents]
    return _row(method, "published exponents", offs, 0.0)


def _refit(method: str, way: str, data: Mapping[Precision, Points], seed: int) -> Row:
    began = time.perf_counter()
    offs = []
    for points in data.values():
        if way == LEAVE_ONE_OUT:
            for model in sorted(set(points.model)):
                others = points.keep(points.model != model)
                exponents = fit_exponents(others, method) if len(others.truth_s) else Exponents(*STARTS[method])
                offs.append(errors(points.keep(points.model == model), exponents, method))
        else:
            offs.append(errors(points, fit_exponents(few(points, seed) if way == FIVE_POINTS else points, method), method))
    return _row(method, way, offs, time.perf_counter() - began)


def _row(method: str, fitted_on: str, offs: Sequence[Floats], fit_s: float) -> Row:
    off = np.abs(np.concatenate(offs))
    off = off[np.isfinite(off)]
    return Row(method, fitted_on, float(np.median(off)), float(off.mean()), float(np.percentile(off, 90)), fit_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    options = argparse.ArgumentParser(
        prog="python -m systems.maveriq.fit", description="Refit the law's exponents and judge them."
    )
    options.add_argument("--fingerprints", type=Path, required=True, help="CSV file of fingerprints")
    options.add_argument("--whole", type=Path, required=True, help="CSV file of whole models, with the same columns")
    options.add_argument("--seed", type=int, default=0, help="for the choice of five points per model (%(default)s)")
    options.add_argument("--out", type=Path, help="CSV file for the table")
    given = options.parse_args(arguments)
    try:
        found = table(read_fingerprints(given.fingerprints), read_fingerprints(given.whole), known_models(), given.seed)
        if given.out is not None:
            write(given.out, _csv(found))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'method':20}{'exponents':24}{'median':>8}{'mean':>8}{'p90':>8}{'fit':>8}")
    for row in found:
        shares = "".join(f"{100 * value:7.2f}%" for value in (row.median, row.mean, row.p90))
        print(f"{row.method:20}{row.fitted_on:24}{shares}{row.fit_s:7.1f}s")
    return 0


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__slots__)
    writer.writerows([getattr(row, name) for name in Row.__slots__] for row in rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
