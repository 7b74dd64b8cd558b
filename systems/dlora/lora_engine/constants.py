# mypy: disable-error-code="no-untyped-call, no-any-return"
"""What the two modes and a switch cost on this machine: measured at start, where the artifact types in 15, 27 and 20 ms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from systems.dlora.lora_engine.runner import LoraRunner
from systems.dlora.policies.credit import CreditRules

PROMPT_TOKENS = 32
FIRST = 1 << 40
"""Index of the first of the requests that measure: above any real one."""


@dataclass(frozen=True, slots=True)
class Constants:
    """t_m, t_u and c_sw of the credit scheduler (sheet, 2.6), seconds.

    Attributes:
        t_merged_s: a decode step of a full batch, merged.
        t_unmerged_s: the same of requests of several adapters, unmerged.
        switch_s: a change of the merged adapter (a -> b); going from unmerged to merged costs the same pass.
        unmerge_s: from merged to unmerged: nothing where the pristine weights stay.
        rows: requests in the batch. adapters: distinct ones in the unmerged batch.
    """

    t_merged_s: float
    t_unmerged_s: float
    switch_s: float
    unmerge_s: float
    rows: int
    adapters: int

    def rules(self, scale: float = 1e4) -> CreditRules:
        """What the credit policy takes; an unmerged step is never told to be the faster one."""
        return CreditRules(self.t_merged_s, max(self.t_merged_s, self.t_unmerged_s), self.switch_s, scale)


def measure_constants(
    runner: LoraRunner, rows: int = 16, repeats: int = 20, clock: Callable[[], float] = time.perf_counter
) -> Constants:
    """Measure on an idle runner that knows at least two adapters; medians of `repeats`. It is idle again afterwards.

    The unmerged batch mixes as many adapters as fit: at most `rows`, the adapters known, and the slots.
    """
    known = list(runner.store.residents.outstanding)
    assert len(known) >= 2 and not runner.requests, "an idle runner with two adapters or more"
    names = known[: min(rows, runner.bank.capacity)]
    merged_s = _steps_s(runner, rows, [known[0]], known[0], repeats, clock)
    unmerged_s = _steps_s(runner, rows, names, None, repeats, clock)
    runner.prepare_merged(known[0])
    changes, undone = [], []
    for i in range(repeats + 2):
        target = known[(i + 1) % 2]
        changes.append(_timed(lambda target=target: runner.prepare_merged(target), clock))  # type: ignore[misc]
    for _ in range(repeats):
        runner.prepare_merged(known[0])
        undone.append(_timed(runner.prepare_unmerged, clock))
    return Constants(
        merged_s, unmerged_s, statistics.median(changes[2:]), statistics.median(undone), rows, len(names)
    )  # the first changes bring adapters in, and capture


def _steps_s(
    runner: LoraRunner, rows: int, names: list[str], merged: str | None, repeats: int, clock: Callable[[], float]
) -> float:
    indices = [FIRST + i for i in range(rows)]
    rng = np.random.default_rng(0)
    for i, index in enumerate(indices):
        runner.admit(index, rng.integers(0, runner.bank.shape.vocab, PROMPT_TOKENS), names[i % len(names)])
    for index in indices:
        runner.step([index], [], merged)
    for _ in range(3):
        runner.step([], indices, merged)
    times = [_timed(lambda: runner.step([], indices, merged), clock) for _ in range(repeats)]
    for index in indices:
        runner.finish(index)
    return statistics.median(times)


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    _wait()
    began = clock()
    work()
    _wait()
    return clock() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
