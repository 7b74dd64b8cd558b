"""The four systems of the end-to-end figures on one workload: MaverIQ, AlpaServe, AlpaServe* and Accelerate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from systems.common.errors import InputError
from systems.maveriq.baselines.accelerate import balanced_map, replay, request_s
from systems.maveriq.baselines.alpaserve import AlpaServe, Groups, Job
from systems.maveriq.baselines.published import published_placement
from systems.maveriq.configuration import Configuration
from systems.maveriq.search import Search, Wish
from systems.maveriq.serving.queueing import HANDOVER_S
from systems.maveriq.serving.runs import DRAIN_S, GPUS, IDLE_GIB, TOTAL_GIB, Deployed, Run, deploying, replaying
from systems.maveriq.serving.services import PUBLISHED_TOKENS, Services, accelerate_known
from systems.maveriq.serving.workload import Entry, Replicated, replayed, replayed_on, slo_s

LOAD_S_PER_GIB = 124 / 131.4
"""Accelerate's loading: 124 s for Llama-2-70B, 131.4 GiB on the GPUs (its log of code RS 0.1, large)."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A workload and what a system may do with it. `counts` are requests per slot."""

    counts: Sequence[int]
    entries: tuple[Entry, ...]
    model_list: str
    rate_scale: float
    intent: str = "min_lat"
    slo_factor: float = 0.0
    fp16_only: bool = False
    strategy: str = "hybrid"
    threshold: float = 0.7
    queue: str = "global"
    placement: str = "published"
    handover_s: float = HANDOVER_S
    accuracy: float = 0.0


@dataclass(frozen=True)
class Bench:
    """What all systems share: the search and what is known of times and memory."""

    search: Search
    services: Services
    placed: dict[str, Groups | None] = field(default_factory=dict)

    def run(self, system: str, scene: Scene) -> Run | None:
        """`system` replays `scene`; None where it has no placement. Raises InputError for an unknown system."""
        if system == "maveriq":
            return self.maveriq(scene)
        if system in ("alpaserve", "alpaserve_star"):
            return self.alpaserve(scene, system)
        if system == "accelerate":
            return self.accelerate(scene)
        raise InputError("maveriq", "system", system, "use maveriq, alpaserve, alpaserve_star or accelerate")

    def maveriq(self, scene: Scene) -> Run:
        """Deploy by intent, under the scene's queue."""
        trace = replayed(scene.counts, scene.entries)
        return deploying(trace, self.search, self.services, wishes(scene), scene.queue, handover_s=scene.handover_s)

    def alpaserve(self, scene: Scene, which: str) -> Run | None:
        """A static placement: the published one, or the one that our search finds."""
        groups = self.placement(scene, which)
        if groups is None:
            return None
        placed = Replicated(scene.entries, groups.hosts)
        one = Configuration(groups.tp, groups.pp)
        replicas = [
            [self._replica(place, entry.model, one, groups.gpus(group)) for group in hosts]
            for place, (entry, hosts) in enumerate(zip(scene.entries, groups.hosts, strict=True))
        ]
        return replaying(replayed_on(scene.counts, placed), replicas, scene.queue, handover_s=scene.handover_s)

    def _replica(self, entry: int, model: str, one: Configuration, gpus: tuple[int, ...]) -> Deployed:
        service_s, memory = self.services.service_s(model, one), self.services.memory_gib(model, one)
        layers = self.search.facts[model].layers
        return Deployed(entry, model, one, gpus, balanced_map(layers, one.pp), service_s, memory, 0.0)

    def placement(self, scene: Scene, which: str) -> Groups | None:
        """AlpaServe's groups for `scene`."""
        if scene.placement == "published":
            return published_placement(which, scene.model_list, scene.rate_scale)
        if scene.placement != "search":
            raise InputError("maveriq", "placement", scene.placement, "use published or search")
        trace = replayed(scene.counts, scene.entries)
        models = tuple(entry.model for entry in scene.entries)
        requests = tuple(zip(trace.arrival_s.tolist(), trace.target.tolist(), strict=True))
        job = Job(models, tuple(slo_s(model, scene.slo_factor or 5.0) for model in models), requests)
        found = self._searcher(which == "alpaserve_star").place(job)
        return found[0] if found else None

    def _searcher(self, keep_all: bool) -> AlpaServe:
        full = self.services.full_models

        def latency_s(model: str, one: Configuration) -> float:
            """The 923-token table that the artifact feeds AlpaServe."""
            return full[model, one].whole_s if (model, one) in full else math.inf

        def memory_gib(model: str, one: Configuration) -> float:
            return full[model, one].memory_gib / one.gpus if (model, one) in full else math.inf

        return AlpaServe(latency_s, memory_gib, GPUS, TOTAL_GIB - IDLE_GIB, keep_all)

    def accelerate(self, scene: Scene) -> Run:
        """One thread, all GPUs, Hugging Face."""
        trace = replayed(scene.counts, scene.entries)
        known, facts = accelerate_known(), self.search.facts
        weights = {entry.model: self.weights_gib(entry.model) for entry in scene.entries}
        took = [request_s(entry.model, facts, known) for entry in scene.entries]
        served = replay(trace, took, [weights[entry.model] * LOAD_S_PER_GIB for entry in scene.entries])
        finish_s = np.where(served.finish_s <= trace.end_s + DRAIN_S, served.finish_s, math.nan)
        deployed = tuple(
            Deployed(
                place, entry.model, Configuration(1, GPUS), tuple(range(GPUS)), balanced_map(facts[entry.model].layers, GPUS),
                took[place], weights[entry.model], float(trace.deploy_s[place]),
            )
            for place, entry in enumerate(scene.entries)
        )  # fmt: skip
        return Run(trace, deployed, (), trace.target, served.start_s, finish_s)

    def weights_gib(self, model: str) -> float:
        """fp16 memory of the smallest layout of the table: what a balanced device map loads."""
        sizes = [
            (one.gpus, full.loaded_gib)
            for (name, one), full in self.services.full_models.items()
            if name == model and one.dtype == "float16" and not one.int8_kv and one.tp == 1
        ]
        if not sizes:
            raise InputError("maveriq", "model", model, "the full-model table has no float16 row of it")
        return min(sizes)[1]


def wishes(scene: Scene) -> list[Wish]:
    """What MaverIQ is asked for each entry of the scene."""
    return [
        Wish(
            entry.model, scene.intent, slo_s(entry.model, scene.slo_factor) if scene.slo_factor > 0 else 0.0, scene.accuracy,
            scene.fp16_only, 1, PUBLISHED_TOKENS, scene.strategy, scene.threshold,
        )
        for entry in scene.entries
    ]  # fmt: skip
