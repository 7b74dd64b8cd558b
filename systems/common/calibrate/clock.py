# mypy: disable-error-code="no-untyped-call"
"""How one point is timed: a CUDA graph between two events on a GPU, a plain call on a CPU; the median of several runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from systems.common.torch_engine.graphs import Graphs

Work = Callable[[], object]


class Clock:
    """Times work on one device.

    Attributes:
        runs: timed runs per point.
        spent_s: wall-clock seconds spent in `time_s` so far, captures included.
    """

    def __init__(self, device: torch.device, runs: int = 15) -> None:
        self.device, self.runs = device, runs
        self.spent_s = 0.0

    @torch.inference_mode()
    def time_s(self, work: Work, before: Work = lambda: None) -> float:
        """Median seconds of `work`; `before` runs ahead of each and is not counted."""
        began = time.perf_counter()
        found = self._on_gpu(work, before) if self.device.type == "cuda" else self._on_cpu(work, before)
        self.spent_s += time.perf_counter() - began
        return found

    @torch.inference_mode()
    def call_s(self, work: Work, before: Work = lambda: None) -> float:
        """The same for work that launches by itself (a graph of the engine's, or kernel by kernel)."""
        began = time.perf_counter()
        found = self._events(work, before) if self.device.type == "cuda" else self._on_cpu(work, before)
        self.spent_s += time.perf_counter() - began
        return found

    def _on_gpu(self, work: Work, before: Work) -> float:
        graphs: Graphs[object] = Graphs()
        before()
        graphs.capture("work", work)
        return self._events(lambda: graphs.run("work"), before)

    def _events(self, work: Work, before: Work) -> float:
        spans = []
        for _ in range(self.runs + 2):
            before()
            span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            span[0].record()
            work()
            span[1].record()
            spans.append(span)
        torch.cuda.synchronize(self.device)
        return float(statistics.median(a.elapsed_time(b) for a, b in spans[2:])) * 1e-3

    def _on_cpu(self, work: Work, before: Work) -> float:
        times = []
        for _ in range(self.runs + 1):
            before()
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])
