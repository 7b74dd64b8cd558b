"""How far a series has come, one line per update, so that the lines of several series at once stay readable."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm.std import tqdm

from systems.registry import Scalar

EVERY_S = 1.0
WIDTH = 120


class Progress:
    """A bar over the points of a series, with the probes so far, the best objective of this point and the time left.

    Lines go to `stream` (absent: stderr). Points are always reported, probes at most once per `EVERY_S` seconds.
    """

    def __init__(
        self,
        name: str,
        points: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start counting the time."""
        self._name, self._points, self._clock = name, points, clock
        self._stream = stream or sys.stderr
        self._ascii = (getattr(self._stream, "encoding", None) or "ascii").lower().replace("-", "") != "utf8"
        self._start = self._last = clock()
        self._done = self._probes = 0

    def probe(self, at: Mapping[str, Scalar], best: float | None) -> None:
        """A trial of the point `at` has been answered; `best` is the best objective within the limits so far."""
        self._probes += 1
        if self._clock() - self._last >= EVERY_S:
            self._report(at, best)

    def point(self, at: Mapping[str, Scalar], best: float | None) -> None:
        """The point `at` is finished."""
        self._done += 1
        self._report(at, best)

    def _report(self, at: Mapping[str, Scalar], best: float | None) -> None:
        self._last = self._clock()
        where = [f"{name}={value}" for name, value in at.items()]
        found = "none within the limits yet" if best is None else f"best {best:.4g}"
        meter = tqdm.format_meter(
            self._done,
            self._points,
            self._last - self._start,
            ncols=WIDTH,
            prefix=self._name,
            ascii=self._ascii,
            unit="point",
            postfix=", ".join([*where, f"{self._probes} probes", found]),
        )
        self._stream.write(f"{meter}\n")  # in one piece: other series write to the same terminal
        self._stream.flush()
