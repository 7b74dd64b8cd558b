"""LLMStation's three ways to decide how much tuning runs beside serving.

* `PlannerMode`: the paper's; before every decode iteration the planner bounds the tasklets by a latency target.
* `FixedMode`: the artifact's; four numbers typed by the user: after so many tasklets, yield for so long, while anything
  is served.
* `FeedbackMode`: ours; starts from a `FixedMode` and adjusts its waits from the P99 latencies of the last window (sheet 2.7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from systems.common.core import Slo
from systems.common.errors import InputError


@dataclass(frozen=True, slots=True)
class PlannerMode:
    """The planner's limit for one decode iteration (the paper's SLO_d); whether forward layers are fused with decode layers."""

    target_s: float
    fused: bool = True

    def __post_init__(self) -> None:
        """Raises InputError for a target that is not positive."""
        if not self.target_s > 0:
            raise InputError("llmstation", "decode_target_s", self.target_s, "give a positive number of seconds")


def fuses(parameters: Mapping[str, Any]) -> bool:
    """Whether forward tasklets may be fused with decode steps: `fused` is `auto` (the default) or `off`, or a truth value.

    Raises InputError for anything else.
    """
    asked = parameters.get("fused", "auto")
    if asked in ("auto", "off") or isinstance(asked, bool):
        return asked is True or asked == "auto"
    raise InputError("llmstation", "fused", asked, "use auto or off")


@dataclass(frozen=True, slots=True)
class FixedMode:
    """`forward_tasklets` tasklets, then `forward_wait_s` of pause; likewise backward. No pause while nothing is served."""

    forward_tasklets: int = 32
    forward_wait_s: float = 0.0
    backward_tasklets: int = 32
    backward_wait_s: float = 0.0

    def __post_init__(self) -> None:
        """Raises InputError for counts below 1 and negative waits."""
        for key in ("forward_tasklets", "backward_tasklets"):
            if getattr(self, key) < 1:
                raise InputError("llmstation", key, getattr(self, key), "give at least 1")
        for key in ("forward_wait_s", "backward_wait_s"):
            if not getattr(self, key) >= 0:
                raise InputError("llmstation", key, getattr(self, key), "give 0 or more seconds")

    def wait_s(self, phase: str) -> float:
        """Mean pause per tasklet of `phase`, seconds."""
        if phase == "backward":
            return self.backward_wait_s / self.backward_tasklets
        return self.forward_wait_s / self.forward_tasklets


@dataclass(frozen=True, slots=True)
class FeedbackMode:
    """Waits steered by the P99 of a window of finished requests: up fast near a limit, down slowly far from it."""

    slo: Slo
    waits: FixedMode
    window: int = 50
    high: float = 0.95
    low: float = 0.8
    raise_by: float = 1.5
    lower_by: float = 0.8
    least_wait_s: float = 1e-3

    def adjusted(self, ttft_p99_s: float, tpot_p99_s: float) -> FeedbackMode:
        """The mode for the next window, given the last one's P99s."""
        load = max(ttft_p99_s / self.slo.ttft_s, tpot_p99_s / self.slo.tpot_s)
        if load > self.high:
            return self._scaled(self.raise_by)
        return self._scaled(self.lower_by) if load < self.low else self

    def _scaled(self, factor: float) -> FeedbackMode:
        def scale(wait_s: float) -> float:
            return max(self.least_wait_s, wait_s) * factor if factor > 1 else wait_s * factor

        waits = replace(
            self.waits,
            forward_wait_s=scale(self.waits.forward_wait_s),
            backward_wait_s=scale(self.waits.backward_wait_s),
        )
        return replace(self, waits=waits)
