"""How long an iteration of a replica takes: two sources behind one interface.

* `ArtifactCosts`: the constants of the artifact (15, 27 and 20 ms for Llama-2-7B); what it does not say is an assumption of
  ours, listed at the class and in docs/dlora.md.
* `ModelledCosts`: our hardware model for the base model, and a roofline of the LoRA branch, of switching and of copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from systems.common.engine.executor import DecodeRun
from systems.common.engine.simulated import IterationCost
from systems.common.errors import InputError
from systems.common.hardware import Testbed, costs
from systems.common.hardware.cost import Chunk
from systems.common.models import ModelShape
from systems.dlora import sizes
from systems.dlora.policies.credit import CreditRules

BACK_ENDS = ("einsum", "gather")
"""How an unmerged batch applies its adapters: for every resident one (the artifact), or only for each token's own."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration runs, as far as its price is concerned.

    Attributes:
        merged: whether one adapter is merged, so that no LoRA branch runs.
        chunks: tokens of each prompt.
        decodes: decoding requests. `context`: tokens that they hold in the KV cache.
        resident: adapters on the GPU. `distinct`: of them, those in the batch.
    """

    merged: bool
    chunks: tuple[int, ...]
    decodes: int
    context: int
    resident: int = 1
    distinct: int = 1


class ReplicaCosts(Protocol):
    """Prices of one replica, in seconds.

    Attributes:
        source: for a figure's footer.
        rules: what the credit policy should know (t_m, t_u, c_sw).
    """

    @property
    def source(self) -> str:
        """For a figure's footer."""
        ...

    @property
    def rules(self) -> CreditRules:
        """Iteration and switching times as a start-up measurement would find them."""
        ...

    def run(self, iteration: Iteration) -> DecodeRun:
        """The coming steps of `iteration`; only the first one where it has prompts."""
        ...

    def switch_s(self) -> float:
        """One pass over the weights: merge or unmerge."""
        ...

    def load_s(self, adapters: int) -> float:
        """What copying so many adapters to the GPU adds to an iteration."""
        ...

    def swap_s(self, blocks: int) -> float:
        """Moving KV blocks between GPU and host, one way."""
        ...


@dataclass(frozen=True, slots=True)
class ArtifactCosts:
    """The artifact's constants.

    From the artifact: `merged_s`, `unmerged_s` and `switch_s` for Llama-2-7B, the link of 32 GiB/s, adapter and block
    sizes. Assumptions of ours: prompts cost `prefill_s` per token merged (0.1 ms: about half of an A100's peak), and more
    by t_u / t_m unmerged; neither batch size nor context matter; another model's times are those of the 7B scaled by its
    weight bytes per GPU.
    """

    shape: ModelShape
    tp: int = 1
    merged_s: float = 0.015
    unmerged_s: float = 0.027
    switching_s: float = 0.020
    prefill_s: float = 1e-4
    scale: float = 1.0
    link: float = sizes.HOST_LINK
    overhead_s: float = 0.0
    """A what-if: host time that every iteration takes on top, which the scheduler's constants do not know."""

    @property
    def source(self) -> str:
        """For a figure's footer."""
        scaled = "" if self.scale == 1 else f", scaled by {self.scale:.2f} to {self.shape.name}"
        added = f", {1e3 * self.overhead_s:g} ms more per iteration" if self.overhead_s else ""
        return (
            f"dLoRA artifact's 15/27/20 ms{scaled}{added}; prefill {1e3 * self.prefill_s * self.scale:.2g} ms/token (assumed)"
        )

    @property
    def rules(self) -> CreditRules:
        """The constants as they are used here."""
        return CreditRules(self.merged_s * self.scale, self.unmerged_s * self.scale, self.switch_s())

    def run(self, iteration: Iteration) -> DecodeRun:
        """A constant per mode and one per prompt token."""
        base = self.merged_s if iteration.merged else self.unmerged_s
        tokens = sum(iteration.chunks)
        return DecodeRun(self.overhead_s + self.scale * (base + tokens * self.prefill_s * base / self.merged_s))

    def switch_s(self) -> float:
        """The artifact's constant."""
        return self.switching_s * self.scale

    def load_s(self, adapters: int) -> float:
        """Not hidden: the artifact synchronises the device after its copies."""
        return adapters * sizes.adapter_bytes(self.shape) / self.tp / self.link

    def swap_s(self, blocks: int) -> float:
        """Over the link."""
        return blocks * sizes.kv_block_bytes(self.shape) / self.tp / self.link


def artifact_costs(shape: ModelShape, reference: ModelShape, tp: int = 1, overhead_s: float = 0.0) -> ArtifactCosts:
    """The artifact's constants moved to `shape` on `tp` GPUs; `reference` is the model that they are of."""
    return ArtifactCosts(shape, tp, scale=shape.weight_bytes / tp / reference.weight_bytes, overhead_s=overhead_s)


GATHER_EFFICIENCY = 0.5
"""Share of bandwidth and of arithmetic that the small products of adapters reach (assumed)."""
KERNELS = {"einsum": 3, "gather": 2}
"""Launches per adapted product."""


@dataclass(frozen=True, slots=True)
class ModelledCosts:
    """Our hardware model: the base by `IterationCost`, the LoRA branch by a roofline.

    The branch of a layer reads the matrices of every resident adapter (`einsum`) or of those in the batch (`gather`), and
    computes each token's product with all of them or with its own. Loads and swaps go over the host link; layer-wise
    prefetch hides the copy of an adapter behind one iteration, so only what exceeds it counts.
    """

    base: IterationCost
    testbed: Testbed
    tp: int = 1
    back_end: str = "einsum"
    _branch: dict[tuple[int, int], float] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises InputError for a back end that does not exist."""
        if self.back_end not in BACK_ENDS:
            raise InputError("dlora", "back_end", self.back_end, f"use one of {', '.join(BACK_ENDS)}")

    @property
    def source(self) -> str:
        """For a figure's footer."""
        return f"{self.base.costs.source}; LoRA branch {self.back_end} by roofline"

    @property
    def rules(self) -> CreditRules:
        """Times of a decode step of 16 requests, 400 tokens each, with 8 adapters."""
        steps = [self.run(Iteration(merged, (), 16, 6400, 8, 8)).first_s for merged in (True, False)]
        return CreditRules(steps[0], steps[1], self.switch_s())

    def branch_s(self, tokens: int, adapters: int) -> float:
        """The LoRA branch of all layers for `tokens` tokens and the matrices of `adapters` adapters."""
        key = (tokens, adapters)
        if (known := self._branch.get(key)) is None:
            shape, gpu = self.base.shape, self.testbed.gpu
            of_all = adapters if self.back_end == "einsum" else 1
            seconds = 0.0
            for inner, rank, outer in sizes.targets(shape):
                weights = adapters * rank * (inner + outer) / self.tp
                moved = tokens * (inner * (2 * of_all if of_all > 1 else 1) + outer * 2) / self.tp
                flops = 2 * tokens * of_all * rank * (inner + outer) / self.tp
                bytes_s = (weights + moved) * shape.dtype_bytes / gpu.bandwidth
                peak = gpu.flops[gpu.dtype(shape.dtype)]
                seconds += max(bytes_s, flops / peak) / GATHER_EFFICIENCY + KERNELS[self.back_end] * gpu.launch_s
            known = self._branch[key] = seconds * shape.layers
        return known

    def run(self, iteration: Iteration) -> DecodeRun:
        """Base model and, unmerged, the branch."""
        tokens = sum(iteration.chunks) + iteration.decodes
        adapters = iteration.resident if self.back_end == "einsum" else iteration.distinct
        extra = 0.0 if iteration.merged else self.branch_s(tokens, adapters)
        if not iteration.chunks:
            run = self.base.decode(iteration.decodes, iteration.context)
            return DecodeRun(run.first_s + extra, run.increment_s, run.steps)
        shape, cost = self.base.shape, self.base
        chunks = [Chunk(size, 0) for size in iteration.chunks]
        attention = cost.costs.attention_s(chunks, iteration.decodes, iteration.context)
        heads = len(chunks) + iteration.decodes
        rest = cost.rest_s(iteration.decodes, sum(iteration.chunks), heads)
        return DecodeRun(rest + shape.layers * attention + extra)

    def switch_s(self) -> float:
        """Reads and writes every adapted weight once, at the bandwidth that element-wise kernels reach (80 %)."""
        return 2 * sizes.adapted_bytes(self.base.shape) / self.tp / (0.8 * self.testbed.gpu.bandwidth)

    def load_s(self, adapters: int) -> float:
        """What prefetching cannot hide behind one iteration of a decoding batch."""
        copy_s = adapters * sizes.adapter_bytes(self.base.shape) / self.tp / self.testbed.gpu.pcie
        return max(0.0, copy_s - self.base.decode(1, 1).first_s)

    def swap_s(self, blocks: int) -> float:
        """Over PCIe."""
        return blocks * sizes.kv_block_bytes(self.base.shape) / self.tp / self.testbed.gpu.pcie


def modelled_costs(shape: ModelShape, testbed: Testbed, tp: int = 1, back_end: str = "einsum") -> ModelledCosts:
    """Our hardware model of `shape` on `tp` GPUs of `testbed`."""
    one = Testbed(testbed.gpu, max(tp, 1))
    return ModelledCosts(IterationCost(costs(shape, one, tp), shape), one, tp, back_end)
