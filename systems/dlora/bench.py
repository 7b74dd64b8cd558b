"""From a trial's parameters to a cluster: model, prices, policy, placement, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from systems.common.core import Trial
from systems.common.engine.memory import ACTIVATION_BYTES
from systems.common.errors import InputError
from systems.common.hardware import Testbed, parse_testbed
from systems.common.models import ModelShape, model
from systems.dlora import sizes
from systems.dlora.baselines.peft import PeftCosts
from systems.dlora.baselines.slora import BRANCH, SloraCosts
from systems.dlora.baselines.whole_model import COPIES, LruSlots, WholeModelCosts
from systems.dlora.cluster.migration import MigrationRules
from systems.dlora.cluster.placement import Hosts, fill, replicate, striped
from systems.dlora.cluster.simulated import Cluster, ClusterRules
from systems.dlora.costs import ArtifactCosts, ReplicaCosts, artifact_costs, modelled_costs
from systems.dlora.policies import Policy
from systems.dlora.policies.credit import Credit, CreditRules
from systems.dlora.policies.static import Fcfs, Merge, OneAdapter
from systems.dlora.replica import Replica, engine_config
from systems.dlora.slots import Slots

SYSTEMS = ("dlora", "vllm", "peft", "slora")
POLICIES = ("credit", "fcfs", "merge")
SOURCES = ("artifact", "modelled")
UTILISATION = 0.9


@dataclass(frozen=True, slots=True)
class Bench:
    """What a trial runs on and with which settings; every value checked when it is read."""

    parameters: Mapping[str, Any]
    shape: ModelShape
    testbed: Testbed
    seed: int

    @classmethod
    def of(cls, trial: Trial) -> Bench:
        """The bench of `trial`. Raises InputError for an unknown model or testbed."""
        return cls(
            trial.parameters, model(str(trial.parameters.get("model", "llama-2-7b"))), parse_testbed(trial.hardware), trial.seed
        )

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number. Raises InputError when it is something else."""
        value = self.parameters.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError("dlora", key, value, f"give a whole number of at least {least}")
        return value

    def number(self, key: str, default: float) -> float:
        """A number. Raises InputError when it is something else."""
        value = self.parameters.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError("dlora", key, value, "give a number")
        return float(value)

    def choice(self, key: str, default: str, options: tuple[str, ...]) -> str:
        """One of `options`. Raises InputError when it is something else."""
        value = self.parameters.get(key, default)
        if value not in options:
            raise InputError("dlora", key, value, f"use one of {', '.join(options)}")
        return str(value)

    @property
    def system(self) -> str:
        """Which system: dLoRA or a baseline."""
        return self.choice("system", "dlora", SYSTEMS)

    @property
    def tp(self) -> int:
        """GPUs per replica."""
        return self.whole("tp", 1)

    @property
    def adapters(self) -> int:
        """Adapters in all."""
        return self.whole("adapters", 8)

    @property
    def replicas(self) -> int:
        """Replicas. Raises InputError when the testbed has too few GPUs for them."""
        count = self.whole("replicas", 1)
        if count * self.tp > self.testbed.count:
            mend = f"{self.testbed.name} has room for {self.testbed.count // self.tp} of {self.tp} GPU(s)"
            raise InputError("dlora", "replicas", count, mend)
        return count

    @property
    def kinder(self) -> bool:
        """Whether a baseline runs in its kinder variant."""
        return bool(self.parameters.get("kinder", False))

    def costs(self) -> ReplicaCosts:
        """The prices of a replica."""
        base: ReplicaCosts
        if self.choice("source", "artifact", SOURCES) == "artifact":
            base = artifact_costs(self.shape, model("llama-2-7b"), self.tp, self.number("overhead_s", 0.0))
        else:
            gathers = self.system == "slora" or self.parameters.get("back_end") == "gather"
            base = modelled_costs(self.shape, self.testbed, self.tp, "gather" if gathers else "einsum")
        if self.system == "vllm":
            return WholeModelCosts(base, self.shape.weight_bytes / self.tp, self.kinder)
        if self.system == "peft":
            return PeftCosts(base)
        if self.system == "slora":
            kind = 0.0 if self.kinder else BRANCH if isinstance(base, ArtifactCosts) else 1.0
            return SloraCosts(base, self.number("branch", kind))
        return base

    def hosts(self) -> Hosts:
        """Where adapters lie at start: stripes for vLLM, all everywhere for S-LoRA, else the greedy and G + M - 1 copies."""
        engines, adapters = self.replicas, self.adapters
        if self.system == "vllm":
            return striped(adapters, engines)
        if self.system == "slora":
            return [set(range(adapters)) for _ in range(engines)]
        free = [float(self._pool_bytes())] * engines
        size = sizes.adapter_bytes(self.shape) / self.tp
        placed = fill([set() for _ in range(engines)], free, [1 / adapters] * adapters, size)
        random = np.random.default_rng([self.seed, adapters, engines]) if self._random_copy() else None
        return replicate(placed, adapters, random)

    def _random_copy(self) -> bool:
        return self.migration in ("dlora", "none") or self.system == "peft"

    @property
    def migration(self) -> str:
        """How requests are balanced; baselines only dispatch."""
        if self.system != "dlora":
            return "none"
        return self.choice("migration", "dlora", ("dlora", "proactive", "round_robin", "none"))

    def _pool_bytes(self) -> float:
        """Memory per GPU for adapters and KV."""
        left = UTILISATION * self.testbed.gpu.memory_bytes - self.shape.weight_bytes / self.tp - ACTIVATION_BYTES
        if left <= 0:
            raise InputError(
                "dlora", "model", self.shape.name, f"does not fit on {self.tp} x {self.testbed.gpu.name}: raise tp"
            )
        return left

    def kv_blocks(self, slots: int) -> int:
        """KV blocks of a replica with `slots` adapters (vLLM: copies of the model). Raises InputError when none are left."""
        if "kv_blocks" in self.parameters:
            return self.whole("kv_blocks")
        taken = slots * sizes.adapter_bytes(self.shape) / self.tp
        if self.system == "vllm":
            taken = (slots - 1) * self.shape.weight_bytes / self.tp
        blocks = int((self._pool_bytes() - taken) * self.tp // sizes.kv_block_bytes(self.shape))
        if blocks < 1:
            raise InputError(
                "dlora", "adapters", slots, "their slots leave no memory for KV blocks: host fewer, or use more GPUs"
            )
        return blocks

    def rules(self, costs: ReplicaCosts) -> CreditRules:
        """Constants of credit scheduling: measured at start, that is, asked of the prices; and the scale."""
        told = costs.rules
        scale = self.number("credit_scale", 1e4)
        return CreditRules(told.merged_s, told.unmerged_s, told.switch_s, scale)

    def policy(self, costs: ReplicaCosts, slots: int) -> Policy:
        """A policy for one replica."""
        batch = self.whole("batch", 16)
        if self.system in ("vllm", "peft"):
            return OneAdapter(batch, self.kinder)
        kind = "fcfs" if self.system == "slora" else self.choice("policy", "credit", POLICIES)
        if kind == "fcfs":
            return Fcfs(slots, batch)
        if kind == "merge":
            return Merge(batch)
        return Credit(self.adapters, slots, batch, self.rules(costs))

    def slots(self, hosted: set[int]) -> Slots:
        """Slots of a replica: as many as adapters are placed there at start; for vLLM, copies of the model."""
        if self.system == "vllm":
            copies = min(self.whole("copies", COPIES.get(self.shape.name, 1)), max(1, len(hosted)))
            return LruSlots(copies, sorted(hosted)[:copies])
        capacity = self.whole("slots", max(1, len(hosted)))
        return Slots(capacity, sorted(hosted)[:capacity])

    def cluster(self, costs: ReplicaCosts) -> Cluster:
        """The whole cluster, idle."""
        hosts = self.hosts()
        replicas = []
        for index, hosted in enumerate(hosts):
            slots = self.slots(hosted)
            config = engine_config(self.kv_blocks(slots.capacity), self.whole("batch", 16))
            replicas.append(Replica(index, config, self.policy(costs, slots.capacity), costs, slots))
        rules = MigrationRules(
            interval_s=self.number("interval_s", 10.0),
            load_excess=self.number("load_excess", 16.0),
            scope=str(self.parameters.get("scope", "pair")),
            copy_kv=bool(self.parameters.get("copy_kv", False)),
        )
        # a machine's GPUs share its NVLink; other machines are behind a 200 Gbit/s network
        link = self.testbed.gpu.link(self.testbed.count) if self.testbed.count <= 8 else 25e9
        return Cluster(replicas, hosts, ClusterRules(self.migration, rules, link, sizes.kv_block_bytes(self.shape)))
