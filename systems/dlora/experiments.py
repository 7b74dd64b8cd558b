"""What a trial of each dLoRA figure means: workload, cluster, and the numbers that come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from systems.common.core import Outcome, Scalar, Trial
from systems.common.errors import InputError
from systems.common.workloads.build import Workload, build
from systems.dlora import published
from systems.dlora.bench import Bench
from systems.dlora.cluster.simulated import Cluster
from systems.dlora.experiments_recorded import RECORDED_EXPERIMENTS
from systems.dlora.requests import LoraSequence

WORKLOAD_KEYS = ("rate_rps", "requests", "adapters", "map_stride")
"""What of the workload factors and constants of a figure may set."""
MEASURES = (
    "latency_s_per_token", "latency_p90_s_per_token", "queueing_s_per_token", "throughput_rps", "duration_s", "ttft_mean_s",
    "solver_pct", "switching_pct", "inference_pct", "migrations", "solves", "switches", "preemptions", "top_adapter_share",
)  # fmt: skip
LATENCY_LIMIT = 0.5
"""The papers' SLO: mean latency per output token, seconds."""


def workload_of(trial: Trial, seed: int) -> Workload:
    """The declared workload; factors and constants of the same names fill it in.

    `requests_per_rps` makes the number of requests follow the rate. `length_ratio` lengthens answers as the artifact does.
    """
    declared = trial.parameters.get("workload")
    if not isinstance(declared, Mapping):
        raise InputError("dlora", "workload", declared, "give a mapping, see docs/workloads.md")
    told = {**declared, **{key: trial.parameters[key] for key in WORKLOAD_KEYS if key in trial.parameters}}
    per_rate = trial.parameters.get("requests_per_rps")
    if per_rate is not None:
        told["requests"] = max(20, round(float(per_rate) * float(told["rate_rps"])))  # type: ignore[arg-type]
    made = build(told, trial.datasets, seed)
    ratio = float(trial.parameters.get("length_ratio", 1))  # type: ignore[arg-type]
    return longer(made, ratio) if ratio != 1 else made


def longer(workload: Workload, ratio: float, most: int = 4096) -> Workload:
    """Answers lengthened as by the artifact's `--ratio`: total = min(ratio (p + o), most), split as before; prompts stay."""
    if not ratio >= 1:
        raise InputError("dlora", "length_ratio", ratio, "give a number of at least 1")
    prompt, answer = workload.input_tokens, workload.output_tokens
    total = np.minimum((prompt + answer) * ratio, most).astype(np.int64)
    scaled = (prompt / (prompt + answer) * total).astype(np.int64)
    room = most - prompt  # prompts stay as they are
    return replace(workload, output_tokens=np.maximum(1, np.minimum(total - scaled, room)))


def sequences_of(workload: Workload) -> list[LoraSequence]:
    """One sequence per request, its adapter by number. Raises InputError when requests name no adapter, or there are none."""
    if not len(workload):
        raise InputError("workload", "requests", 0, "give at least one")
    if not workload.adapters or None in workload.adapters:
        raise InputError("workload", "adapters", None, "every request must name an adapter: set `adapters`")
    numbers = [int(str(name).rpartition("-")[2]) for name in workload.adapters]
    return [LoraSequence(request, adapter) for request, adapter in zip(workload.requests, numbers, strict=True)]


def measures(cluster: Cluster) -> dict[str, float]:
    """Numbers of a finished run (sheet, 6): latencies per output token in seconds, shares of the run's time in percent."""
    done = cluster.sequences
    tokens = np.array([s.output_tokens for s in done], dtype=np.float64)
    e2e_s = np.array([s.finish_s - s.arrival_s for s in done])
    executed_s = np.array([s.executed_s for s in done])
    per_token = np.sort(e2e_s / tokens)
    duration_s = max(s.finish_s for s in done)
    slowest = max(replica.switching_s + replica.loading_s for replica in cluster.replicas)
    totals = cluster.totals
    solver, switching = 100 * totals.solver_s / duration_s, 100 * slowest / duration_s
    numbers = (
        per_token.mean(),
        per_token[int(0.9 * len(per_token))],
        ((e2e_s - executed_s) / tokens).mean(),
        len(done) / duration_s,
        duration_s,
        np.mean([s.first_token_s - s.arrival_s for s in done]),
        solver,
        switching,
        100 - solver - switching,
        sum(s.migrations for s in done),
        totals.solves,
        sum(replica.switches for replica in cluster.replicas),
        sum(s.preemptions for s in done),
        np.bincount([s.adapter for s in done]).max() / len(done),
    )
    return dict(zip(MEASURES, map(float, numbers), strict=True))


def _run(trial: Trial, seed: int) -> tuple[Cluster, tuple[str, ...]]:
    bench = replace(Bench.of(trial), seed=seed)
    made = workload_of(trial, seed)
    costs = bench.costs()
    cluster = bench.cluster(costs)
    cluster.serve(sequences_of(made))
    return cluster, (costs.source, *made.notes)


def serving(trial: Trial) -> Outcome:
    """Serve a workload on a cluster; latency per output token, queueing, throughput, overheads.

    Parameters: `workload`; `system` (dlora, vllm, peft, slora) with `kinder`, `policy`, `migration`, `scope`; `model`,
    `tp`, `replicas`, `adapters`; `source` (artifact, modelled), `back_end`; `batch`, `slots`, `credit_scale`, `interval_s`,
    `load_excess`, `copy_kv`, `kv_blocks`; `seeds` to take the mean over so many workloads; `rates_rps` (a list): other
    rates are left out (empty cells).
    """
    rates = trial.parameters.get("rates_rps")
    if isinstance(rates, list | tuple) and trial.parameters.get("rate_rps") not in rates:
        return Outcome(dict.fromkeys(MEASURES), notes=("rates that the artifact did not run are left out",))
    seeds = Bench.of(trial).whole("seeds", 1)
    found: list[dict[str, float]] = []
    for run in range(seeds):
        cluster, notes = _run(trial, trial.seed + 1000 * run)
        found.append(measures(cluster))
    metrics: dict[str, Scalar] = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    if seeds > 1:
        notes = (*notes, f"mean of {seeds} workloads")
    return Outcome(metrics, _columns(cluster), notes)


def _columns(cluster: Cluster) -> dict[str, list[Scalar]]:
    """A row per request of the (last) run."""
    done = cluster.sequences
    return {
        "arrival_s": [s.arrival_s for s in done],
        "first_token_s": [s.first_token_s for s in done],
        "finish_s": [s.finish_s for s in done],
        "executed_s": [s.executed_s for s in done],
        "input_tokens": [s.request.input_tokens for s in done],
        "output_tokens": [s.output_tokens for s in done],
        "adapter": [s.adapter for s in done],
        "replica": [s.replica for s in done],
        "migrations": [s.migrations for s in done],
    }


def queueing_share(trial: Trial) -> Outcome:
    """Figure 2b: share of queueing in a request's time at replica `replica` (1, 2, ...), in percent, by means per replica."""
    bench = Bench.of(trial)
    place = bench.whole("replica") - 1
    cluster, notes = _run(trial, trial.seed)
    mine = [s for s in cluster.sequences if s.replica == place]
    shares = [_queueing_pct([s for s in cluster.sequences if s.replica == e]) for e in range(len(cluster.replicas))]
    served = [share for share in shares if share is not None]
    metrics: dict[str, Scalar] = {"queueing_pct": shares[place], "requests": len(mine), "highest_pct": max(served)}
    metrics |= {"lowest_pct": min(served), "spread": max(served) / min(served) if min(served) else None}
    return Outcome(metrics, notes=notes)


def _queueing_pct(sequences: list[LoraSequence]) -> float | None:
    """Mean queueing over mean time from arrival to end, in percent; None without requests."""
    if not sequences:
        return None
    executed_s = float(np.mean([s.executed_s for s in sequences]))
    return 100 * (1 - executed_s / float(np.mean([s.finish_s - s.arrival_s for s in sequences])))


def slo_rate(trial: Trial) -> Outcome:
    """The largest rate at which `limited` (default: mean latency per output token) is at most `limit` (0.5 s).

    Read off the curve over `curve_rps` by linear interpolation, as the artifact's figure is read (sheet, 6).
    """
    limited, limit = str(trial.parameters.get("limited", "latency_s_per_token")), Bench.of(trial).number("limit", LATENCY_LIMIT)
    rates = trial.parameters.get("curve_rps")
    if not isinstance(rates, list | tuple) or not rates:
        raise InputError("dlora", "curve_rps", rates, "give the rates of the curve as a list")
    before: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    for rate in sorted(float(rate) for rate in rates):
        one = serving(replace(trial, parameters={**trial.parameters, "rate_rps": rate}))
        latency, notes = float(one.metrics[limited]), one.notes  # type: ignore[arg-type]
        if latency > limit:
            low_rate, low = before or (0.0, 0.0)
            crossing = low_rate + (rate - low_rate) * (limit - low) / (latency - low)
            return Outcome({"slo_rate_rps": crossing, "beyond": False}, notes=notes)
        before = rate, latency
    assert before
    return Outcome({"slo_rate_rps": before[0], "beyond": True}, notes=(*notes, "the last rate still meets the limit"))


def overhead(trial: Trial) -> Outcome:
    """Figure 13: as `serving`; `share_pct` is the part of the run's time that `share` (solver, switching, inference) takes."""
    share = Bench.of(trial).choice("share", "solver", ("solver", "switching", "inference"))
    served = serving(trial)
    return replace(served, metrics={"share_pct": served.metrics[f"{share}_pct"], **served.metrics})


def branch_cost(trial: Trial) -> Outcome:
    """Figure 5: one 4096 x 4096 product beside a rank-16 branch, microseconds, by our roofline (the artifact measured it)."""
    return published.branch_cost(trial)


def load_profile(trial: Trial) -> Outcome:
    """Figure 7: Azure Functions 2019, invocations of the 40-minute bin `bin` of day `day`, over their maximum; as published."""
    return published.load_profile(trial)


EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {
    "serving": serving,
    "queueing_share": queueing_share,
    "slo_rate": slo_rate,
    "overhead": overhead,
    "branch_cost": branch_cost,
    "load_profile": load_profile,
    **RECORDED_EXPERIMENTS,
}
