"""vLLM with one copy of the model per adapter (exec type 1): one model per batch, whole models swapped, LRU (sheet, 3).

`kinder`: requests of other models are passed over instead of ending the batch, and copies lie in pinned memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from systems.common.engine.executor import DecodeRun
from systems.dlora.costs import Iteration, ReplicaCosts
from systems.dlora.policies.credit import CreditRules
from systems.dlora.sizes import HOST_LINK
from systems.dlora.slots import Slots

PAGEABLE = 6e9
"""Bytes per second of a copy between GPU and pageable host memory, which `.to("cuda")` and `.to("cpu")` use (assumed)."""
COPIES = {"llama-2-7b": 4, "llama-2-13b": 2, "llama-2-70b": 2}
"""Copies that the artifact keeps on an 80 GB GPU."""


@dataclass(frozen=True, slots=True)
class WholeModelCosts:
    """Every model runs at the base model's speed; a model that is not on the GPU takes another one's place.

    `weight_bytes` move each way per GPU. There is no merging, so nothing is switched.
    """

    base: ReplicaCosts
    weight_bytes: float
    kinder: bool = False

    @property
    def source(self) -> str:
        """For a figure's footer."""
        link = HOST_LINK if self.kinder else PAGEABLE
        return f"{self.base.source}; whole models swapped at {link / 1e9:.0f} GB/s (assumed)"

    @property
    def rules(self) -> CreditRules:
        """Of the base."""
        return self.base.rules

    def run(self, iteration: Iteration) -> DecodeRun:
        """Always as merged."""
        return self.base.run(replace(iteration, merged=True))

    def switch_s(self) -> float:
        """0: each model has weights of its own."""
        return 0.0

    def load_s(self, adapters: int) -> float:
        """One model out, one model in."""
        return adapters * 2 * self.weight_bytes / (HOST_LINK if self.kinder else PAGEABLE)

    def swap_s(self, blocks: int) -> float:
        """Of the base."""
        return self.base.swap_s(blocks)


class LruSlots(Slots):
    """Slots that make room by the longest unused, whoever waits for it."""

    __slots__ = ()

    def take(self, wanted: Collection[int], outstanding: Mapping[int, int]) -> list[int]:
        """See `Slots.take`."""
        self.merged = None
        return super().take(wanted, {})
