"""Hugging Face PEFT inside vLLM (exec type 2): unmerged, one adapter per batch, seven products unfused (sheet, 3)."""

from __future__ import annotations

from dataclasses import dataclass

from systems.common.engine.executor import DecodeRun
from systems.dlora.costs import Iteration, ReplicaCosts
from systems.dlora.policies.credit import CreditRules

PROJECTIONS = 7
FUSED = 4


@dataclass(frozen=True, slots=True)
class PeftCosts:
    """The base model plus 7/4 of dLoRA's LoRA branch (assumed): PEFT adapts seven products, dLoRA's fused layers four.

    All adapters stay on the GPU and `set_adapter` is taken to be free.
    """

    base: ReplicaCosts

    @property
    def source(self) -> str:
        """For a figure's footer."""
        return f"{self.base.source}; PEFT's branch 7/4 of dLoRA's (assumed)"

    @property
    def rules(self) -> CreditRules:
        """Of the base."""
        return self.base.rules

    def run(self, iteration: Iteration) -> DecodeRun:
        """Merged time and 7/4 of what unmerged adds, with one adapter."""
        shape = iteration.chunks, iteration.decodes, iteration.context
        plain, branch = self.base.run(Iteration(True, *shape)), self.base.run(Iteration(False, *shape))
        extra = (branch.first_s - plain.first_s) * PROJECTIONS / FUSED
        return DecodeRun(plain.first_s + extra, plain.increment_s, plain.steps)

    def switch_s(self) -> float:
        """0: nothing is merged."""
        return 0.0

    def load_s(self, adapters: int) -> float:
        """0: all are resident."""
        return 0.0

    def swap_s(self, blocks: int) -> float:
        """Of the base."""
        return self.base.swap_s(blocks)
