"""FineInfer (EuroMLSys '24) as the artifact runs it: time sharing on shared weights (sheet 3).

Tuning starts a sample only when no request is unfinished, and a sample that has started is never interrupted: a request that
arrives meanwhile waits for it. When a prompt reaches an idle engine, the engine first waits `defer_s`, which gives tuning a
longer window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from systems.common.errors import InputError

POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class FineInfer:
    """Knob: `defer_s`, seconds that an idle engine holds back a new prompt."""

    defer_s: float
    gpu_memory_utilisation: float = 0.75

    def __post_init__(self) -> None:
        """Raises InputError for a negative wait."""
        if not self.defer_s >= 0:
            raise InputError("llmstation", "defer_s", self.defer_s, "give 0 or more seconds")

    def window(self, idle_from_s: float, arrival_s: float, sample_s: float) -> tuple[int, float]:
        """Samples that tuning runs between the engine's falling idle and its next start, and when that start is.

        Samples begin back to back until the prompt has been held back for `defer_s`; the engine notices the end of the
        last one at its next poll, every 5 ms.
        """
        open_until_s = arrival_s + self.defer_s
        samples = max(0, math.ceil((open_until_s - idle_from_s) / sample_s))
        end_s = idle_from_s + samples * sample_s
        return samples, self._next_poll_s(arrival_s, end_s)

    def look_again_s(self, arrival_s: float, now_s: float, busy: bool) -> float:
        """When an idle engine that got a prompt at `arrival_s` looks again; not after `now_s` when it may start.

        The same rule as `window`, step by step: it sleeps for `defer_s`, then polls while a sample is under way (`busy`).
        """
        open_until_s = arrival_s + self.defer_s
        if now_s < open_until_s:
            return open_until_s
        if not busy:
            return now_s
        return self._next_poll_s(arrival_s, now_s + 1e-6)

    def _next_poll_s(self, arrival_s: float, at_s: float) -> float:
        """The first poll not before `at_s`: the end of the wait, or some 5 ms later."""
        open_until_s = arrival_s + self.defer_s
        return open_until_s + max(0, math.ceil((at_s - open_until_s) / POLL_S - 1e-9)) * POLL_S
