"""What a trial of each serving figure means: four systems on the artifact's traces, and the load strategies over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from systems.common.core import Outcome, Scalar, Trial
from systems.common.errors import InputError
from systems.maveriq.configuration import known_models
from systems.maveriq.controller.queues import QUEUES
from systems.maveriq.estimator import load_estimator
from systems.maveriq.intents import INTENTS
from systems.maveriq.models import load_support
from systems.maveriq.search import Search
from systems.maveriq.serving.outcome import USD_PER_GPU_H, metrics
from systems.maveriq.serving.queueing import HANDOVER_S
from systems.maveriq.serving.runs import GPUS, Run, deploying
from systems.maveriq.serving.services import Services, read_full_models
from systems.maveriq.serving.systems import Bench, Scene, wishes
from systems.maveriq.serving.workload import minute_counts, model_list, poisson, scaled
from systems.maveriq.strategies import STRATEGIES

FINGERPRINTS, FULL_MODELS = "fingerprint_data_collection_BS.csv", "full_model_data_collection.csv"
TRACES = {"code": "azure_code", "conv": "azure_conv"}
NOTE = "hardware model: published (the authors' A6000 tables and mean service times); one request at a time per GPU"


@lru_cache(maxsize=4)
def _bench(folder: Path, mode: str) -> Bench:
    """One per process: the trials of a series share it, and its estimates."""
    estimator = load_estimator(folder / FINGERPRINTS, mode)
    services = Services(estimator, read_full_models(folder / FULL_MODELS))
    return Bench(Search(estimator, known_models(), load_support()), services)


@dataclass(frozen=True, slots=True)
class _Given:
    """The parameters of a trial, checked."""

    trial: Trial

    def text(self, key: str, default: str, known: tuple[str, ...]) -> str:
        value = self.trial.parameters.get(key, default)
        if value not in known:
            raise InputError("maveriq", key, value, f"use one of {', '.join(known)}")
        return str(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.trial.parameters.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError("maveriq", key, value, "give a finite number")
        return float(value)

    def data(self, name: str) -> Path:
        path = self.trial.datasets.get(name)
        if path is None:
            mend = f"this figure needs the dataset {name}; nothing can stand in: see `dataset_mirror` in config/README.md"
            raise InputError("maveriq", "datasets", name, mend)
        return path

    def bench(self) -> Bench:
        """The search and the service times on the authors' tables, by the estimator of parameter `mode` (default: paper)."""
        if self.trial.backend != "simulated":
            raise InputError("maveriq", "backend", self.trial.backend, "this experiment runs on the simulated backend")
        return _bench(self.data("maveriq_a6000"), self.text("mode", "paper", ("paper", "improved")))

    def scene(self) -> Scene:
        """The workload and the wishes."""
        trace = self.text("trace", "code", tuple(TRACES))
        name = str(self.trial.parameters.get("model_list", "large"))
        rate_scale = self.number("rate_scale")
        counts = scaled(minute_counts(self.data(TRACES[trace])), rate_scale)
        return Scene(
            counts if not self.trial.parameters.get("slots") else counts[: int(self.number("slots"))],
            model_list(name), name, rate_scale,
            self.text("intent", "min_lat", tuple(INTENTS)), self.number("slo_factor", 0.0),
            bool(self.trial.parameters.get("fp16_only", False)), self.text("strategy", "hybrid", STRATEGIES),
            self.number("packing_threshold", 0.7), self.text("queue", "global", tuple(QUEUES)),
            self.text("placement", "published", ("published", "search")), self.number("handover_s", HANDOVER_S),
            self.number("accuracy", 0.0),
        )  # fmt: skip


def serving(trial: Trial) -> Outcome:
    """One system replays one of the artifact's traces.

    Parameters: `system`, `trace` (code, conv), `rate_scale`, `model_list`, and optionally `intent`, `slo_factor`, `fp16_only`,
    `accuracy`, `strategy`, `packing_threshold`, `queue` (global, per_model), `placement` (published, search), `handover_s`,
    `mode`, `slots` (only the first so many). `attain_factor` judges by another limit than the one deployed for.
    """
    given = _Given(trial)
    bench, scene = given.bench(), given.scene()
    system = str(trial.parameters.get("system"))
    run = bench.run(system, scene)
    if run is None:
        return Outcome(_nothing(scene), notes=(NOTE, f"{system} has no placement that hosts every model"))
    factor = given.number("attain_factor", scene.slo_factor)
    pad_to = int(bench.maveriq(scene).served.sum()) if trial.parameters.get("pad") else 0
    told: dict[str, Scalar] = dict(metrics(run, factor, pad_to))
    told["configurations"] = "; ".join(_word(run, place) for place in range(len(run.deployed)))
    return Outcome(told, _rows(run), _notes(system, scene))


def _notes(system: str, scene: Scene) -> tuple[str, ...]:
    notes = [NOTE]
    if system in ("alpaserve", "alpaserve_star"):
        notes.append(
            "AlpaServe's placements: as in the authors' runs" if scene.placement == "published" else "AlpaServe: our search"
        )
    return tuple(notes)


def _word(run: Run, place: int) -> str:
    one = run.deployed[place]
    kv = " kv8" if one.configuration.int8_kv else ""
    return f"{one.model} ({one.configuration.tp},{one.configuration.pp}) {one.configuration.dtype}{kv}"


def _rows(run: Run) -> dict[str, list[Scalar]]:
    return {
        "arrival_s": run.trace.arrival_s.tolist(),
        "entry": run.trace.target.tolist(),
        "deployment": run.deployment.tolist(),
        "start_s": run.start_s.tolist(),
        "finish_s": run.finish_s.tolist(),
    }


def _nothing(scene: Scene) -> dict[str, Scalar]:
    """The metrics of a system that could not be deployed at all: nothing is served."""
    from systems.maveriq.serving.workload import replayed

    trace = replayed(scene.counts, scene.entries)
    none = np.full(len(trace.arrival_s), np.nan)
    empty = Run(trace, (), (), np.full(len(none), -1), none, none)
    return {**metrics(empty, scene.slo_factor), "configurations": ""}


GAP_S, HORIZON_S = 180.0, 1851.0


def deployment(trial: Trial) -> Outcome:
    """Eight models arrive one by one under a load strategy (the authors' deployment exploration).

    Parameters: `strategy`, `rate_scale`, `at_s` (when to look), and optionally `intent`, `packing_threshold`, `queue`, `mode`.
    `gpus_used` counts GPUs that hold a model at `at_s`; `cost_usd` is 0.8 $ per hour of each of them until 1,851 s.
    """
    given = _Given(trial)
    bench = given.bench()
    entries = model_list("regular")
    trace = poisson(given.number("rate_scale"), entries, GAP_S, trial.seed)
    scene = Scene(
        (), entries, "regular", given.number("rate_scale"), given.text("intent", "min_cost", tuple(INTENTS)),
        strategy=given.text("strategy", "llf", STRATEGIES), threshold=given.number("packing_threshold", 0.7),
        queue=given.text("queue", "global", tuple(QUEUES)),
    )  # fmt: skip
    run = deploying(trace, bench.search, bench.services, wishes(scene), scene.queue)
    told: dict[str, Scalar] = dict(metrics(run))
    told["gpus_used"] = float(_gpus_at(run, given.number("at_s", HORIZON_S)))
    told["configurations"] = "; ".join(_word(run, place) for place in range(len(run.deployed)))
    told["cost_usd"] = USD_PER_GPU_H * _gpu_seconds(run) / 3600
    told |= {f"e2e_p50_model{entry + 1}_s": value for entry, value in enumerate(_medians(run))}
    return Outcome(told, _rows(run), (NOTE,))


def _gpus_at(run: Run, at_s: float) -> int:
    return len({gpu for one in run.deployed if one.from_s <= at_s for gpu in one.gpus})


def _gpu_seconds(run: Run) -> float:
    """GPUs that hold a model, integrated until the horizon: each counts from its first deployment on."""
    first = [min((one.from_s for one in run.deployed if gpu in one.gpus), default=HORIZON_S) for gpu in range(GPUS)]
    return sum(max(0.0, HORIZON_S - since) for since in first)


def _medians(run: Run) -> list[float]:
    entries = range(len(run.trace.entries))
    served = [run.e2e_s[run.served & (run.trace.target == entry)] for entry in entries]
    return [float(np.median(values)) if len(values) else math.nan for values in served]


RATES, SLO_RATES, SLO_FACTORS = (0.1, 0.2, 0.3, 0.4), (0.1, 0.15, 0.2, 0.25, 0.3, 0.4), (2.5, 5.0, 7.5)
BASELINES = ("alpaserve", "alpaserve_star", "accelerate")


def gains(trial: Trial) -> Outcome:
    """The paper's averages over many runs: what MaverIQ gains over each baseline in each cell of Figure 10 and the SLO figure.

    No parameters. Gains are in percent: 1 - theirs / ours for RPM, 1 - ours / theirs for medians (the notebook's 44.7 % for RPM
    can only be the first kind: ours / theirs is far above 2 on average). `slo_gain_*` are ratios of attainment over served
    requests, cells in which the baseline attains nothing left out. `compression_*` is MaverIQ against itself held to fp16.
    """
    given = _Given(trial)
    bench = given.bench()
    counts = {trace: minute_counts(given.data(name)) for trace, name in TRACES.items()}

    def run(system: str, trace: str, rate: float, **wanted: Any) -> dict[str, float]:  # noqa: ANN401
        scene = Scene(scaled(counts[trace], rate), model_list("large"), "large", rate, **wanted)
        found = bench.run(system, scene)
        assert found is not None  # every system has a placement for the large list
        return metrics(found, scene.slo_factor)

    latency, rpm = list[float](), list[float]()
    for trace in TRACES:
        for rate in RATES:
            ours = run("maveriq", trace, rate)
            for theirs in (run(baseline, trace, rate) for baseline in BASELINES):
                latency.append(100 * (1 - ours["e2e_p50_s"] / theirs["e2e_p50_s"]))
                rpm.append(100 * (1 - theirs["rpm"] / ours["rpm"]))
    told: dict[str, Scalar] = {
        "latency_gain_mean_percent": float(np.mean(latency)),
        "latency_gain_least_percent": min(latency),
        "rpm_gain_mean_percent": float(np.mean(rpm)),
        "cells": float(len(latency)),
    }
    return Outcome({**told, **_slo_gains(run), **_compression(run)}, notes=(NOTE,))


def _slo_gains(run: Callable[..., dict[str, float]]) -> dict[str, Scalar]:
    ratios = list[float]()
    for factor in SLO_FACTORS:
        for rate in SLO_RATES:
            ours = run("maveriq", "conv", rate, intent="min_cost", slo_factor=factor)["attainment_served_percent"]
            for baseline in BASELINES:
                theirs = run(baseline, "conv", rate, slo_factor=factor)["attainment_served_percent"]
                ratios += [ours / theirs] if theirs > 0 else []
    return {
        "slo_gain_median": float(np.median(ratios)),
        "slo_gain_mean": float(np.mean(ratios)),
        "slo_cells": float(len(ratios)),
    }


def _compression(run: Callable[..., dict[str, float]]) -> dict[str, Scalar]:
    """What quantised weights add: the same intent with and without them, conversation at RS 0.4."""
    held = run("maveriq", "conv", 0.4, intent="min_cost", fp16_only=True)
    told: dict[str, Scalar] = {}
    for intent in ("min_lat", "min_cost"):
        free = run("maveriq", "conv", 0.4, intent=intent)
        told[f"compression_latency_{intent}_percent"] = 100 * (1 - free["e2e_p50_s"] / held["e2e_p50_s"])
        told[f"compression_user_cost_{intent}_percent"] = 100 * (1 - free["user_cost_p50_gib_s"] / held["user_cost_p50_gib_s"])
    return told


SERVING_EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {"serving": serving, "deployment": deployment, "gains": gains}
