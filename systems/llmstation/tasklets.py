"""Tasklets: the grain at which tuning can be suspended (paper section 4; sheet 2.3-2.5).

A tuning sample is a cycle of phases, forward and backward; a phase is a number of equal tasklets, about one per decoder
layer. Between tasklets tuning can stop for as long as serving likes.

Contents: `Phase`, `TuningJob` (one sample's phases) and `TuningProgress` (where in the cycle a run is).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from systems.common.hardware.interference import Tenant


@dataclass(frozen=True, slots=True)
class Phase:
    """A run of equal tasklets: `tasklets` of `tasklet_s` seconds each when alone on the GPU, loading it like `tenant`."""

    name: str
    tasklets: int
    tasklet_s: float
    tenant: Tenant

    def __post_init__(self) -> None:
        assert self.tasklets >= 1 and self.tasklet_s > 0, self

    @property
    def seconds(self) -> float:
        """The whole phase alone on the GPU."""
        return self.tasklets * self.tasklet_s


@dataclass(frozen=True, slots=True)
class TuningJob:
    """One tuning sample as phases in order; `tokens` is its length, `samples` how many one pass trains (data parallelism)."""

    phases: tuple[Phase, ...]
    tokens: int
    samples: float = 1.0

    @property
    def pass_s(self) -> float:
        """One pass alone on the GPU, seconds."""
        return sum(phase.seconds for phase in self.phases)

    def slower(self, times: float) -> TuningJob:
        """The same job with every tasklet `times` as long, its load on the GPU spread accordingly."""
        phases = tuple(
            replace(
                phase,
                tasklet_s=phase.tasklet_s * times,
                tenant=replace(
                    phase.tenant,
                    compute=phase.tenant.compute / times,
                    bandwidth=phase.tenant.bandwidth / times,
                    occupancy=phase.tenant.occupancy / times,
                ),
            )
            for phase in self.phases
        )
        return replace(self, phases=phases)

    def limited(self, sm_limit: float, way: str) -> TuningJob:
        """The same job on a share of the SMs (`way`: see `Tenant`); its tasklets keep the times that they have on all."""
        limited = (replace(phase, tenant=replace(phase.tenant, sm_limit=sm_limit, way=way)) for phase in self.phases)
        return replace(self, phases=tuple(limited))

    @property
    def samples_per_s(self) -> float:
        """Throughput alone on the GPU."""
        return self.samples / self.pass_s


class TuningProgress:
    """Where a tuning job stands: passes done, the phase under way, tasklets done in it."""

    __slots__ = ("_index", "done_in_phase", "job", "passes")

    def __init__(self, job: TuningJob) -> None:
        self.job = job
        self.passes = 0
        self.done_in_phase = 0
        self._index = 0

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self.job.phases[self._index]

    @property
    def remaining(self) -> int:
        """Tasklets left in the phase under way; at least 1."""
        return self.phase.tasklets - self.done_in_phase

    @property
    def samples(self) -> float:
        """Samples trained so far, the begun pass counted by its share of time."""
        before = sum(phase.seconds for phase in self.job.phases[: self._index])
        begun = (before + self.done_in_phase * self.phase.tasklet_s) / self.job.pass_s
        return (self.passes + begun) * self.job.samples

    def advance(self, tasklets: int) -> None:
        """Book `tasklets` tasklets, none of them beyond the phase under way."""
        assert 0 <= tasklets <= self.remaining, (tasklets, self.remaining)
        self.done_in_phase += tasklets
        if self.done_in_phase == self.phase.tasklets:
            self.done_in_phase = 0
            self._index += 1
            if self._index == len(self.job.phases):
                self._index = 0
                self.passes += 1

    def run_alone(self, seconds: float) -> float:
        """Run tasklets back to back from now until `seconds` have passed; how long it took (the last tasklet is not cut)."""
        took = 0.0
        whole = int(seconds // self.job.pass_s)
        if whole > 1:  # whole passes come back to the same place in the cycle
            self.passes += whole - 1
            took = (whole - 1) * self.job.pass_s
        while took < seconds:
            phase = self.phase
            tasklets = min(self.remaining, max(1, -int(-(seconds - took) // phase.tasklet_s)))
            took += tasklets * phase.tasklet_s
            self.advance(tasklets)
        return took
