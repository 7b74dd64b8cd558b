"""The measured driver: a workload served in real time on one GPU while tuning shares it, by the same decisions as `simulated`.

LLMStation, FineInfer and inference only run in this process: serving on one stream, tasklets on another, one copy of the
weights (`corun`). vLLM+torchtune and chunked-training are two processes with two copies under MPS (`corun.pair`). The
engine and its kernels are the same for all. On `cpux1` a tiny model stands in, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from systems.common.core import Outcome, Scalar, Slo, Status, Trial
from systems.common.errors import InputError
from systems.common.metrics import CUT, STATUSES, Records, summarise
from systems.llmstation.baselines.chunked import Chunked
from systems.llmstation.baselines.fineinfer import FineInfer
from systems.llmstation.baselines.inference_only import InferenceOnly
from systems.llmstation.baselines.mps import Mps
from systems.llmstation.corun.beside import Beside
from systems.llmstation.corun.fusing import Fuser
from systems.llmstation.corun.measure import (
    Spent,
    censored,
    device_of,
    drain_of,
    number,
    serve,
    wanted_of,
    with_adapters,
    workload_of,
)
from systems.llmstation.corun.observed import Observed
from systems.llmstation.corun.pace import Exclusive, Pace, Planned, Quiet, Steered, Waiting
from systems.llmstation.corun.pair import Tuning, pair, processes, settle
from systems.llmstation.corun.session import Session, session
from systems.llmstation.latency_source import LatencySource
from systems.llmstation.modes import FeedbackMode, FixedMode, PlannerMode, fuses
from systems.llmstation.tuning_cost import COUNTED_TOKENS

SHARED_UTILISATION = 0.75


@dataclass(frozen=True, slots=True)
class Run:
    """What one run gave, whoever ran it."""

    records: Records
    duration_s: float
    samples_per_s: float
    blocks: int
    notes: tuple[str, ...]
    extra: Mapping[str, Scalar]
    tpot_so_far_s: Mapping[int, float]


def colocation(trial: Trial, metrics: Sequence[str]) -> Outcome:
    """Serve a workload while tuning shares the GPU; both sides' numbers, `metrics` of the serving side.

    Raises:
        InputError: unknown policy or mode, a knob that is missing or out of range, more than one GPU, none at all.
    """
    spent = Spent()
    policy = str(trial.parameters.get("policy"))
    if policy not in POLICIES:
        raise InputError("llmstation", "policy", policy, f"use one of {', '.join(POLICIES)}")
    run = POLICIES[policy](trial)
    summary = summarise(run.records, end_s=None) | censored(run.records, run.tpot_so_far_s)
    found: dict[str, Scalar] = {key: summary[key] for key in metrics}
    found |= {"duration_s": run.duration_s, "peft_samples_per_s": run.samples_per_s, "num_gpu_blocks": run.blocks}
    found |= {"cut": int(summary["cut"]), "gpu_s": spent(), **run.extra}
    return Outcome(found, run.records.columns(), run.notes)


def _knob(trial: Trial, key: str) -> float:
    if key not in trial.parameters:
        raise InputError("llmstation", key, None, f"policy {trial.parameters.get('policy')} needs this as a number")
    return number(trial.parameters, key, 0.0)


# ---- in this process, on shared weights


def _shared(trial: Trial, utilisation: float, pace_of: Callable[[Session], Pace]) -> Run:
    requests, notes = workload_of(trial)
    held = session(with_adapters(wanted_of(trial, utilisation), trial, requests))
    settle()  # from here on times matter
    pace = pace_of(held)
    fuser = held.fuser() if isinstance(pace, Planned) and pace.mode.fused else None  # before a tuner: it runs steps of its own
    tuner = None if type(pace) is Quiet else held.tuner(trial.seed)
    beside = Beside(held.lanes, tuner, pace, pace.observed if isinstance(pace, Planned) else None)
    if isinstance(pace, Planned) and fuser is not None:
        notes = (*notes, _fuse(fuser, beside, pace.observed))
    if isinstance(pace, Steered):
        pace.watch(lambda: held.executor.engine.finished)
    served = serve(held, beside, requests, drain_of(trial))
    samples = 0.0 if tuner is None else tuner.samples
    extra: dict[str, Scalar] = {"schedule_lag_p99_s": served.lag_p99_s}
    if tuner is not None:
        tuner.drain()
        extra |= {f"tasklets_{where}": count for where, count in beside.tasklets.items()}
    if isinstance(pace, Planned):
        extra |= {f"planned_from_{name}": count for name, count in pace.observed.source.answers.items()}
        extra["planned_mean"] = float(np.mean(pace.plans)) if pace.plans else 0.0
    rate = samples / served.duration_s
    notes = (*held.notes, *notes, *_run_notes(trial, served.records))
    return Run(served.records, served.duration_s, rate, held.config.num_gpu_blocks, notes, extra, served.tpot_so_far_s)


def _fuse(fuser: Fuser | str, beside: Beside, observed: Observed) -> str:
    """Let `beside` fuse forward phases with decode steps, if that is possible here; a note."""
    if isinstance(fuser, str):
        return fuser
    beside.fuser, observed.fused_profile = fuser, fuser.seconds
    return f"forward phases fused with decode steps of up to {fuser.sizes[-1]} sequences where the target allows"


def _inference_only(trial: Trial) -> Run:
    return _shared(trial, InferenceOnly().gpu_memory_utilisation, lambda _: Quiet())


def _fineinfer(trial: Trial) -> Run:
    policy = FineInfer(_knob(trial, "defer_s"))
    return _shared(trial, policy.gpu_memory_utilisation, lambda _: Exclusive(policy))


def _llmstation(trial: Trial) -> Run:
    mode = trial.parameters.get("mode", "planner")
    if mode == "planner":
        planner = PlannerMode(_knob(trial, "decode_target_s"), fuses(trial.parameters))
        return _shared(trial, SHARED_UTILISATION, lambda held: Planned(planner, _known(held)))
    if mode == "fixed":
        waits = _waits(trial)
        return _shared(trial, SHARED_UTILISATION, lambda _: Waiting(waits))
    if mode == "feedback":
        slo = Slo(ttft_s=_knob(trial, "slo_ttft_s"), tpot_s=_knob(trial, "slo_tpot_s"))
        steered = FeedbackMode(slo, _waits(trial))
        return _shared(trial, SHARED_UTILISATION, lambda _: Steered(steered))
    raise InputError("llmstation", "mode", mode, "use planner, fixed or feedback")


def _waits(trial: Trial) -> FixedMode:
    return FixedMode(
        int(_knob(trial, "forward_tasklets")),
        _knob(trial, "forward_wait_s"),
        int(_knob(trial, "backward_tasklets")),
        _knob(trial, "backward_wait_s"),
    )


def _known(held: Session) -> Observed:
    """What the planner knows when a run begins: the offline profile, with a record still empty."""
    profile = held.profiled()
    observed = Observed(profile.layers, profile.tuning_tokens, LatencySource(profile.source.profile))
    observed.alone_s.update(profile.alone_s)
    return observed


# ---- two processes


def _strangers(trial: Trial, tuning: Tuning) -> Run:
    requests, _ = workload_of(trial)
    limit_s = (requests[-1].arrival_s if requests else 0.0) + drain_of(trial) + 60
    told = pair(trial, tuning, limit_s)
    samples = told["tuned"]["samples"] * tuning.tokens / COUNTED_TOKENS
    rate = samples / told["tuned"]["seconds"]
    extra: dict[str, Scalar] = {"schedule_lag_p99_s": told["lag_p99_s"]}
    records = records_of(told["columns"])
    notes = (*told["notes"], *_run_notes(trial, records))
    return Run(records, told["duration_s"], rate, told["blocks"], notes, extra, dict(told["tpot_so_far_s"]))


def _run_notes(trial: Trial, records: Records) -> tuple[str, ...]:
    """For the footer: on how many requests percentiles rest, and what became of those that a run did not wait for."""
    count = f"{len(records)} requests a trial"
    if "drain_s" not in trial.parameters or not (records.status == CUT).any():
        return (count,)
    return (count, f"runs end {drain_of(trial):g} s after the last arrival: requests cut off count with their TPOT until then")


def records_of(columns: Mapping[str, Any]) -> Records:
    """The inverse of `Records.columns`, for times that went through JSON."""
    return Records(
        arrival_s=np.array(columns["arrival_s"], dtype=np.float64),
        scheduled_s=np.array(columns["scheduled_s"], dtype=np.float64),
        first_token_s=np.array(columns["first_token_s"], dtype=np.float64),
        finish_s=np.array(columns["finish_s"], dtype=np.float64),
        input_tokens=np.array(columns["input_tokens"], dtype=np.int64),
        output_tokens=np.array(columns["output_tokens"], dtype=np.int64),
        preemptions=np.array(columns["preemptions"], dtype=np.int64),
        status=np.array([STATUSES.index(Status(word)) for word in columns["status"]], dtype=np.int8),
        adapters=tuple(columns.get("adapter", ())),
    )


def _mps_tuning(trial: Trial) -> Tuning:
    policy = Mps(_knob(trial, "thread_percentage"))
    return Tuning(policy.sequence_tokens, policy.thread_percentage)


def _chunked_tuning(trial: Trial) -> Tuning:
    return Tuning(Chunked(int(_knob(trial, "chunk_tokens"))).chunk_tokens)


STRANGERS: Mapping[str, Callable[[Trial], Tuning]] = {"mps": _mps_tuning, "chunked": _chunked_tuning}


POLICIES: Mapping[str, Callable[[Trial], Run]] = {
    "inference_only": _inference_only,
    "llmstation": _llmstation,
    "fineinfer": _fineinfer,
    "mps": lambda trial: _strangers(trial, _mps_tuning(trial)),
    "chunked": lambda trial: _strangers(trial, _chunked_tuning(trial)),
}


def prepare(trials: Sequence[Trial]) -> None:
    """Begin to start the processes that `trials` will need, without waiting: while the first of them makes its session."""
    named = [(trial, str(trial.parameters.get("policy"))) for trial in trials]
    coming = [(trial, STRANGERS[policy](trial)) for trial, policy in named if policy in STRANGERS]
    if coming:
        processes(device_of(coming[0][0].hardware)).foresee(coming)
