"""What a trial of each figure about fingerprints and estimates means: estimates of both modes against the authors' numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from systems.common.core import Outcome, Scalar, Trial
from systems.maveriq import fit
from systems.maveriq.configuration import Configuration, Estimates, Floats, known_models
from systems.maveriq.estimator import MODES, make_estimator
from systems.maveriq.experiments_data import (
    NOTE,
    PRINTS,
    SHORT,
    UNEVEN,
    WHOLE,
    bad,
    column,
    questions,
    read,
    text,
    whole_number,
)
from systems.maveriq.exponents import published_exponents
from systems.maveriq.fingerprint import PAPER_GRID, Fingerprints, Setting
from systems.maveriq.improved import ImprovedEstimator
from systems.maveriq.law import parallel_memory_gib

LEFT_OUT = "improved mode never uses whole-model measurements of the model that it estimates"
METHODS = ("brute_force", "full_model", "fingerprint", "improved")
COSTS: Mapping[str, Callable[[Any, Any, Any], Any]] = {
    "min_cost": lambda latency_s, memory_gib, _gpus: latency_s * memory_gib,
    "min_lat": lambda latency_s, _memory_gib, _gpus: latency_s,
    "min_mem": lambda _latency_s, memory_gib, _gpus: memory_gib,
    "min_gpu_cost": lambda latency_s, _memory_gib, gpus: latency_s * gpus,
}


def profiling(trial: Trial) -> Outcome:
    """Error and cost of one way to know `model` (`method`): `brute_force`, `full_model`, `fingerprint` or `improved`.

    Errors are medians over its configurations at 100 tokens; costs count `Time-Prof` alone, for output lengths of 10 and 20
    (whole models and fingerprints alike), as the authors do: `profiling_s` wall time, `gpu_h` GPUs x time, `peak_gib` the most.
    """
    whole, model, method = read(trial, WHOLE), text(trial, "model"), text(trial, "method", METHODS)
    truth = whole.select(s for s in whole.points if s.model == model and s.output_length == 100)
    if method == "brute_force":
        used, latency, memory = _brute_force(whole, model), None, None
    elif method == "full_model":
        used, latency, memory = _full_model(whole, truth, model)
    else:
        used, latency, memory = _from_fingerprints(read(trial, PRINTS), truth, model, method)
    off = [
        0.0 if estimates is None else 100 * float(np.median(np.abs(estimates / column(truth, name) - 1)))
        for estimates, name in ((latency, "latency_s"), (memory, "memory_gib"))
    ]
    values: dict[str, Scalar] = {
        "latency_error_percent": off[0],
        "memory_error_percent": off[1],
        "peak_gib": max(point.memory_gib for point in used.points.values()),
        "profiling_s": sum(point.profiling_s for point in used.points.values()),
        "gpu_h": used.gpu_seconds() / 3600,
        "points": len(used.points),
    }
    return Outcome(values, notes=(NOTE, LEFT_OUT) if method == "improved" else (NOTE,))


def _brute_force(whole: Fingerprints, model: str) -> Fingerprints:
    """Every configuration whole, for the output lengths of fingerprints."""
    return whole.select(s for s in whole.points if s.model == model and s.output_length in PAPER_GRID.output_lengths)


def _from_fingerprints(
    prints: Fingerprints, truth: Fingerprints, model: str, method: str
) -> tuple[Fingerprints, Floats, Floats]:
    """The fingerprints of `model` that a mode uses, and its estimates of `truth`: latency (s) and memory (GiB)."""
    estimator = make_estimator(prints, "paper" if method == "fingerprint" else "improved")
    found = estimator.estimate_many(questions(truth))
    if isinstance(estimator, ImprovedEstimator):
        return estimator.used(model), found.latency_s, found.memory_gib
    paper = prints.select(s for s in prints.points if s.model == model and s.layout in PAPER_GRID.layouts)
    return paper, found.latency_s, found.memory_gib


def _full_model(whole: Fingerprints, truth: Fingerprints, model: str) -> tuple[Fingerprints, Floats, Floats]:
    """The authors' other method: laws from whole models on three layouts, by their shipped algebra and exponents."""
    used: set[Setting] = set()
    latency, memory = dict[Setting, float](), dict[Setting, float]()
    for precision in {s.precision for s in truth.points}:
        points = fit.points_from_whole(whole.select(s for s in whole.points if s.model == model), known_models(), precision)
        settings = sorted(s for s in whole.points if s.model == model and s.precision == precision and s.batch == 1)
        with np.errstate(all="ignore"):
            exponents = np.array(published_exponents("full_model")[precision])
            values = fit.estimated(points, exponents, "full_model_shipped").value
        latency |= dict(zip(settings, values.tolist(), strict=True))
        layouts = {s.layout for s in settings}
        three = next(
            three
            for three in (((1, 1), (1, 2), (2, 1)), ((1, 2), (1, 3), (2, 1)), ((1, 3), (1, 4), (2, 2)), ((1, 1), (1, 2)))
            if set(three) <= layouts
        )
        used |= {s for s in settings if s.layout in three and s.output_length in (10, 20)}
        gib = {s.layout: whole.points[s].memory_gib for s in settings if s.output_length == 10}
        bases = _memory_bases(gib, three)
        for s in settings:
            memory[s] = float(parallel_memory_gib(*bases, s.tp, s.pp))
    order = list(truth.points)
    return whole.select(used), np.array([latency[s] for s in order]), np.array([memory[s] for s in order])


def _memory_bases(gib: Mapping[tuple[int, int], float], three: tuple[tuple[int, int], ...]) -> tuple[float, float, float]:
    """Memory on (1,1), (1,2) and (2,1) from the three layouts measured, by the memory law."""
    if three[0] == (1, 1):
        return gib[1, 1], gib[1, 2], gib.get((2, 1), gib[1, 1])
    first, second = (gib[at] for at in three[:2])
    stage = second - first
    single = first - (three[0][1] - 1) * stage
    tp, pp = three[2]
    return single, single + stage, gib[tp, pp] - tp * (pp - 1) * stage


def batch(trial: Trial) -> Outcome:
    """An estimate by `mode` at `batch`, 100 tokens after a short prompt: Llama-2-7B int4 on (2,4) unless said otherwise."""
    estimator = make_estimator(read(trial, SHORT), text(trial, "mode", MODES))
    configuration = Configuration(
        whole_number(trial, "tp", 2), whole_number(trial, "pp", 4), text(trial, "dtype", default="int4"), False
    )
    model = text(trial, "model", default="llama-2-7b")
    found = estimator.estimate(model, configuration, batch=whole_number(trial, "batch"), output_length=100)
    values: dict[str, Scalar] = {
        "latency_s": found.latency_s,
        "latency_low_s": found.latency_low_s,
        "latency_high_s": found.latency_high_s,
        "memory_gib": found.memory_gib,
    }
    return Outcome(values, notes=(NOTE,))


def batch_error(trial: Trial) -> Outcome:
    """Error of `mode` at `batch`, signed, in percent: fp16 on (1,8) or (1,4), 100 tokens, short prompts (the balanced runs)."""
    truth = read(trial, UNEVEN, even_only=True)
    size = whole_number(trial, "batch")
    asked = truth.select(s for s in truth.points if s.batch == size and s.model == text(trial, "model"))
    found = make_estimator(read(trial, SHORT), text(trial, "mode", MODES)).estimate_many(questions(asked))
    latency, memory = found.latency_s / column(asked, "latency_s"), found.memory_gib / column(asked, "memory_gib")
    return Outcome(
        {
            "error_percent": 100 * float(np.abs(latency - 1).max()),
            "signed_percent": 100 * float(latency[0] - 1),
            "memory_signed_percent": 100 * float(memory[0] - 1),
        },
        notes=(NOTE, LEFT_OUT),
    )


def profiling_cost(trial: Trial) -> Outcome:
    """`profiling`, but `brute_force` counts each configuration once (the mean of 10 and 20 tokens): what AlpaServe needs."""
    if text(trial, "method") != "brute_force":
        return profiling(trial)
    used = _brute_force(read(trial, WHOLE), text(trial, "model"))
    seconds = sum(point.profiling_s for point in used.points.values()) / 2
    peak = max(point.memory_gib for point in used.points.values())
    values: dict[str, Scalar] = {
        "latency_error_percent": 0.0, "gpu_h": used.gpu_seconds() / 2 / 3600, "profiling_s": seconds, "peak_gib": peak,
    }  # fmt: skip
    return Outcome(values, notes=(NOTE,))


def _judged(trial: Trial) -> tuple[Estimates, Fingerprints]:
    """Estimates of `mode` for `model` (or `all`) at `output_length`, and the truth."""
    whole, length = read(trial, WHOLE), whole_number(trial, "output_length", 100)
    model = text(trial, "model", default="all")
    truth = whole.select(s for s in whole.points if s.output_length == length and model in ("all", s.model))
    if not truth.points:
        raise bad("model", model, f"measured are all, {', '.join(whole.models)}, at 10, 20, 50, 100 and 200 tokens")
    estimator = make_estimator(read(trial, PRINTS), text(trial, "mode", MODES))
    return estimator.estimate_many(questions(truth)), truth


def error(trial: Trial) -> Outcome:
    """Errors of `mode` over all configurations of `model` (`all` for every one) at `output_length`, in percent, and by TP."""
    found, truth = _judged(trial)
    latency = found.latency_s / column(truth, "latency_s") - 1
    memory = found.memory_gib / column(truth, "memory_gib") - 1
    tp = np.array([s.tp for s in truth.points])
    values: dict[str, Scalar] = {
        "median_percent": 100 * float(np.median(np.abs(latency))),
        "mean_percent": 100 * float(np.abs(latency).mean()),
        "p90_percent": 100 * float(np.percentile(np.abs(latency), 90)),
        "median_s": float(np.median(np.abs(found.latency_s - column(truth, "latency_s")))),
        "memory_median_percent": 100 * float(np.median(np.abs(memory))),
        "memory_p90_percent": 100 * float(np.percentile(np.abs(memory), 90)),
        "memory_median_gib": float(np.median(np.abs(found.memory_gib - column(truth, "memory_gib")))),
        "configurations": len(latency),
    }
    for ranks in (1, 2, 4, 8):
        values[f"bias_tp{ranks}_percent"] = 100 * float(latency[tp == ranks].mean()) if (tp == ranks).any() else math.nan
    return Outcome(values, notes=(NOTE, LEFT_OUT))


def regret(trial: Trial) -> Outcome:
    """True cost of what `mode` would choose by `intent`, over the least true cost: mean and worst over models."""
    found, truth = _judged(trial)
    settings = list(truth.points)
    cost = COSTS[text(trial, "intent", tuple(COSTS))]
    gpus = np.array([s.tp * s.pp for s in settings])
    guessed, true = (
        cost(found.latency_s, found.memory_gib, gpus),
        cost(column(truth, "latency_s"), column(truth, "memory_gib"), gpus),
    )
    regrets = []
    for model in sorted({s.model for s in settings}):
        mine = np.array([place for place, s in enumerate(settings) if s.model == model])
        regrets.append(float(true[mine[guessed[mine].argmin()]] / true[mine].min()))
    return Outcome({"regret_mean": float(np.mean(regrets)), "regret_worst": max(regrets)}, notes=(NOTE, LEFT_OUT))


def coverage(trial: Trial) -> Outcome:
    """Share of truths in the intervals of improved mode at `level_percent`, over models left out, all output lengths."""
    truth = read(trial, WHOLE)
    estimator = ImprovedEstimator(read(trial, PRINTS), known_models(), level=whole_number(trial, "level_percent") / 100)
    found = estimator.estimate_many(questions(truth))
    what = text(trial, "what", ("latency", "memory"))
    true, low, high = (
        (column(truth, "latency_s"), found.latency_low_s, found.latency_high_s)
        if what == "latency"
        else (column(truth, "memory_gib"), found.memory_low_gib, found.memory_high_gib)
    )
    held = (low <= true) & (true <= high)
    models = [s.model for s in truth.points]
    each = [float(held[np.array([m == model for m in models])].mean()) for model in sorted(set(models))]
    values: dict[str, Scalar] = {
        "coverage_percent": 100 * float(held.mean()),
        "least_of_models_percent": 100 * min(each),
        "width_percent": 100 * float(np.median(high / low) - 1),
    }
    return Outcome(values, notes=(NOTE, LEFT_OUT))


def exponents(trial: Trial) -> Outcome:
    """Errors at 100 tokens of the law with exponents fitted by `method` `fitted_on` all, few or other models' points."""
    method, way = text(trial, "method", fit.METHODS), text(trial, "fitted_on")
    ways = () if way == "published exponents" else (way,)
    prints, whole = read(trial, PRINTS), read(trial, WHOLE)
    rows = fit.table(prints, whole, known_models(), trial.seed, methods=(method,), ways=ways)
    row = next((row for row in rows if row.fitted_on == way), None)
    if row is None:
        return Outcome({"median_percent": math.nan, "mean_percent": math.nan, "p90_percent": math.nan}, notes=(NOTE,))
    return Outcome(
        {"median_percent": 100 * row.median, "mean_percent": 100 * row.mean, "p90_percent": 100 * row.p90}, notes=(NOTE,)
    )


ESTIMATOR_EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {
    "profiling": profiling,
    "batch_estimate": batch,
    "batch_error": batch_error,
    "profiling_cost": profiling_cost,
    "estimator_error": error,
    "decision_regret": regret,
    "interval_coverage": coverage,
    "exponent_fit": exponents,
}
