"""What a trial of each figure about measurements, fingerprints and estimates means: numbers of the authors, or from them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from systems.common.core import Outcome, Scalar, Trial
from systems.common.errors import InputError
from systems.maveriq import fit
from systems.maveriq.configuration import Configuration, Estimates, Estimator, Floats, Question, known_models
from systems.maveriq.estimator import MODES, make_estimator
from systems.maveriq.exponents import published_exponents
from systems.maveriq.fingerprint import PAPER_GRID, Fingerprints, Point, Setting, read_fingerprints
from systems.maveriq.improved import ImprovedEstimator
from systems.maveriq.law import parallel_memory_gib

DATASET = "maveriq_a6000"
PRINTS, SHORT, WHOLE = "fingerprint_data_collection.csv", "fingerprint_data_collection_BS.csv", "full_model_data_collection.csv"
SCALING, UNEVEN = "fingerprint_scaling_data.csv", "unbalanced_PP_data_collection.csv"
NOTE = "hardware model: published (the authors' measurements on 8 x RTX A6000)"
LEFT_OUT = "improved mode never uses whole-model measurements of the model that it estimates"
COSTS: Mapping[str, Callable[[Any, Any, Any], Any]] = {
    "min_cost": lambda latency_s, memory_gib, _gpus: latency_s * memory_gib,
    "min_lat": lambda latency_s, _memory_gib, _gpus: latency_s,
    "min_mem": lambda _latency_s, memory_gib, _gpus: memory_gib,
    "min_gpu_cost": lambda latency_s, _memory_gib, gpus: latency_s * gpus,
}


def parallelism(trial: Trial) -> Outcome:
    """One layout of `model` at fp16: `metric` (latency, memory, memory_per_gpu, cost, gpu_s) over that of the worst layout."""
    whole = read(trial, WHOLE)
    model, length = text(trial, "model"), whole_number(trial, "output_length", 100)
    rows = {s.layout: p for s, p in whole.points.items() if fits(s, model, ("float16", False), length)}
    values = {layout: _worth(text(trial, "metric"), point, layout) for layout, point in rows.items()}
    at = whole_number(trial, "tp"), whole_number(trial, "pp")
    mine, best, worst = values.get(at, math.nan), min(values.values()), max(values.values())
    return Outcome({"share": mine / worst, "value": mine, "best": int(mine == best)}, notes=(NOTE,))


def _worth(metric: str, point: Point, layout: tuple[int, int]) -> float:
    gpus = layout[0] * layout[1]
    worths = {
        "latency": point.latency_s,
        "memory": point.memory_gib,
        "memory_per_gpu": point.memory_gib / gpus,
        "cost": point.latency_s * point.memory_gib,
        "gpu_s": point.latency_s * gpus,
    }
    if metric not in worths:
        raise bad("metric", metric, f"use one of {', '.join(worths)}")
    return worths[metric]


def uneven(trial: Trial) -> Outcome:
    """Latency of `model` at `batch` with layer map number `map` (0: the balanced one), and how far it is from map 0."""
    with (folder(trial) / UNEVEN).open(newline="", encoding="utf-8") as stream:
        rows = [
            row
            for row in csv.DictReader(stream)
            if row["Model"] == text(trial, "model") and int(row["Batch_Size"]) == whole_number(trial, "batch")
        ]
    place = whole_number(trial, "map", least=0)
    if place >= len(rows):
        return Outcome({"latency_s": math.nan, "deviation_percent": math.nan, "pp_map": ""}, notes=(NOTE,))
    latencies = [float(row["Latency"]) for row in rows]
    deviation = 100 * abs(latencies[place] / latencies[0] - 1)
    found: dict[str, Scalar] = {"latency_s": latencies[place], "deviation_percent": deviation, "pp_map": rows[place]["PP_Map"]}
    return Outcome(found, notes=(NOTE,))


def quantisation(trial: Trial) -> Outcome:
    """Latency of `model` at `dtype` on the smallest layout that holds it at fp16; how many times faster than fp16."""
    whole = read(trial, WHOLE)
    model, length = text(trial, "model"), whole_number(trial, "output_length", 100)
    base = {s.layout: p for s, p in whole.points.items() if fits(s, model, ("float16", False), length)}
    layout = min(base, key=lambda at: (at[0] * at[1], at[0]))
    mine = {s.layout: p for s, p in whole.points.items() if fits(s, model, (text(trial, "dtype"), False), length)}
    latency_s = mine[layout].latency_s if layout in mine else math.nan
    return Outcome(
        {"latency_s": latency_s, "speedup": base[layout].latency_s / latency_s, "layout": str(layout)}, notes=(NOTE,)
    )


def scaling(trial: Trial) -> Outcome:
    """Llama-2-7B with `layers` layers on one GPU, 100 tokens: `what` is measured, or the line through one and two layers."""
    measured = read(trial, SCALING)
    rows = {s.layers: p for s, p in measured.points.items() if s.layout == (1, 1)}
    layers = whole_number(trial, "layers")
    if layers not in rows:
        raise bad("layers", layers, f"measured are {', '.join(map(str, sorted(rows)))}")
    if text(trial, "what") == "measured":
        point = rows[layers]
        return Outcome({"latency_s": point.latency_s, "memory_gib": point.memory_gib}, notes=(NOTE,))
    one, two = rows[1], rows[2]
    line = [
        getattr(one, name) + (layers - 1) * (getattr(two, name) - getattr(one, name)) for name in ("latency_s", "memory_gib")
    ]
    return Outcome({"latency_s": line[0], "memory_gib": line[1]}, notes=(NOTE,))


def profiling(trial: Trial) -> Outcome:
    """Error and cost of one way to know `model` (`method`): `brute_force`, `full_model`, `fingerprint` or `improved`.

    Errors are medians over its configurations at 100 tokens; costs count `Time-Prof` alone, for output lengths of 10 and 20
    (whole models and fingerprints alike), as the authors do: `profiling_s` wall time, `gpu_h` GPUs x time, `peak_gib` the most.
    """
    prints, whole = read(trial, PRINTS), read(trial, WHOLE)
    model, method = text(trial, "model"), text(trial, "method")
    mine = prints.select(s for s in prints.points if s.model == model)
    truth = whole.select(s for s in whole.points if s.model == model and s.output_length == 100)
    if method == "brute_force":
        used, latency, memory = (
            whole.select(s for s in whole.points if s.model == model and s.output_length in (10, 20)),
            None,
            None,
        )
    elif method == "full_model":
        used, latency, memory = _full_model(whole, truth, model)
    elif method in ("fingerprint", "improved"):
        estimator = make_estimator(prints, "paper" if method == "fingerprint" else "improved")
        found = estimator.estimate_many(questions(truth))
        latency, memory = found.latency_s, found.memory_gib
        if isinstance(estimator, ImprovedEstimator):
            used = estimator.used(model)
        else:
            used = mine.select(s for s in mine.points if s.layout in PAPER_GRID.layouts)
    else:
        raise bad("method", method, "use brute_force, full_model, fingerprint or improved")
    off = [
        0.0 if estimates is None else 100 * float(np.median(np.abs(estimates / column(truth, name) - 1)))
        for estimates, name in ((latency, "latency_s"), (memory, "memory_gib"))
    ]
    found_: dict[str, Scalar] = {
        "latency_error_percent": off[0],
        "memory_error_percent": off[1],
        "peak_gib": max(point.memory_gib for point in used.points.values()),
        "profiling_s": sum(point.profiling_s for point in used.points.values()),
        "gpu_h": used.gpu_seconds() / 3600,
        "points": len(used.points),
    }
    return Outcome(found_, notes=(NOTE, LEFT_OUT) if method == "improved" else (NOTE,))


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
    whole = read(trial, WHOLE)
    used = whole.select(s for s in whole.points if s.model == text(trial, "model") and s.output_length in (10, 20))
    seconds = sum(point.profiling_s for point in used.points.values()) / 2
    peak = max(point.memory_gib for point in used.points.values())
    values: dict[str, Scalar] = {
        "latency_error_percent": 0.0, "gpu_h": used.gpu_seconds() / 2 / 3600, "profiling_s": seconds, "peak_gib": peak,
    }  # fmt: skip
    return Outcome(values, notes=(NOTE,))


def error(trial: Trial) -> Outcome:
    """Errors of `mode` over all configurations of `model` (`all` for every one) at `output_length`, in percent, and by TP."""
    found, truth = judged(trial)
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
    found, truth = judged(trial)
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
    "parallelism": parallelism,
    "uneven_pipelines": uneven,
    "quantisation": quantisation,
    "fingerprint_scaling": scaling,
    "profiling": profiling,
    "batch_estimate": batch,
    "batch_error": batch_error,
    "profiling_cost": profiling_cost,
    "estimator_error": error,
    "decision_regret": regret,
    "interval_coverage": coverage,
    "exponent_fit": exponents,
}


# what the experiments share


@lru_cache(maxsize=8)
def _read(file: Path, even_only: bool) -> Fingerprints:
    return read_fingerprints(file, even_only=even_only)


def folder(trial: Trial) -> Path:
    """The dataset's folder. Raises InputError when it is not there: nothing can stand in for measurements."""
    found = trial.datasets.get(DATASET)
    if found is None:
        raise bad("datasets", DATASET, "it has no stand-in: set dataset_mirror to a folder that holds it, or go online")
    return found


def read(trial: Trial, name: str, *, even_only: bool = False) -> Fingerprints:
    """One of the dataset's files; every process reads it once."""
    return _read(folder(trial) / name, even_only)


def fits(s: Setting, model: str, precision: tuple[str, bool], length: int) -> bool:
    """Whether a setting is of this model, precision and output length, at batch 1."""
    return (s.model, s.precision, s.output_length, s.batch) == (model, precision, length, 1)


def questions(truth: Fingerprints) -> list[Question]:
    """Questions whose answers `truth` holds, in its order."""
    return [Question(s.model, Configuration(s.tp, s.pp, s.dtype, s.int8_kv), s.batch, s.output_length) for s in truth.points]


def column(truth: Fingerprints, name: str) -> Floats:
    """One number of every point, in order."""
    return np.array([getattr(point, name) for point in truth.points.values()], dtype=np.float64)


def judged(trial: Trial) -> tuple[Estimates, Fingerprints]:
    """Estimates of `mode` for `model` (or `all`) at `output_length`, and the truth."""
    whole, length = read(trial, WHOLE), whole_number(trial, "output_length", 100)
    model = text(trial, "model", default="all")
    truth = whole.select(s for s in whole.points if s.output_length == length and model in ("all", s.model))
    if not truth.points:
        raise bad("model", model, f"measured are all, {', '.join(whole.models)}, at 10, 20, 50, 100 and 200 tokens")
    return _estimator(trial).estimate_many(questions(truth)), truth


def _estimator(trial: Trial) -> Estimator:
    return make_estimator(read(trial, PRINTS), text(trial, "mode", MODES))


def text(trial: Trial, key: str, known: tuple[str, ...] = (), default: str | None = None) -> str:
    """A parameter that is a word, one of `known` where given."""
    value = trial.parameters.get(key, default)
    if not isinstance(value, str) or (known and value not in known):
        raise bad(key, value, f"use one of {', '.join(known)}" if known else "give a word")
    return value


def whole_number(trial: Trial, key: str, default: int | None = None, least: int = 1) -> int:
    """A parameter that is a whole number of at least `least`."""
    value = trial.parameters.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise bad(key, value, f"give a whole number of at least {least}")
    return int(value)


def bad(key: str, value: object, mend: str) -> InputError:
    """An error about a figure's parameter."""
    return InputError("maveriq", key, value, mend)
