"""Co-run slowdowns of two processes under MPS: one that serves, and a tuner for every thread percentage.

MPS reads the percentage when a process begins, so there is a process for each; all start at once, and only the two that are
being measured run. Each side takes means over many samples: neither knows which of the other's kernels ran beside its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from systems.common.calibrate.budget import Budget
from systems.common.gpu.mps import MpsDaemon
from systems.common.hardware.interference import MPS
from systems.llmstation import orders
from systems.llmstation.calibrate.rows import Row, of_limit, of_means

START_S, ANSWER_S = 150.0, 60.0
WHOLE, FEW = 100, 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        model, device: of both sides.
        percentages: MPS thread percentages of tuning, most telling first; 100, which all are told against, is always measured.
        tokens: lengths of sample at 100 %, the first of which is measured at every percentage.
        points: serving phases and sizes.
        context: of decoding sequences.
        seconds: per measurement.
        blocks, max_num_seqs: of the serving engine.
    """

    model: str
    device: str
    percentages: tuple[int, ...]
    tokens: tuple[int, ...]
    points: tuple[tuple[str, int], ...]
    context: int = 256
    seconds: float = 0.8
    blocks: int = 3500
    max_num_seqs: int = 128


class Process(orders.Child):
    """A process of `calibrate.child`."""

    module, where = "systems.llmstation.calibrate.child", "calibrate"


class Pairs:
    """The processes; measures one tuner at a time beside the serving one."""

    def __init__(self, plan: Plan, owned: ExitStack) -> None:
        """Start everything. Raises InputError where MPS cannot be had, or a process refuses or dies."""
        self.plan = plan
        daemon = MpsDaemon() if plan.device == "cuda" else None
        if daemon is not None:
            owned.callback(daemon.close)
        self._watch: Callable[[], None] = daemon.check if daemon is not None else lambda: None
        self._serving = self._start(owned, "serve", {} if daemon is None else daemon.environment())
        self._serving.order(**self._common(), blocks=plan.blocks, max_num_seqs=plan.max_num_seqs)
        self._tuners = {}
        for percentage in dict.fromkeys((WHOLE, *plan.percentages)):
            limit = None if percentage == WHOLE else percentage
            tuner = self._start(owned, "tune", {} if daemon is None else daemon.environment(limit))
            tuner.order(**self._common(), tokens=plan.tokens if percentage == WHOLE else plan.tokens[:1])
            self._tuners[percentage] = tuner
        self.notes = []
        self._serving.answer(START_S, self._watch)
        for percentage, tuner in self._tuners.items():
            self.notes += [f"{percentage} %: {note}" for note in tuner.answer(START_S, self._watch)["notes"]]
        self._alone_s = {point: self._served_s(point) for point in plan.points}
        self._tasklet_s = {tokens: self._tuning_alone(WHOLE, tokens) for tokens in plan.tokens}

    def _common(self) -> dict[str, object]:
        return {"model": self.plan.model, "device": self.plan.device}

    @staticmethod
    def _start(owned: ExitStack, side: str, environment: Mapping[str, str]) -> Process:
        process = Process(side, environment)
        owned.callback(process.close)
        return process

    def rows(self, percentage: int, tokens: int) -> Iterator[Row]:
        """All rows of one percentage and length: what the limit alone does, then each batch beside."""
        limit, whole_s = percentage / 100, self._tasklet_s[tokens]
        alone_s = whole_s if percentage == WHOLE else self._tuning_alone(percentage, tokens)
        yield from of_limit(whole_s, alone_s, tokens, limit, MPS)
        for point in self.plan.points:
            self._run(percentage, tokens)
            shared_s = self._served_s(point, self._seconds(percentage))
            beside_s = self._stop(percentage)
            yield from of_means(point, self._alone_s[point], shared_s, whole_s, beside_s, tokens, limit, MPS)

    def _seconds(self, percentage: int) -> float:
        """Longer where a sample takes longer: each phase must be seen."""
        return self.plan.seconds * min(2.5, max(1.0, FEW / percentage))

    def _served_s(self, point: tuple[str, int], seconds: float | None = None) -> float:
        phase, size = point
        order = {"phase": phase, "size": size, "context": self.plan.context, "seconds": seconds or self.plan.seconds}
        self._serving.order(**order)
        return float(self._serving.answer(ANSWER_S, self._watch)["mean_s"])

    def _tuning_alone(self, percentage: int, tokens: int) -> dict[str, float]:
        self._run(percentage, tokens)
        time.sleep(self._seconds(percentage))  # the length of the measurement
        return self._stop(percentage)

    def _run(self, percentage: int, tokens: int) -> None:
        self._tuners[percentage].order(order="run", tokens=tokens)
        self._tuners[percentage].answer(ANSWER_S, self._watch)

    def _stop(self, percentage: int) -> dict[str, float]:
        self._tuners[percentage].order(order="stop")
        told = self._tuners[percentage].answer(ANSWER_S, self._watch)
        return {phase: float(seconds) for phase, seconds in told["tasklet_s"].items()}


def measure(plan: Plan, budget: Budget, found: Callable[[list[Row]], None]) -> tuple[str, ...]:
    """Measure; `found` gets the rows of each percentage and length as they come. Notes.

    Raises InputError where MPS cannot be had, or a process refuses or dies. No process is left then.
    """
    with ExitStack() as owned:
        pairs = Pairs(plan, owned)
        cases: Sequence[tuple[int, int]] = [
            *((percentage, plan.tokens[0]) for percentage in dict.fromkeys((*plan.percentages, WHOLE))),
            *((WHOLE, tokens) for tokens in plan.tokens[1:]),
        ]
        for percentage, tokens in budget.within("MPS", cases):
            found(list(pairs.rows(percentage, tokens)))
        return tuple(pairs.notes)
