"""The three models of SpotServe's Table 1, and where the artifact keeps each one's profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """`parameters` is the nominal count; `profiles` gives the profile's path in the artifact by GPU type."""

    parameters: float
    profiles: Mapping[str, str]

    @property
    def weights_gib(self) -> float:
        """Size of the weights as the artifact stores them, fp32 (Table 1 prints this as GB)."""
        return self.parameters * 4 / 2**30


#: The paper's three. "LLaMA-30B" is a GPT block of that parameter count, not LLaMA's own shape.
MODELS: Mapping[str, Model] = {
    "opt-6.7b": Model(6.7e9, {"t4": "T4-4x/megatron_6.7B_profile.json", "v100": "V100-4x/6.7B.json"}),
    "gpt-20b": Model(20e9, {"t4": "T4-4x/megatron_h6144_profile.json", "v100": "V100-4x/20B.json"}),
    "llama-30b": Model(30e9, {"t4": "T4-4x/megatron_h7168_profile.json"}),
}
