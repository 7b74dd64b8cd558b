"""What a measured trial asks for, and what it gives: from parameters to a session, from sequences to records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from systems.common.core import Request, Trial
from systems.common.engine.results import to_records
from systems.common.errors import InputError
from systems.common.metrics import CUT, Records, percentile
from systems.common.models import ModelShape, model
from systems.common.workloads.build import build
from systems.llmstation.corun.beside import Beside
from systems.llmstation.corun.session import Session, Wanted, session

FloatArray = npt.NDArray[np.float64]
CPU = "cpux1"
"""The testbed of tests: a tiny model, lengths cut down."""
CPU_TOKENS = 48
CPU_BLOCKS = 512
ENDLESS_S = 1e12
DRAIN_S = 20.0
"""After the last arrival a run goes on for so long at most, where the parameter `drain_s` does not say otherwise."""


def drain_of(trial: Trial) -> float:
    """Seconds that a run of `trial` goes on for at most after the last arrival."""
    return number(trial.parameters, "drain_s", DRAIN_S)


def device_of(hardware: str) -> str:
    """`cuda` or `cpu` for a testbed's name. Raises InputError for more than one GPU."""
    if hardware == CPU:
        return "cpu"
    _, _, count = hardware.rpartition("x")
    if count != "1":
        raise InputError("llmstation", "hardware", hardware, "the measured backend co-runs on one GPU: use, say, h200x1")
    return "cuda"


def number(parameters: Mapping[str, Any], key: str, default: float) -> float:
    """The number `key`. Raises InputError when it is something else."""
    value = parameters.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError("llmstation", key, value, "give a number")
    return float(value)


def wanted_of(trial: Trial | Mapping[str, Any], utilisation: float = 0.75, tuning_tokens: int | None = None) -> Wanted:
    """The session that `trial` runs in."""
    trial = trial if isinstance(trial, Trial) else trial_of(trial)
    device, parameters = device_of(trial.hardware), trial.parameters
    shape: ModelShape = model("tiny" if device == "cpu" else str(parameters["model"]))
    tokens = int(number(parameters, "tuning_tokens", 500)) if tuning_tokens is None else tuning_tokens
    blocks = int(number(parameters, "kv_blocks", 0))
    longest = 2 * CPU_TOKENS if device == "cpu" else 2048
    return Wanted(
        shape=shape,
        device=device,
        utilisation=0.0 if blocks else utilisation,
        blocks=min(blocks, CPU_BLOCKS) if device == "cpu" else blocks,
        max_num_batched_tokens=int(number(parameters, "max_num_batched_tokens", 2048)),
        max_num_seqs=16 if device == "cpu" else int(number(parameters, "max_num_seqs", 256)),
        max_tokens=longest,
        tuning_tokens=cut(tokens) if device == "cpu" and tokens else tokens,
        rank=int(number(parameters, "rank", 8)),
        sms=int(number(parameters, "tuning_sms", 0)) or None,
    )


def with_adapters(wanted: Wanted, trial: Trial, requests: list[Request]) -> Wanted:
    """`wanted` with the adapters that `requests` name; the artifact serves at the rank at which it tunes."""
    names = tuple(sorted({request.adapter for request in requests if request.adapter is not None}))
    return replace(wanted, adapters=names, served_rank=int(number(trial.parameters, "rank", 8)))


def trial_of(told: Mapping[str, Any]) -> Trial:
    """A trial from what `told_of` made of it."""
    datasets = {name: None if path is None else Path(path) for name, path in told["datasets"].items()}
    return Trial(**{**told, "datasets": datasets})


def told_of(trial: Trial) -> dict[str, Any]:
    """`trial` as JSON can hold it."""
    return {
        "system": trial.system,
        "experiment": trial.experiment,
        "parameters": dict(trial.parameters),
        "hardware": trial.hardware,
        "backend": trial.backend,
        "seed": trial.seed,
        "datasets": {name: None if path is None else str(path.resolve()) for name, path in trial.datasets.items()},
    }


def workload_of(trial: Trial) -> tuple[list[Request], tuple[str, ...]]:
    """The requests of `trial`, and notes on them; on a CPU with lengths cut down to what a tiny model does in a moment."""
    declared = trial.parameters.get("workload")
    if not isinstance(declared, Mapping):
        raise InputError("llmstation", "workload", declared, "give a mapping, see docs/workloads.md")
    keys = ("rate_rps", "seconds", "requests", "adapters", "adapter_pattern")
    given = {key: trial.parameters[key] for key in keys if key in trial.parameters}
    workload = build({**declared, **given}, trial.datasets, trial.seed)
    requests, notes = list(workload.requests), workload.notes
    if device_of(trial.hardware) == "cpu":
        requests = [replace(r, input_tokens=cut(r.input_tokens), output_tokens=cut(r.output_tokens)) for r in requests]
        notes = (*notes, f"lengths cut to 1/16, at most {CPU_TOKENS} tokens")
    return requests, notes


def cut(tokens: int) -> int:
    """A length as the tiny model of a CPU gets it."""
    return max(2, min(CPU_TOKENS, tokens // 16))


@dataclass(frozen=True, slots=True)
class Served:
    """What a run gave.

    Attributes:
        records: of all requests; those that did not finish in time say `CUT`.
        duration_s: from the start to the last finish, or to the cut.
        lag_p99_s: how late requests were handed to the engine (P99).
        tpot_so_far_s: seconds per token of those that were cut off, until then, by index; those that had begun long enough ago.
    """

    records: Records
    duration_s: float
    lag_p99_s: float
    tpot_so_far_s: Mapping[int, float] = field(default_factory=dict)


def serve(held: Session, beside: Beside, requests: list[Request], drain_s: float = DRAIN_S) -> Served:
    """Serve `requests` on `held` with tuning by `beside`; what is not done `drain_s` after the last arrival is cut off."""
    run = held.colocated(beside)
    until_s = (requests[-1].arrival_s if requests else 0.0) + drain_s
    records = to_records(run.serve(requests, until_s))
    cut = bool((records.status == CUT).any())
    ends = records.finish_s[~np.isnan(records.finish_s)]
    duration_s = until_s if cut or not len(ends) else float(ends.max())
    lag_s = percentile(run.lag_s, 99) if run.lag_s else math.nan
    return Served(records, duration_s, lag_s, dict(run.tpot_so_far_s))


def censored(records: Records, tpot_so_far_s: Mapping[int, float] | None = None) -> dict[str, float]:
    """P99 TTFT and TPOT where some requests were cut off: an overload must not look good, nor a short run bad.

    Without a first token a request is infinitely late. One that was decoding counts with its time per token until then, or,
    where `tpot_so_far_s` (seconds, by request) is None, as infinitely slow; one that had hardly begun says nothing of TPOT.
    """
    cut = records.status == CUT
    if not cut.any():
        return {}
    ttft_s = np.where(np.isnan(records.ttft_s), math.inf, records.ttft_s)
    late = np.full(len(records), math.inf)
    if tpot_so_far_s is not None:
        late[~np.isnan(records.ttft_s)] = math.nan
        for index, so_far_s in tpot_so_far_s.items():
            late[index] = so_far_s
    tpot_s = np.where(cut & (records.output_tokens > 1), late, records.tpot_s)
    return {"ttft_p99_s": _p99(ttft_s), "tpot_p99_s": _p99(tpot_s)}


def _p99(values: FloatArray) -> float:
    """Their P99, also where it lies between two infinite ones."""
    finite = np.where(np.isinf(values), ENDLESS_S, values)
    found = percentile(finite, 99)
    return math.inf if found >= ENDLESS_S / 1e3 else found


def serve_alone(trial: Trial, utilisation: float = 0.45) -> Callable[[], dict[str, Any]]:
    """Prepare to serve `trial`'s workload without tuning in this process; the call that does it, as JSON can hold it.

    Who does not call it has warmed up the session of the next trial that wants the same.
    """
    requests, notes = workload_of(trial)
    held = session(with_adapters(wanted_of(trial, utilisation, tuning_tokens=0), trial, requests))

    def run() -> dict[str, Any]:
        served = serve(held, Beside(held.lanes), requests, drain_of(trial))
        return {
            "columns": served.records.columns(),
            "duration_s": served.duration_s,
            "lag_p99_s": served.lag_p99_s,
            "tpot_so_far_s": list(served.tpot_so_far_s.items()),
            "blocks": held.config.num_gpu_blocks,
            "notes": [*held.notes, *notes],
        }

    return run


class Spent:
    """Wall-clock seconds since it was made: on a GPU host, GPU seconds."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self._began
