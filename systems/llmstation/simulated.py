"""The simulated driver: executors that price serving batches while a tuning job shares the GPUs.

Each wraps the plain cost of an iteration and keeps the tuning job's progress:

* `SteadyTuning`: tuning runs beside serving all the time, at most pausing between tasklets (MPS, chunked, `fixed`, `feedback`).
* `PlannedTuning`: the planner admits tasklets per decode iteration; prompts pause tuning; an idle engine leaves it the
  GPU (`planner`).
* `ExclusiveTuning`: a sample runs only while nothing is served (FineInfer).

Decisions come from the same pure objects as in a real run; only durations come from cost models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from systems.common.engine.engine import Engine
from systems.common.engine.executor import Batch, DecodeRun
from systems.common.engine.simulated import IterationCost, SimulatedExecutor
from systems.common.hardware.interference import Interference, Load
from systems.llmstation.baselines.fineinfer import FineInfer
from systems.llmstation.latency_source import LatencySource, Situation
from systems.llmstation.modes import FeedbackMode, FixedMode, PlannerMode
from systems.llmstation.planner import CoRunLatencies, overlapped_s, plan_fused, plan_overlapped
from systems.llmstation.tasklets import TuningJob, TuningProgress
from systems.llmstation.tuning_cost import Layers

FUSED = "fused"
"""The phase of an iteration that takes the whole forward phase of a sample along."""
CONTEXT_BUCKET = 128
"""Latencies are looked up for the mean context per sequence, rounded up to this many tokens."""


def limited(interference: Interference, job: TuningJob) -> float:
    """How many times longer a sample takes with nothing beside it, for the job's own limit on SMs."""
    alone = (phase.seconds * interference.alone(Load(phase.name, job.tokens, phase.tenant)) for phase in job.phases)
    return sum(alone) / job.pass_s


class TuningExecutor(Protocol):
    """An executor that also tunes."""

    @property
    def samples(self) -> float:
        """Samples trained so far."""
        ...


def bucket(decodes: int, context: int) -> int:
    """The batch's total context, rounded up so that the mean per sequence is a multiple of `CONTEXT_BUCKET`."""
    grain = decodes * CONTEXT_BUCKET
    return -(-context // grain) * grain if context else grain


def steps_in_bucket(decodes: int, context: int) -> int:
    """Decode steps, the coming one included, that stay in the context's bucket."""
    return (bucket(decodes, context) - context) // decodes + 1


class Shared(SimulatedExecutor):
    """What all have in common: when batches are formed while decode steps are slowed or lengthened by tuning.

    Attributes:
        forms_early: form the next batch as soon as a decode step begins, instead of `decode_lead_s` before its end.
    """

    forms_early = False

    def _led(self, run: DecodeRun) -> DecodeRun:
        """Note when the batch after `run` is formed; `run` as it is."""
        if self.launches_ahead:
            if self.forms_early:
                self.decode_lead_s = run.first_s
            self._lead_s = min(self.decode_lead_s, run.first_s)
        return run


class SteadyTuning(Shared):
    """Tuning beside serving all the time.

    A pass over the phases is short against a run, so serving sees the time average: while tuning is in a phase's tasklets
    serving is slowed by that phase, during pauses it is not.

    A pause is taken only where an iteration was issued since the tasklet before (sheet 2.3), so of the places where one is due
    as many are pauses as there are iterations per tasklet.
    """

    def __init__(
        self, cost: IterationCost, layers: Layers, job: TuningJob, interference: Interference, waits: FixedMode | None = None
    ) -> None:
        """`waits` are LLMStation's pauses, which apply only while something is served; None for systems that never pause."""
        super().__init__(cost)
        self._layers, self._job, self._interference = layers, job, interference
        self._waits = waits if waits is not None else FixedMode()
        self._alone_s = job.pass_s * limited(interference, job)
        self._known: dict[tuple[str, int, int], tuple[float, float]] = {}
        self._run: tuple[DecodeRun, float] = (DecodeRun(0.0), 1.0)
        self._passes = 0.0

    @property
    def samples(self) -> float:
        """Samples trained so far."""
        return self._passes * self._job.samples

    def _shared(self, key: tuple[str, int, int], load: Load, alone_s: float) -> tuple[float, float]:
        """Serving's slowdown and the length of a tuning pass, while both run; an iteration takes `alone_s` alone."""
        if (known := self._known.get(key)) is None:
            pass_s = served = 0.0
            for phase in self._job.phases:
                slow = self._interference.slowdowns(load, Load(phase.name, self._job.tokens, phase.tenant))
                busy = phase.seconds * slow.tuning
                issued = min(1.0, busy / phase.tasklets / (alone_s * slow.serving))
                pause = phase.tasklets * self._waits.wait_s(phase.name) * issued
                pass_s += busy + pause
                served += busy / slow.serving + pause
            known = self._known[key] = (pass_s / served, pass_s)
        return known

    def run(self, batch: Batch) -> float:
        """One prompt batch, slowed by tuning."""
        tokens = sum(tokens for _, _, tokens in batch.chunks) + batch.decodes
        grain = -(-tokens // 64) * 64
        alone_s = self.cost.batch_s(batch)
        key = ("prefill", grain, 0)
        slowdown, pass_s = self._shared(key, Load("prefill", grain, self._layers.forward(grain)[1]), alone_s)
        duration_s = alone_s * slowdown
        self._passes += duration_s / pass_s
        self._lead_s = duration_s if self.launches_ahead else 0.0
        return duration_s

    def decode_run(self, batch: Batch) -> DecodeRun:
        """Decode steps, slowed by tuning."""
        decodes, context = batch.decodes, bucket(batch.decodes, batch.decode_context)
        key = ("decode", decodes, context)
        run = self.cost.decode(decodes, batch.decode_context)
        known = self._known.get(key)
        if known is None:
            known = self._shared(key, Load("decode", decodes, self._layers.decode(decodes, context)[1]), run.first_s)
        slowdown, pass_s = known
        steps = min(run.steps, steps_in_bucket(decodes, batch.decode_context))
        self._run = self._led(DecodeRun(run.first_s * slowdown, run.increment_s * slowdown, steps)), pass_s
        return self._run[0]

    def advanced(self, steps: int) -> None:
        """Tuning ran beside those steps."""
        run, pass_s = self._run
        self._passes += run.duration_s(steps) / pass_s

    def idle(self, now_s: float, until_s: float) -> float:
        """Tuning has the GPU to itself, within its own SM limit, and never makes serving wait."""
        self._passes += (until_s - now_s) / self._alone_s
        return until_s


class FeedbackTuning(SteadyTuning):
    """`SteadyTuning` whose pauses follow the P99 latencies of the last window of finished requests."""

    def __init__(
        self, cost: IterationCost, layers: Layers, job: TuningJob, interference: Interference, mode: FeedbackMode
    ) -> None:
        """`watch` must be called with the engine before serving starts."""
        super().__init__(cost, layers, job, interference, mode.waits)
        self._mode, self._seen = mode, 0
        self._engine: Engine | None = None

    def watch(self, engine: Engine) -> None:
        """Take the finished requests of `engine` as the latencies to steer by."""
        self._engine = engine

    def run(self, batch: Batch) -> float:
        """One prompt batch, after looking at what has finished."""
        self._steer()
        return super().run(batch)

    def decode_run(self, batch: Batch) -> DecodeRun:
        """Decode steps, after looking at what has finished."""
        self._steer()
        return super().decode_run(batch)

    def _steer(self) -> None:
        assert self._engine is not None, "watch() was never called"
        finished = self._engine.finished
        if len(finished) < self._seen + self._mode.window:
            return
        records = [sequence.record() for sequence in finished[self._seen :]]
        self._seen = len(finished)
        ttft_s = float(np.percentile([record.ttft_s for record in records], 99))
        tpots_s = [record.tpot_s for record in records if record.request.output_tokens > 1]
        self._mode = self._mode.adjusted(ttft_s, float(np.percentile(tpots_s, 99)) if tpots_s else 0.0)
        self._waits = self._mode.waits
        self._known.clear()


@dataclass(frozen=True, slots=True)
class PlannedLimits:
    """What a planned run must know of its driver and of its slowdowns.

    Attributes:
        whole_steps: slowdowns are of whole decode steps, head and host time included, not of layers.
        most_beside: tasklets that the driver can get beside one decode step; None for as many as are planned.
        whole_phases: the driver fuses the whole forward phase of a sample with a decode step, or nothing of it.
    """

    whole_steps: bool = False
    most_beside: int | None = None
    whole_phases: bool = False


class PlannedTuning(Shared):
    """The planner's tasklets beside decode iterations, none beside prompts, all of the GPU when idle."""

    def __init__(
        self,
        cost: IterationCost,
        layers: Layers,
        job: TuningJob,
        interference: Interference,
        mode: PlannerMode,
        limits: PlannedLimits = PlannedLimits(),
    ) -> None:
        super().__init__(cost)
        self._limits = limits
        self._layers, self._interference, self._mode = layers, interference, mode
        self.progress = TuningProgress(job)
        self._limited = limited(interference, job)
        self._truth: dict[Situation, CoRunLatencies] = {}
        self._plans: dict[Situation, int] = {}
        self.source = LatencySource(self._profile())
        self._tasklets = 0

    @property
    def samples(self) -> float:
        """Samples trained so far."""
        return self.progress.samples

    def _profile(self) -> dict[Situation, CoRunLatencies]:
        """The offline profile: a coarse grid of batch sizes and contexts, every phase."""
        grid = [(b, b * c) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) for c in (128, 512, 2048)]
        job = self.progress.job
        names = [phase.name for phase in job.phases] + ([FUSED] if self._mode.fused and self._limits.whole_phases else [])
        situations = [Situation(b, context, job.tokens, name) for b, context in grid for name in names]
        return {situation: self._latencies(situation) for situation in situations}

    def _is_fused(self, phase: str) -> bool:
        return phase == FUSED or (self._mode.fused and not self._limits.whole_phases and phase == "forward")

    def _situation(self, decodes: int, context: int) -> Situation:
        """Where the coming iteration stands; `FUSED` where it takes a whole forward phase along."""
        progress, layers = self.progress, self.cost.shape.layers
        here = Situation(decodes, bucket(decodes, context), progress.job.tokens, progress.phase.name)
        if not (self._mode.fused and self._limits.whole_phases) or here.phase != "forward" or progress.done_in_phase:
            return here
        fused = replace(here, phase=FUSED)
        return fused if self._plan(fused) >= layers else here

    def _latencies(self, situation: Situation) -> CoRunLatencies:
        """What an iteration in `situation` really takes on the cost model; fused layers stand as l_d, with l_p 0 on top."""
        if (known := self._truth.get(situation)) is not None:
            return known
        layers, b = self._layers, situation.decodes
        alone_s, tenant = layers.decode(b, situation.context)
        if self._limits.whole_steps:
            alone_s = self.cost.decode(b, situation.context).first_s / self.cost.shape.layers
        name = "forward" if situation.phase == FUSED else situation.phase
        phase = next(p for p in self.progress.job.phases if p.name == name)
        if self._is_fused(situation.phase):
            # the sample's own layer, plus what the decoding sequences add to its products, and their attention
            sample, tokens = situation.tuning_tokens, b + situation.tuning_tokens
            products_s = layers.costs.layer_linear_s(tokens) - layers.costs.layer_linear_s(sample)
            reduces_s = layers.reduces_s(tokens) - layers.reduces_s(sample)
            fused_s = phase.tasklet_s + products_s + reduces_s + layers.costs.attention_s((), b, situation.context)
            if self._limits.whole_steps:  # embedding, head and host time, which `alone_s` has a share of
                fused_s += max(0.0, alone_s - layers.decode(b, situation.context)[0])
            known = CoRunLatencies(alone_s, max(alone_s, fused_s), phase.tasklet_s)
        else:
            tuning = Load(phase.name, situation.tuning_tokens, phase.tenant)
            slow = self._interference.slowdowns(Load("decode", b, tenant), tuning)
            known = CoRunLatencies(alone_s, alone_s * slow.serving, phase.tasklet_s * slow.tuning)
        self._truth[situation] = known
        return known

    def _plan(self, situation: Situation) -> int:
        """Tasklets for one iteration in `situation` if the phase never ended; remembered once it rests on the record."""
        if (known := self._plans.get(situation)) is not None:
            return known
        latencies = self.source.lookup(situation)
        shape = self.cost.shape
        fixed_s = self.cost.decode(situation.decodes, situation.context).first_s - shape.layers * latencies.decode_alone_s
        slo_s = self._mode.target_s - fixed_s  # head, embedding and host time come on top of the layers
        unlimited = 1 << 30
        if self._is_fused(situation.phase):
            plan = plan_fused(latencies.decode_alone_s, latencies.decode_s, shape.layers, slo_s, unlimited)
        else:
            plan = plan_overlapped(latencies, shape.layers, slo_s, unlimited)
        measured = self._latencies(situation)
        self.source.record(situation, measured)
        if latencies == measured:
            self._plans[situation] = plan
        return plan

    def _extra_s(self, situation: Situation, tasklets: int) -> float:
        """Seconds that `tasklets` add to an iteration."""
        latencies, layers = self._latencies(situation), self.cost.shape.layers
        if self._is_fused(situation.phase):
            return tasklets * (latencies.decode_s - latencies.decode_alone_s)
        return overlapped_s(latencies, layers, tasklets) - layers * latencies.decode_alone_s

    def decode_run(self, batch: Batch) -> DecodeRun:
        """Decode steps with the planned tasklets beside each."""
        decodes, context, progress = batch.decodes, batch.decode_context, self.progress
        situation = self._situation(decodes, context)
        run = self.cost.decode(decodes, context)
        steps = min(run.steps, steps_in_bucket(decodes, context))
        planned = self._plan(situation)
        self._tasklets = min(planned, progress.remaining)
        if self._limits.most_beside is not None and not self._is_fused(situation.phase):
            self._tasklets = min(self._tasklets, self._limits.most_beside)
        if not self._tasklets:
            return self._led(DecodeRun(run.first_s, run.increment_s, steps))
        steps = min(steps, progress.remaining // self._tasklets)
        if situation not in self._plans:
            steps = 1  # the next iteration plans with what this one measured
        return self._led(DecodeRun(run.first_s + self._extra_s(situation, self._tasklets), run.increment_s, steps))

    def advanced(self, steps: int) -> None:
        """The planned tasklets ran."""
        self.progress.advance(self._tasklets * steps)

    def idle(self, now_s: float, until_s: float) -> float:
        """Tasklets run back to back; the one under way when a request comes is finished first."""
        return max(until_s, now_s + self.progress.run_alone((until_s - now_s) / self._limited) * self._limited)


class ExclusiveTuning(Shared):
    """FineInfer: whole samples while nothing is served."""

    def __init__(self, cost: IterationCost, job: TuningJob, policy: FineInfer) -> None:
        super().__init__(cost)
        self._job, self._policy = job, policy
        self.samples = 0.0

    def decode_run(self, batch: Batch) -> DecodeRun:
        """The coming decode steps, which no tuning slows down."""
        return self._led(super().decode_run(batch))

    def idle(self, now_s: float, until_s: float) -> float:
        """Samples run until the coming request has been held back long enough and the last sample has ended."""
        passes, start_s = self._policy.window(now_s, until_s, self._job.pass_s)
        self.samples += passes * self._job.samples
        return start_s
