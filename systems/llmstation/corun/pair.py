"""Serving and tuning as two processes with two copies of the weights, under an MPS daemon of our own: the strangers' baselines.

`vLLM + torchtune` caps tuning at a thread percentage, `chunked` trains on short sequences without a cap. Serving is
the same engine with the same kernels as everywhere; tuning is the same trainer, never suspended, with activation checkpointing.

Processes are kept from trial to trial, for starting them takes as long as many a trial: one that serves, and tuners, of which
each thread percentage needs its own, as MPS reads it when a process first touches the GPU. Between trials they are idle.
"""

from __future__ import annotations

import atexit
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.common.gpu.mps import MpsDaemon
from systems.llmstation import orders
from systems.llmstation.corun.measure import device_of, told_of

START_S = 300.0
END_S = 60.0
MOST_TUNERS = 2
"""Tuners kept: each holds a copy of the weights."""
MOST_SPARES = 3
"""Where many trials are foreseen, tuners that have imported everything and wait to be told their thread percentage."""


class Child(orders.Child):
    """A process of `corun.child`."""

    module, where = "systems.llmstation.corun.child", "llmstation"


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a tuner does: packed sequences of `tokens`, on at most `threads` percent of the GPU's threads (None: all)."""

    tokens: int
    threads: float | None = None

    @property
    def limit(self) -> float | None:
        """`threads` where they limit anything."""
        return None if self.threads is None or self.threads >= 100 else self.threads


class Processes:
    """The daemon and the processes of one device. Everything ends with `close`, and when we die."""

    def __init__(self, device: str) -> None:
        """Start the daemon, on a GPU. Raises InputError where MPS cannot be had."""
        self.device = device
        self._daemon = MpsDaemon() if device == "cuda" else None
        self._serving: Child | None = None
        self._tuners: OrderedDict[float | None, Child] = OrderedDict()
        self._spares: list[Child] = []
        self._awaited: list[Child] = []
        self._foreseen = False
        """Whether further thread percentages are to come."""

    def foresee(self, trials: Sequence[tuple[Trial, Tuning]]) -> None:
        """Begin to start what `trials` will need, the first ones first; `settle` waits for it."""
        by_limit: dict[float | None, tuple[Trial, Tuning]] = {}
        for trial, tuning in trials:
            by_limit.setdefault(tuning.limit, (trial, tuning))
        self._foreseen = len(by_limit) > MOST_TUNERS
        for trial, _ in trials[:1]:
            self._prepare_serving(trial)
        for trial, tuning in list(by_limit.values())[:MOST_TUNERS]:
            self._prepare_tuner(trial, tuning)

    def settle(self) -> list[str]:
        """Wait for all that is starting, so that nothing of it disturbs a measurement; what it says of itself."""
        notes: list[str] = []
        while self._awaited:
            notes += self._awaited.pop(0).answer(START_S, self._watch)["notes"]
        return notes

    def run(self, trial: Trial, tuning: Tuning, serve_s: float) -> dict[str, Any]:
        """Serve the workload of `trial` beside a tuner for at most `serve_s` seconds; what the two sides said, merged."""
        self.settle()
        serving, tuner = self._prepare_serving(trial), self._prepare_tuner(trial, tuning)
        notes = self.settle()
        for child in (tuner, serving):
            child.order(order="begin")
        served = serving.answer(serve_s, self._watch)
        tuner.order(order="end")
        tuned = tuner.answer(END_S, self._watch)
        limit_note = "two processes without MPS" if self._daemon is None else "two processes under MPS"
        return {**served, "tuned": tuned, "notes": [*served["notes"], *notes, limit_note]}

    def close(self) -> None:
        """End all of it."""
        children = [*self._spares, *self._tuners.values(), *([self._serving] if self._serving else [])]
        for child in children:
            child.close()
        self._serving = None
        for kept in (self._spares, self._tuners, self._awaited):
            kept.clear()
        if self._daemon is not None:
            self._daemon.close()

    def _watch(self) -> None:
        if self._daemon is not None:
            self._daemon.check()

    def _environment(self, limit: float | None = None) -> dict[str, str]:
        return {} if self._daemon is None else self._daemon.environment(limit)

    def _prepare_serving(self, trial: Trial) -> Child:
        if self._serving is None:
            self._serving = Child("serve", {})
        return self._ordered(self._serving, trial=told_of(trial), environment=self._environment())

    def _prepare_tuner(self, trial: Trial, tuning: Tuning) -> Child:
        limit = tuning.limit
        if limit not in self._tuners:
            while len(self._tuners) >= MOST_TUNERS:
                self._tuners.popitem(last=False)[1].close()
            self._tuners[limit] = self._spares.pop(0) if self._spares else Child("tune", {})
            self._fill_up()
        self._tuners.move_to_end(limit)
        told = {"trial": told_of(trial), "tuning_tokens": tuning.tokens}
        return self._ordered(self._tuners[limit], **told, environment=self._environment(limit))

    def _fill_up(self) -> None:
        """Let new spares import what they need while a tuner starts: nothing is measured then."""
        while self._foreseen and len(self._spares) < MOST_SPARES:
            self._spares.append(Child("tune", {}))

    def _ordered(self, child: Child, **order: object) -> Child:
        child.order(order="prepare", **order)
        self._awaited.append(child)
        return child


_KEPT: list[Processes] = []


def processes(device: str) -> Processes:
    """The processes of the trial before, or new ones."""
    if not _KEPT:
        _KEPT.append(Processes(device))
        atexit.register(release)
    assert _KEPT[0].device == device, "one process measures on one device"
    return _KEPT[0]


def release() -> None:
    """End the processes that were kept."""
    while _KEPT:
        _KEPT.pop().close()
    atexit.unregister(release)


def settle() -> None:
    """Wait for processes that are starting, if any are. Where one cannot, the trial that needs it starts anew and says why."""
    try:
        for kept in _KEPT:
            kept.settle()
    except InputError:
        release()


def pair(trial: Trial, tuning: Tuning, serve_s: float) -> dict[str, Any]:
    """Serve the workload of `trial` beside a tuner; what the two sides said, merged.

    Args:
        trial: what is served.
        tuning: what is done beside it.
        serve_s: how long serving may take at most, seconds.

    Raises:
        InputError: MPS cannot be had, or a side refused or died. No process is left then.
    """
    try:
        return processes(device_of(trial.hardware)).run(trial, tuning, serve_s)
    except BaseException:
        release()
        raise
