"""What a trial of each figure of this system means: nothing so far, as the system is not built yet (README.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from systems.common.core import Outcome, Trial

EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {}
