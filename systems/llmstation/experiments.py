"""What one trial of each LLMStation figure means: workload, engine, tuning job and the numbers that come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from systems.common.core import Outcome, Slo, Trial
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine, serve
from systems.common.engine.memory import kv_blocks
from systems.common.engine.results import to_records
from systems.common.engine.simulated import IterationCost, SimulatedExecutor
from systems.common.errors import InputError
from systems.common.hardware import Testbed, costs, parse_testbed
from systems.common.hardware.interference import GREEN, STEADY, Interference
from systems.common.metrics import summarise
from systems.common.models import ModelShape, model
from systems.common.workloads.build import Workload, build
from systems.llmstation.adapters import AdapterLimited, iteration_s
from systems.llmstation.baselines.chunked import Chunked
from systems.llmstation.baselines.fineinfer import FineInfer
from systems.llmstation.baselines.inference_only import InferenceOnly
from systems.llmstation.baselines.mps import Mps
from systems.llmstation.hardware_model import HardwareModel
from systems.llmstation.modes import FeedbackMode, FixedMode, PlannerMode, fuses
from systems.llmstation.simulated import (
    ExclusiveTuning,
    FeedbackTuning,
    PlannedLimits,
    PlannedTuning,
    Shared,
    SteadyTuning,
    limited,
)
from systems.llmstation.tasklets import TuningJob
from systems.llmstation.tuning_cost import Layers, precise_chunks_s, sharded_job, shared_job

SHARED_UTILISATION = 0.75
WORKLOAD_KEYS = ("rate_rps", "seconds", "requests", "adapters", "adapter_pattern")
"""What of the workload factors and constants of a figure may set."""
METRICS = (
    "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_mean_s", "tpot_p50_s", "tpot_p99_s", "e2e_p99_s",
    "requests", "finished", "preemptions", "output_tokens_per_s", "duration_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """What every policy of a trial shares."""

    parameters: Mapping[str, Any]
    shape: ModelShape
    testbed: Testbed
    hardware: HardwareModel

    @classmethod
    def of(cls, trial: Trial) -> Bench:
        """The testbed and model of `trial`, tensor parallel over all GPUs."""
        shape, testbed = model(str(trial.parameters["model"])), parse_testbed(trial.hardware)
        hardware = HardwareModel.of(trial.parameters, shape, testbed, trial.datasets.get("corun_slowdowns"))
        adapters = min(_whole(trial, "adapters", 0), _whole(trial, "max_loras", 4))
        if adapters:
            hardware.cost.overhead_s += iteration_s(shape, testbed, _whole(trial, "rank", 8), adapters)
        return cls(trial.parameters, shape, testbed, hardware)

    @property
    def layers(self) -> Layers:
        """Prices of one layer."""
        return self.hardware.layers

    @property
    def cost(self) -> IterationCost:
        """Prices of serving iterations."""
        return self.hardware.cost

    @property
    def interference(self) -> Interference:
        """Co-run slowdowns."""
        return self.hardware.interference

    def number(self, key: str) -> float:
        """The parameter or knob `key`. Raises InputError when it is missing or no number."""
        value = self.parameters.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InputError("llmstation", key, value, f"policy {self.parameters.get('policy')} needs this as a number")
        return value

    def tuned_tokens(self) -> int:
        """Length of a tuning sample on shared weights (the artifact pads to 500)."""
        return int(self.parameters.get("tuning_tokens", 500))

    def job(self, ideal: TuningJob) -> TuningJob:
        """`ideal`, slower by the parameter `tuning_slowdown` (1 where absent): a what-if for eager PyTorch."""
        return ideal.slower(float(self.parameters.get("tuning_slowdown", 1.0)))

    def shared_job(self) -> TuningJob:
        """Tuning on the weights that serving uses: LLMStation's and FineInfer's."""
        job = self.timed(shared_job(self.layers, self.tuned_tokens(), int(self.parameters.get("rank", 8))), False)
        return job.limited(self.tuning_sms / self.testbed.gpu.sms, GREEN) if self.tuning_sms else job

    @property
    def tuning_sms(self) -> int:
        """SMs that tuning on shared weights is limited to by a green context; 0 for all.

        Raises InputError for more than the GPU has.
        """
        sms = self.parameters.get("tuning_sms", 0)
        if type(sms) is not int or not 0 <= sms <= self.testbed.gpu.sms:
            mend = f"give a whole number of SMs, at most {self.testbed.gpu.sms}, or 0 for all"
            raise InputError("llmstation", "tuning_sms", sms, mend)
        return sms

    def steady_job(self) -> TuningJob:
        """The same of modes in which tuning runs beside serving all the time."""
        job = self.shared_job()
        return job if self.tuning_sms else job.limited(1.0, STEADY)

    def sharded_job(self, tokens: int, sm_limit: float) -> TuningJob:
        """Torchtune's, with activation checkpointing, on sequences of `tokens`."""
        return self.timed(sharded_job(self.whole_layers(), self.testbed, tokens, sm_limit), True)

    def timed(self, job: TuningJob, recompute: bool) -> TuningJob:
        """`job` with the tasklets' measured times where there are any, and slowed as the parameters ask."""
        if (table := self.hardware.tuning) is not None:
            job = table.retimed(job, self.shape.layers, self.layers.tuning_s, recompute)
        return self.job(job)

    def whole_layers(self) -> Layers:
        """Prices of undivided layers, for tuners that shard instead of splitting."""
        if self.testbed.count == 1:
            return self.layers
        return Layers.of(costs(self.shape, self.testbed, 1), self.shape, 1)


def _whole(trial: Trial, key: str, default: int) -> int:
    """The whole number `key`. Raises InputError when it is something else."""
    value = trial.parameters.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError("llmstation", key, value, "give a whole number of at least 0")
    return value


Built = tuple[SimulatedExecutor, float]
"""An executor and the share of GPU memory that serving may use."""


def _inference_only(bench: Bench) -> Built:
    return SimulatedExecutor(bench.cost), InferenceOnly().gpu_memory_utilisation


def _mps(bench: Bench) -> Built:
    policy = Mps(bench.number("thread_percentage"))
    job = bench.sharded_job(policy.sequence_tokens, policy.sm_limit)
    return SteadyTuning(bench.cost, bench.layers, job, bench.interference), policy.gpu_memory_utilisation


def _chunked(bench: Bench) -> Built:
    policy = Chunked(int(bench.number("chunk_tokens")))
    job = bench.sharded_job(policy.chunk_tokens, sm_limit=1.0)
    return SteadyTuning(bench.cost, bench.layers, job, bench.interference), policy.gpu_memory_utilisation


def _fineinfer(bench: Bench) -> Built:
    policy = FineInfer(bench.number("defer_s"))
    job = bench.shared_job()
    job = job.slower(limited(bench.interference, job))
    return ExclusiveTuning(bench.cost, job, policy), policy.gpu_memory_utilisation


def _waits(bench: Bench) -> FixedMode:
    return FixedMode(
        int(bench.number("forward_tasklets")),
        bench.number("forward_wait_s"),
        int(bench.number("backward_tasklets")),
        bench.number("backward_wait_s"),
    )


def _llmstation(bench: Bench) -> Built:
    common = (bench.cost, bench.layers, bench.shared_job(), bench.interference)
    mode = bench.parameters.get("mode", "planner")
    if mode == "planner":
        planner = PlannerMode(bench.number("decode_target_s"), fuses(bench.parameters) and not bench.tuning_sms)
        most = bench.parameters.get("most_beside")
        whole = bench.hardware.whole_steps
        limits = PlannedLimits(whole, None if most is None else int(most), whole_phases=whole)
        return PlannedTuning(*common, planner, limits), SHARED_UTILISATION
    common = (bench.cost, bench.layers, bench.steady_job(), bench.interference)
    if mode == "fixed":
        return SteadyTuning(*common, _waits(bench)), SHARED_UTILISATION
    if mode == "feedback":
        slo = Slo(ttft_s=bench.number("slo_ttft_s"), tpot_s=bench.number("slo_tpot_s"))
        return FeedbackTuning(*common, FeedbackMode(slo, _waits(bench))), SHARED_UTILISATION
    raise InputError("llmstation", "mode", mode, "use planner, fixed or feedback")


POLICIES: Mapping[str, Callable[[Bench], Built]] = {
    "inference_only": _inference_only,
    "llmstation": _llmstation,
    "fineinfer": _fineinfer,
    "mps": _mps,
    "chunked": _chunked,
}


def launches_ahead(executor: SimulatedExecutor, bench: Bench) -> None:
    """Let `executor` form its batches as early as the measured engine does, if the hardware model knows how early that is.

    The parameter `forms_early` says that it forms them as soon as a step begins.
    """
    if (lead_s := bench.hardware.decode_lead_s) is None:
        return
    executor.launches_ahead, executor.decode_lead_s = True, lead_s
    if isinstance(executor, Shared):
        executor.forms_early = bool(bench.parameters.get("forms_early", False))


def _workload(trial: Trial) -> Mapping[str, object]:
    """The declared workload; factors and constants of the same names fill it in."""
    declared = trial.parameters.get("workload")
    if not isinstance(declared, Mapping):
        raise InputError("llmstation", "workload", declared, "give a mapping, see docs/workloads.md")
    return {**declared, **{key: trial.parameters[key] for key in WORKLOAD_KEYS if key in trial.parameters}}


def colocation(trial: Trial) -> Outcome:
    """Serve a workload while tuning shares the GPUs; both sides' numbers.

    Parameters: `model`, `policy` (a key of `POLICIES`), that policy's knob, `workload`, and optionally `tuning_tokens`,
    `rank`, `adapters` and `max_loras` (served), `mode`, `fused`, `max_num_batched_tokens`, `max_num_seqs`, `kv_blocks`,
    `tuning_sms` (SMs that a green context leaves to tuning on shared weights). Simulated only: `hardware_model` (`auto`,
    `roofline`, `calibrated`), `tuning_slowdown`, `most_beside` (tasklets that the planner's driver can get beside one decode
    step; unlimited where absent) and `forms_early` (with a calibration: the next batch is formed as soon as a decode step
    begins). Measured only: `drain_s`, how long a run goes on after the last arrival at most.
    """
    if trial.backend == "measured":
        from systems.llmstation import measured  # imports torch

        return measured.colocation(trial, METRICS)
    return simulated(trial, build(_workload(trial), trial.datasets, trial.seed))


def simulated(trial: Trial, workload: Workload) -> Outcome:
    """`colocation` on the simulator, of requests that are given; the parameter `workload` is not read.

    Raises InputError as `colocation` does.
    """
    bench = Bench.of(trial)
    policy = str(trial.parameters.get("policy"))
    if policy not in POLICIES:
        raise InputError("llmstation", "policy", policy, f"use one of {', '.join(POLICIES)}")
    executor, utilisation = POLICIES[policy](bench)
    given = _whole(trial, "kv_blocks", 0)
    config = EngineConfig(
        num_gpu_blocks=given or kv_blocks(bench.shape, bench.testbed, bench.testbed.count, utilisation),
        policy="prefill-first",
        max_num_batched_tokens=int(trial.parameters.get("max_num_batched_tokens", 2048)),  # type: ignore[arg-type]
        max_num_seqs=int(trial.parameters.get("max_num_seqs", 256)),  # type: ignore[arg-type]
        watermark=0.01,
    )
    limited = AdapterLimited(_whole(trial, "max_loras", 4)) if "adapters" in trial.parameters else None
    engine = Engine(config, executor, limited)
    if isinstance(executor, FeedbackTuning):
        executor.watch(engine)
    launches_ahead(executor, bench)
    records = to_records(serve(engine, workload.requests, ahead=executor if executor.launches_ahead else None))
    summary = summarise(records)
    samples = float(getattr(executor, "samples", 0.0))
    metrics = {key: summary[key] for key in METRICS}
    metrics["peft_samples_per_s"] = samples / summary["duration_s"]
    metrics["num_gpu_blocks"] = config.num_gpu_blocks
    corun = () if policy == "inference_only" else (bench.interference.source,)
    notes = [*bench.hardware.sources, *corun, *workload.notes]
    return Outcome(metrics, records.columns(), tuple(notes))


def chunked_cost(trial: Trial) -> Outcome:
    """One sample trained precisely in chunks (Figure 4): `sample_s`, and `times_whole`, how many times the whole sequence's.

    Parameters: `model`, `tuning_tokens`, `chunk_tokens`.
    """
    if trial.backend == "measured":
        from systems.llmstation import training_cost  # imports torch

        return training_cost.chunked_cost(trial)
    bench = Bench.of(trial)
    tokens, chunk = bench.tuned_tokens(), int(bench.number("chunk_tokens"))
    if chunk < 1:
        raise InputError("llmstation", "chunk_tokens", chunk, "give at least 1 token")
    whole_s, chunked_s = (precise_chunks_s(bench.layers, tokens, size) for size in (tokens, chunk))
    return Outcome(
        {"sample_s": chunked_s, "whole_s": whole_s, "times_whole": chunked_s / whole_s}, notes=(bench.cost.costs.source,)
    )


def suspension(trial: Trial) -> Outcome:
    """What suspending a sample costs (Figure 12); measured only, for a simulator would give back what it was told.

    Parameters: `model`, `tuning_tokens`, `suspends`.
    """
    if trial.backend != "measured":
        raise InputError("llmstation", "backend", trial.backend, "this one is measured only: use backend=measured")
    from systems.llmstation import training_cost  # imports torch

    return training_cost.suspension(trial)


def prepare(trials: Sequence[Trial]) -> None:
    """See `systems.registry.prepare`."""
    if measured_ones := [trial for trial in trials if trial.backend == "measured" and trial.experiment == "colocation"]:
        from systems.llmstation import measured  # imports torch

        measured.prepare(measured_ones)


EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {
    "chunked_cost": chunked_cost,
    "colocation": colocation,
    "suspension": suspension,
}
