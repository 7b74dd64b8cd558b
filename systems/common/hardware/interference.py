"""What two workloads that share a GPU do to each other.

Where co-run slowdowns have not been measured (`snakemake calibrate` measures them, interference_table.py reads them), this
analytic model stands in. It is physically motivated, has two assumptions and no fitted constant, and every figure that uses it
says so:

1. **Streaming multiprocessors (SMs).** Kernels of two processes under MPS do not mix inside an SM queue: blocks of one
   kernel are dispatched before those of the next (the "leftover" policy). On SMs that both may use, kernels therefore
   alternate, and each tenant gets time in proportion to the length of its kernels. On SMs that the other is not allowed
   to use (an MPS thread percentage, a green context) a tenant is alone.
2. **Memory bandwidth** is shared in proportion to demand. A kernel bound by memory needs `SATURATING_SMS` of the SMs to
   reach full bandwidth, one bound by arithmetic needs all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

SATURATING_SMS = 0.5
"""Share of the SMs that saturates device memory. An assumption: bandwidth tests level off between a third and two thirds."""


STREAMS, STEADY, GREEN, MPS = "streams", "steady", "green", "mps"
"""Ways to share a GPU. Streams with priorities of one process: some tasklets at the start of a step, or tuning that never
pauses; the latter limited to some SMs by a green context; two processes under MPS."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """What one workload takes of a GPU while it runs alone.

    Attributes:
        compute: share of the reachable FLOP/s, 0 to 1.
        bandwidth: share of the reachable bytes/s, 0 to 1.
        kernel_s: length of its typical large kernel, seconds.
        occupancy: share of its time that it has a kernel on the GPU (the rest is communication or waiting), 0 to 1.
        sm_limit: most of the SMs that it may use, 0 to 1.
        way: how it shares the GPU, and is limited. Only measured slowdowns tell the ways apart.
    """

    compute: float
    bandwidth: float
    kernel_s: float
    occupancy: float = 1.0
    sm_limit: float = 1.0
    way: str = STREAMS

    def __post_init__(self) -> None:
        assert 0 <= self.compute <= 1 and 0 <= self.bandwidth <= 1, self
        assert self.kernel_s > 0 and 0 <= self.occupancy <= 1 and 0 < self.sm_limit <= 1, self

    @property
    def sms_needed(self) -> float:
        """Share of the SMs that it needs to run as fast as alone and unlimited."""
        return max(self.compute, self.bandwidth * SATURATING_SMS)

    @property
    def limited_slowdown(self) -> float:
        """How many times slower its own `sm_limit` makes it, with the GPU to itself."""
        return max(1.0, self.sms_needed / self.sm_limit)


@dataclass(frozen=True, slots=True)
class Load:
    """A tenant in one of its phases: `decode` with `size` sequences, `prefill` or a tuning phase with `size` tokens."""

    phase: str
    size: int
    tenant: Tenant


@dataclass(frozen=True, slots=True)
class Slowdowns:
    """How many times longer each of two tenants takes while both run, against running alone and unlimited; at least 1."""

    serving: float
    tuning: float


class Interference(Protocol):
    """A source of co-run slowdowns."""

    @property
    def source(self) -> str:
        """For a figure's footer."""
        ...

    def slowdowns(self, serving: Load, tuning: Load) -> Slowdowns:
        """Slowdowns while both run."""
        ...

    def alone(self, tuning: Load) -> float:
        """How many times longer tuning takes with nothing beside it, for its own limit on SMs."""
        ...


class AnalyticInterference:
    """The model described at the head of this module."""

    source = "co-run slowdowns analytic (alternating kernels, shared bandwidth), not measured"

    def slowdowns(self, serving: Load, tuning: Load) -> Slowdowns:
        """Slowdowns while both run, from what the two tenants ask of the GPU."""
        return self.of(serving.tenant, tuning.tenant)

    def alone(self, tuning: Load) -> float:
        """From what tuning asks of the GPU."""
        return tuning.tenant.limited_slowdown

    def of(self, serving: Tenant, tuning: Tenant) -> Slowdowns:
        """Slowdowns of two tenants, whatever their phases are called."""
        serving_speed = min(1.0, self._sms_left(serving, tuning) / max(serving.sms_needed, 1e-9))
        # the tuning side gets the SMs that serving does not keep busy, within its own limit
        sms = min(tuning.sm_limit, max(1.0 - serving_speed * serving.sms_needed, self._sms_left(tuning, serving)))
        tuning_speed = min(1.0, sms / max(tuning.sms_needed, 1e-9))
        demand = serving.bandwidth * serving_speed + tuning.bandwidth * tuning_speed
        crowding = max(1.0, demand)
        return Slowdowns(crowding / serving_speed, crowding / tuning_speed)

    @staticmethod
    def _sms_left(mine: Tenant, other: Tenant) -> float:
        """Share of the SMs that `mine` gets beside `other`."""
        turn = mine.kernel_s / (mine.kernel_s + other.kernel_s * other.occupancy) if other.occupancy else 1.0
        shared = min(mine.sm_limit, other.sm_limit)
        own = min(mine.sm_limit, 1.0 - other.sm_limit)
        return min(mine.sm_limit, own + shared * ((1 - other.occupancy) + other.occupancy * turn))
