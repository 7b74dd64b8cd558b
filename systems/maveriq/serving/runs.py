"""One system replays one workload on the simulated node; what came out, with served and unserved requests told apart.

MaverIQ decides at each deploy command, from the node as it then is; a baseline has a fixed placement. Requests for a model that
is not loaded vanish, as in the artifact: they count as issued and not as served, and so does what has not finished 300 s
after the last arrival, when the run is killed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from systems.maveriq.configuration import Configuration, Floats
from systems.maveriq.placement import GpuState
from systems.maveriq.search import Decision, Refusal, Search, Wish
from systems.maveriq.serving.queueing import HANDOVER_S, Engine, Host, engine
from systems.maveriq.serving.services import Services
from systems.maveriq.serving.workload import Ints, ReplicaTrace, Trace

DRAIN_S = 300.0
IDLE_GIB, TOTAL_GIB, GPUS = 0.46527, 47.98828, 8
"""The authors' node: 8 x RTX A6000 and what each holds before anything is loaded (sheet, 7)."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployment of a run. `memory_gib` is all of its GPUs together; `from_s` is when its deploy command came."""

    entry: int
    model: str
    configuration: Configuration
    gpus: tuple[int, ...]
    pp_map: tuple[int, ...]
    service_s: float
    memory_gib: float
    from_s: float
    best_effort: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """A replay. `deployment[i]` is who served request i (-1: nobody); times are seconds, NaN where it never finished."""

    trace: Trace
    deployed: tuple[Deployed, ...]
    refused: tuple[str, ...]
    deployment: Ints
    start_s: Floats
    finish_s: Floats

    @property
    def served(self) -> np.ndarray:
        """Which requests finished before the run was killed."""
        return np.isfinite(self.finish_s)

    @property
    def e2e_s(self) -> Floats:
        """Arrival to last token; NaN for those that were not served."""
        return self.finish_s - self.trace.arrival_s


def deploying(
    trace: Trace, search: Search, services: Services, wishes: Sequence[Wish], discipline: str = "global",
    gpus: int = GPUS, handover_s: float = HANDOVER_S,
) -> Run:  # fmt: skip
    """MaverIQ: `wishes[e]` is decided at entry e's deploy command, on the memory and the load of that moment."""
    node = engine(discipline, gpus, handover_s)
    used = [IDLE_GIB] * gpus
    deployed, refused, by_entry = list[Deployed](), list[str](), dict[int, int]()
    pending = sorted(range(len(trace.entries)), key=lambda entry: (trace.deploy_s[entry], entry))
    deployment = np.full(len(trace.arrival_s), -1, dtype=np.int64)
    for request, (arrival_s, entry) in enumerate(zip(trace.arrival_s.tolist(), trace.target.tolist(), strict=True)):
        while pending and trace.deploy_s[pending[0]] <= arrival_s:
            new = pending.pop(0)
            found = _deploy(node, search, services, wishes[new], new, float(trace.deploy_s[new]), used)
            if isinstance(found, Refusal):
                refused.append(f"{wishes[new].model}: {found.reason}")
                continue
            by_entry[new] = len(deployed)
            node.host(len(deployed), Host(found.gpus, found.service_s))
            deployed.append(found)
        deployment[request] = by_entry.get(entry, -1)
        node.offer(arrival_s, int(deployment[request]))
    return _ended(trace, deployed, refused, deployment, node)


def _deploy(
    node: Engine, search: Search, services: Services, wish: Wish, entry: int, now_s: float, used: list[float]
) -> Deployed | Refusal:
    node.advance(now_s)
    states = [GpuState(gpu, TOTAL_GIB, gib, node.node.busy(gpu, now_s)) for gpu, gib in enumerate(used)]
    found = search.deploy(wish, states)
    if isinstance(found, Refusal):
        return found
    return _loaded(found, services, wish, entry, now_s, used)


def _loaded(found: Decision, services: Services, wish: Wish, entry: int, now_s: float, used: list[float]) -> Deployed:
    """The deployment that `found` becomes; its memory, as measured where a table has it, is added to `used`."""
    one, placed = found.configuration, found.placement
    memory = services.memory_gib(wish.model, one)
    for gpu, gib in zip(placed.gpus, placed.gib, strict=True):
        used[gpu] = min(TOTAL_GIB, used[gpu] + gib * memory / placed.total_gib)
    service_s = services.service_s(wish.model, one, wish.output_length)
    return Deployed(entry, wish.model, one, placed.gpus, placed.pp_map, service_s, memory, now_s, found.best_effort)


def replaying(
    traced: ReplicaTrace, replicas: Sequence[Sequence[Deployed]], discipline: str = "global", gpus: int = GPUS,
    handover_s: float = HANDOVER_S, cut_s: float = DRAIN_S,
) -> Run:  # fmt: skip
    """A baseline: `replicas[e]` host entry e for the whole run, and the trace says which one each request is for."""
    trace = traced.trace
    node = engine(discipline, gpus, handover_s)
    deployed = [one for hosts in replicas for one in hosts]
    first = np.cumsum([0, *(len(hosts) for hosts in replicas)])
    for place, one in enumerate(deployed):
        node.host(place, Host(one.gpus, one.service_s))
    deployment = np.where(traced.replica >= 0, first[trace.target] + traced.replica, -1)
    for arrival_s, place in zip(trace.arrival_s.tolist(), deployment.tolist(), strict=True):
        node.offer(arrival_s, place)
    return _ended(trace, deployed, [], deployment, node, cut_s)


def _ended(
    trace: Trace, deployed: Sequence[Deployed], refused: Sequence[str], deployment: Ints, node: Engine, cut_s: float = DRAIN_S
) -> Run:
    times = node.served()
    finish_s = np.where(times.finish_s <= trace.end_s + cut_s, times.finish_s, math.nan)
    return Run(trace, tuple(deployed), tuple(refused), deployment, times.start_s, finish_s)
