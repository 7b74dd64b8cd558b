"""What the GPUs hold: measured through NVML (`nvidia-smi`), or budgets kept as bookkeeping (virtual GPUs).

Virtual GPUs let one machine play a node of many: each has a budget, placements are charged against it, and `device` says which
real device stands behind it. On a CPU that is none at all.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from systems.common.errors import InputError
from systems.maveriq.placement import GpuState, Placement

Busy = Callable[[int], float]
"""From a GPU's index to the share of the last two minutes in which it computed."""


class Memory(Protocol):
    """The state of the GPUs for the next decision."""

    def states(self, busy: Busy) -> list[GpuState]:
        """Every GPU as it is now."""

    def charge(self, name: str, placement: Placement) -> None:
        """A deployment takes its place: count it from now on."""

    def release(self, name: str) -> None:
        """It is gone."""

    def devices(self, gpus: Sequence[int]) -> tuple[int, ...]:
        """The real device behind each of these GPUs, in their order; none on a CPU."""


@dataclass
class Budgets:
    """Virtual GPUs. `device` maps each to a real device; empty where there is none."""

    total_gib: tuple[float, ...]
    idle_gib: tuple[float, ...]
    device: tuple[int, ...] = ()
    _held: dict[str, Placement] = field(default_factory=dict)

    def states(self, busy: Busy) -> list[GpuState]:
        """Budgets, and what has been charged."""
        used = list(self.idle_gib)
        for placement in self._held.values():
            for gpu, gib in zip(placement.gpus, placement.gib, strict=True):
                used[gpu] += gib
        return [GpuState(gpu, total, used[gpu], busy(gpu)) for gpu, total in enumerate(self.total_gib)]

    def charge(self, name: str, placement: Placement) -> None:
        """Count it."""
        self._held[name] = placement

    def release(self, name: str) -> None:
        """Forget it."""
        self._held.pop(name, None)

    def devices(self, gpus: Sequence[int]) -> tuple[int, ...]:
        """Real devices."""
        return tuple(self.device[gpu] for gpu in gpus) if self.device else ()


@dataclass
class Nvml:
    """Real GPUs. What is still loading is not in NVML's numbers yet, so a charge counts until `settled`.

    The artifact's controller did not see loads in flight; two deployments in a row could choose the same memory.
    """

    binary: str = "nvidia-smi"
    _loading: dict[str, Placement] = field(default_factory=dict)

    def states(self, busy: Busy) -> list[GpuState]:
        """Used and total memory of every GPU, plus what is being loaded. Raises InputError without a working `nvidia-smi`."""
        rows = self._query("--query-gpu=index,memory.total,memory.used")
        states = [GpuState(int(row[0]), float(row[1]) / 1024, float(row[2]) / 1024, busy(int(row[0]))) for row in rows]
        extra = dict.fromkeys(range(len(states)), 0.0)
        for placement in self._loading.values():
            for gpu, gib in zip(placement.gpus, placement.gib, strict=True):
                extra[gpu] += gib
        return [
            GpuState(one.index, one.total_gib, min(one.total_gib, one.used_gib + extra[one.index]), one.busy) for one in states
        ]

    def charge(self, name: str, placement: Placement) -> None:
        """Count it until it has settled."""
        self._loading[name] = placement

    def settled(self, name: str) -> None:
        """It has loaded: NVML sees it now."""
        self._loading.pop(name, None)

    def release(self, name: str) -> None:
        """Gone before it had loaded."""
        self._loading.pop(name, None)

    def devices(self, gpus: Sequence[int]) -> tuple[int, ...]:
        """They are the devices."""
        return tuple(gpus)

    def processes_gib(self) -> Mapping[int, float]:
        """GiB of GPU memory by process id, over all GPUs."""
        found: dict[int, float] = {}
        for row in self._query("--query-compute-apps=pid,used_memory"):
            if row[1].strip().replace(".", "", 1).isdigit():  # "[N/A]" inside some containers
                found[int(row[0])] = found.get(int(row[0]), 0.0) + float(row[1]) / 1024
        return found

    def _query(self, what: str) -> list[list[str]]:
        try:
            done = subprocess.run(
                [self.binary, what, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError) as error:
            mend = f"can't be asked ({error}): use --gpu-total-gib for virtual GPUs"
            raise InputError("controller", "gpus", self.binary, mend) from error
        return [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if row]
