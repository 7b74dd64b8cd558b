"""S-LoRA: always unmerged, batches of any adapters, custom kernels, adapters fetched on demand (sheet, 3).

A stand-in, as the paper's set-up is not known: the `fcfs` policy; a LoRA branch whose cost grows with the adapters in the
batch and not with the resident ones; adapters and KV in one pool of pages, so every adapter has a slot and takes KV blocks;
copies hidden by prefetching. On the artifact's constants a batch's branch costs `BRANCH` of what the einsum branch costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from systems.common.engine.executor import DecodeRun
from systems.dlora.costs import Iteration, ReplicaCosts
from systems.dlora.policies.credit import CreditRules

BRANCH = 0.5
"""Custom kernels over einsum, on the artifact's constants (assumed: einsum gathers inputs per resident adapter)."""


@dataclass(frozen=True, slots=True)
class SloraCosts:
    """The base model plus a cheaper branch. `kinder`: the branch costs nothing, an upper bound of any unmerged system."""

    base: ReplicaCosts
    branch: float = BRANCH

    @property
    def source(self) -> str:
        """For a figure's footer."""
        return f"{self.base.source}; S-LoRA's branch {self.branch:g} of einsum's (assumed)"

    @property
    def rules(self) -> CreditRules:
        """Of the base."""
        return self.base.rules

    def run(self, iteration: Iteration) -> DecodeRun:
        """Merged time and the branch."""
        shape = iteration.chunks, iteration.decodes, iteration.context, iteration.resident, iteration.distinct
        plain, full = self.base.run(Iteration(True, *shape)), self.base.run(Iteration(False, *shape))
        extra = (full.first_s - plain.first_s) * self.branch
        return DecodeRun(plain.first_s + extra, plain.increment_s, plain.steps)

    def switch_s(self) -> float:
        """0: nothing is ever merged."""
        return 0.0

    def load_s(self, adapters: int) -> float:
        """0: prefetched while requests wait."""
        return 0.0

    def swap_s(self, blocks: int) -> float:
        """Of the base."""
        return self.base.swap_s(blocks)
