"""What runs in a replica's process: dLoRA's engine over the model that the file names, every adapter in host memory.

PyTorch is imported inside, when the process knows which GPUs it may see.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING

from systems.common.errors import InputError
from systems.common.serve.messages import Ended, Ready
from systems.common.serve.process import listen, run_engine
from systems.dlora.policies import Plan, Policy
from systems.dlora.policies.credit import Credit, CreditRules
from systems.dlora.policies.static import Fcfs, Merge, OneAdapter, Stateless
from systems.dlora.replica import engine_config
from systems.dlora.requests import RequestQueue
from systems.dlora.serving.file import ServerFile
from systems.dlora.sizes import RANK

if TYPE_CHECKING:
    from systems.common.models import ModelShape
    from systems.common.serve.loading import Given
    from systems.common.torch_engine.lora import Adapter
    from systems.common.torch_engine.weights import Weights
    from systems.dlora.lora_engine.runner import LoraRunner
    from systems.dlora.serving.loop import Inbox

PLACES = 8
"""Full batches of requests that may hold KV cache at once, paused ones included."""
LEAST_CONTEXTS = 4
"""Longest contexts that the KV cache should hold beside a second set of weights; else weights are changed in place."""
MEASURED_BLOCKS = 4
"""KV blocks that a request of `measure_constants` may come to hold."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a replica is told: the file, and which replica of it this is."""

    given: ServerFile
    index: int


@dataclass(frozen=True, slots=True)
class Unmerged(Stateless):
    """What PEFT does (exec type 2): the FCFS prefix of one adapter, never merged."""

    inner: OneAdapter

    def plan(self, queue: RequestQueue) -> Plan:
        """See `Policy`."""
        return Plan(self.inner.plan(queue).order)


def run(connection: Connection, start: Start) -> Ended:
    """A replica, until it is told to end."""
    given = start.given
    if devices := given.devices(start.index, os.environ.get("CUDA_VISIBLE_DEVICES")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if given.tensor_parallel_size > 1:  # dLoRA's engine has one GPU: the common one is always unmerged
        return run_engine(connection, given.for_common_engine())
    inbox: Inbox = SimpleQueue()
    listen(connection, inbox.put)
    from systems.common.serve.loading import resolve
    from systems.dlora.serving.loop import ReplicaLoop

    plan = resolve(given.for_model())
    plan = replace(plan, most=min(plan.most, given.max_num_batched_tokens))  # prompts run whole
    runner = build(given, plan)
    policy, constants = _policy(given, runner)
    gc.collect()
    gc.freeze()  # what start-up made is never garbage
    executor, shape = runner.live.executor, plan.shape
    config = engine_config(executor.config.num_gpu_blocks, given.max_num_seqs, given.max_num_batched_tokens)
    loop = ReplicaLoop(runner, config, policy, given.names, connection.send, inbox, given.base_model)
    where = str(executor.device), shape.dtype, tuple(given.names)
    connection.send(Ready(config, executor.max_tokens, shape.vocab, *where, {**_told(runner), **constants}))
    try:
        loop.run()
    except InputError as error:  # bad input is refused before: this one is a defect
        raise RuntimeError(str(error)) from error
    return Ended()


def _told(runner: LoraRunner) -> dict[str, object]:
    """How the runner does its work."""
    from systems.dlora.lora_engine.switching import Copy

    return {"weights": "copy" if isinstance(runner.scheme, Copy) else "in-place", "lora": runner.bank.backend}


def build(given: ServerFile, plan: Given) -> LoraRunner:
    """The runner, warm, with every adapter in host memory. Raises InputError."""
    import torch

    from systems.common.engine.config import EngineConfig
    from systems.common.serve.loading import read_weights
    from systems.common.torch_engine.lora import random_adapter
    from systems.dlora.lora_engine.adapters import read
    from systems.dlora.lora_engine.bank import SITES
    from systems.dlora.lora_engine.runner import LoraRunner

    if plan.device == "cpu":  # replicas share the cores: threads that wait for one another would take them all
        torch.set_num_threads(max(1, torch.get_num_threads() // given.replicas))
    adapters = {name: read(folder, plan.shape, base=given.base_model) for name, folder in given.adapters.items()}
    rank = max([given.max_lora_rank or RANK if given.random_adapters else given.max_lora_rank, *map(_rank, adapters.values())])
    places = PLACES * given.max_num_seqs
    try:
        weights = read_weights(given.for_model(), plan.shape, plan.device)
        blocks, scheme = memory(given, plan, weights, rank)
        config = EngineConfig(blocks, max_num_seqs=places, max_num_batched_tokens=max(given.max_num_batched_tokens, places))
        runner = LoraRunner.build(
            plan.shape, weights, config, given.slots, rank, scheme=scheme, max_tokens=plan.most, given=plan.numerics
        )
        for name, adapter in adapters.items():
            runner.add(name, adapter)
        for seed, name in enumerate(given.names[len(adapters) :]):  # one at a time: they are large
            runner.add(name, random_adapter(plan.shape, given.max_lora_rank or RANK, seed, SITES))
        runner.warm(rows=given.max_num_seqs)
    except torch.OutOfMemoryError as error:
        mend = "lower gpu_memory_utilization, kv_blocks, slots or max_num_batched_tokens, or take a smaller model"
        raise InputError("serve", "gpu memory", str(error).splitlines()[0], mend) from error
    return runner


def _rank(adapter: Adapter) -> int:
    return max(int(a.shape[0]) for a, _ in adapter.modules.values())


def memory(given: ServerFile, plan: Given, weights: Weights, rank: int) -> tuple[int, str]:
    """KV blocks, and how weights take adapters in: by a second set of them where there is room for that (docs/dlora.md)."""
    from systems.common.serve.loading import CPU_CACHE_BYTES
    from systems.common.torch_engine.executor import fitting_blocks
    from systems.dlora.lora_engine.switching import layer_bytes

    shape, longest = plan.shape, -(-plan.most // 16)
    block_bytes = int(shape.kv_bytes_per_token * 16)
    if plan.device == "cpu":
        on_cpu = min(PLACES * given.max_num_seqs * longest, int(CPU_CACHE_BYTES // block_bytes))
        return given.kv_blocks or max(1, on_cpu), "copy"
    most = fitting_blocks(shape, given.gpu_memory_utilization, given.max_num_batched_tokens)
    fitting = most - -(-bank_bytes(shape, given.slots, rank) // block_bytes)
    beside = fitting - -(-layer_bytes(weights) // block_bytes)
    wanted = given.kv_blocks or LEAST_CONTEXTS * longest
    scheme = "copy" if beside >= wanted else "in-place"
    blocks = given.kv_blocks or (beside if scheme == "copy" else fitting)
    if not 0 < blocks <= fitting:
        mend = f"{max(0, fitting)} blocks fit beside {shape.name} and {given.slots} adapters: lower kv_blocks or slots"
        raise InputError("serve", "kv_blocks", blocks, mend)
    return blocks, scheme


def bank_bytes(shape: ModelShape, slots: int, rank: int) -> int:
    """Bytes of the GPU's slots: per layer and rank, inputs of every A (q, k, v, gate, up have their own), outputs of B."""
    inputs = 3 * shape.hidden + shape.q_width + 2 * shape.hidden + shape.mlp
    outputs = shape.q_width + 2 * shape.kv_width + shape.hidden + 2 * shape.mlp + shape.hidden
    return int((slots + 1) * shape.layers * rank * (inputs + outputs) * shape.dtype_bytes)


def _policy(given: ServerFile, runner: LoraRunner) -> tuple[Policy, Mapping[str, object]]:
    """The policy, and the `constants` that were measured for it (seconds; `credit` alone needs them)."""
    slots, batch = given.slots, given.max_num_seqs
    if given.exec_type == "peft":
        return Unmerged(OneAdapter(batch)), {}
    match given.policy:
        case "fcfs":
            return Fcfs(slots, batch), {}
        case "merge":
            return Merge(batch), {}
    rules = _measured(given, runner)
    return Credit(len(given.names) + 1, slots, batch, rules), {"constants": asdict(rules)}


def _measured(given: ServerFile, runner: LoraRunner) -> CreditRules:
    from systems.dlora.lora_engine.constants import measure_constants

    alone = len(given.names) == 1
    if alone:  # a change from one adapter to another needs another one
        name = given.names[0]
        runner.add(TWIN, runner.store.host[name])
    rows = max(1, min(given.max_num_seqs, runner.live.engine.config.num_gpu_blocks // MEASURED_BLOCKS))
    rules = measure_constants(runner, rows).rules(given.credit_scale)
    if alone:
        runner.remove(TWIN)
    runner.switches = runner.store.loads = 0  # what is counted from here on is serving
    return rules


TWIN = "\0"
"""A name that no file can give."""
