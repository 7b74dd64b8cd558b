"""The numbers of a run. Served and issued are told apart: an overloaded system that is cut off early looks better than it is.

* Latency statistics are over served requests, as in the paper; `attainment_served_percent` too. `attainment_issued_percent`
  counts every request that was issued, so a dropped one is not good.
* RPM = 60 x served / (end of the last served - arrival of the first served) (sheet, 5a).
* User cost = end-to-end latency x memory that the model's load added (GiB s). GPU hours = service time x GPUs / 3600.
* Operation cost = 0.8 $ x GPU hours; a system that served fewer requests than MaverIQ is charged its dearest request for each
  of the missing ones (the artifact's padding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from systems.maveriq.configuration import Floats
from systems.maveriq.serving.runs import Run
from systems.maveriq.serving.workload import slo_s

USD_PER_GPU_H = 0.8
SHARES = (5, 25, 50, 75, 95)


def metrics(run: Run, slo_factor: float = 0.0, pad_to: int = 0) -> dict[str, float]:
    """All numbers of `run`. With `slo_factor` also attainment, with `pad_to` the operation cost is for that many requests."""
    served = run.served
    deployment = run.deployment[served]
    e2e_s = run.e2e_s[served]
    memory = _of(deployment, [one.memory_gib for one in run.deployed])
    gpu_h = _of(deployment, [one.service_s * one.configuration.gpus / 3600 for one in run.deployed])
    told = {
        "issued": float(len(served)),
        "served": float(served.sum()),
        "unserved": float((~served).sum()),
        "served_percent": 100.0 * float(served.mean()) if len(served) else math.nan,
        "models_loaded": float(len({one.entry for one in run.deployed})),
        "models_asked": float(len(run.trace.entries)),
        "best_effort": float(sum(one.best_effort for one in run.deployed)),
        "rpm": _rpm(run),
        "e2e_mean_s": _mean(e2e_s),
        "gpu_h_sum": float(gpu_h.sum()),
        "gpu_h_mean": _mean(gpu_h),
        "operation_cost_usd": USD_PER_GPU_H * _padded(gpu_h, pad_to),
        "gpus_used": float(len({gpu for one in run.deployed for gpu in one.gpus})),
    }
    for name, values in (("e2e", e2e_s), ("user_cost", e2e_s * memory), ("memory", memory), ("gpu_h", gpu_h)):
        told |= _shares(name, values)
    return told | (_attainment(run, slo_factor) if slo_factor > 0 else {})


_UNITS: Mapping[str, str] = {"e2e": "_s", "user_cost": "_gib_s", "memory": "_gib", "gpu_h": ""}


def _shares(name: str, values: Floats) -> dict[str, float]:
    found = np.percentile(values, SHARES) if len(values) else [math.nan] * len(SHARES)
    return {f"{name}_p{share}{_UNITS[name]}": float(value) for share, value in zip(SHARES, found, strict=True)}


def _of(deployment: np.ndarray, values: Sequence[float]) -> Floats:
    return np.array(values)[deployment] if len(deployment) else np.empty(0)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _rpm(run: Run) -> float:
    served = run.served
    if not served.any():
        return 0.0
    last = int(np.flatnonzero(served)[-1])
    span_s = float(run.finish_s[last] - run.trace.arrival_s[served][0])
    return 60.0 * float(served.sum()) / span_s if span_s > 0 else math.nan


def _padded(gpu_h: Floats, pad_to: int) -> float:
    if not len(gpu_h):
        return math.nan if pad_to else 0.0
    return float(gpu_h.sum() + gpu_h.max() * max(0, pad_to - len(gpu_h)))


def _attainment(run: Run, factor: float) -> dict[str, float]:
    limit_s = np.array([slo_s(entry.model, factor) for entry in run.trace.entries])[run.trace.target]
    good = run.served & (run.e2e_s <= limit_s)
    served = int(run.served.sum())
    return {
        "attainment_served_percent": 100.0 * float(good.sum()) / served if served else 0.0,
        "attainment_issued_percent": 100.0 * float(good.mean()),
    }
