"""How long a calibration may take: points are measured while time is left, the others are named."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

Point = TypeVar("Point")


@dataclass(slots=True)
class Budget:
    """Seconds from now on.

    Attributes:
        seconds: how many; infinite for no limit.
        left_out: by what was measured, how many of how many points the time did not reach.
    """

    seconds: float = math.inf
    clock: Callable[[], float] = time.perf_counter
    left_out: dict[str, str] = field(default_factory=dict)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def spent_s(self) -> float:
        """Seconds since it was made."""
        return self.clock() - self._began

    @property
    def left_s(self) -> float:
        """Seconds left; below 0 where more were spent."""
        return self.seconds - self.spent_s

    def within(self, what: str, points: Iterable[Point]) -> Iterator[Point]:
        """The points, one after another, until no time is left."""
        wanted = list(points)
        for done, point in enumerate(wanted):
            if self.left_s <= 0:
                self.left_out[what] = f"{len(wanted) - done} of {len(wanted)} points"
                return
            yield point
