"""What tuning costs alone on a GPU, for real: chunks of a sequence (Figure 4) and suspensions (Figure 12). Imports torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from systems.common.core import Outcome, Trial
from systems.common.errors import InputError
from systems.common.torch_engine.weights import Weights
from systems.llmstation.corun.measure import cut, number, wanted_of
from systems.llmstation.corun.session import Wanted, samples, weights_of
from systems.llmstation.training import Trains
from systems.llmstation.training.adapters import LoraConfig
from systems.llmstation.training.chunked import ChunkedTrainer
from systems.llmstation.training.trainer import Options, Trainer

WARM = 2
TIMED = 15
LEAST, ENOUGH_S = 5, 2.0
"""Rounds that are timed: `TIMED`, but of long samples no more than take so many seconds, and never fewer than `LEAST`."""
_KEPT: dict[tuple[Wanted, str], Trains] = {}
"""The trainer of whole sequences of the trial before."""


def _weights(wanted: Wanted) -> Weights:
    """The weights, those of a session in this process if there is one."""
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise InputError("llmstation", "hardware", "cuda", "no GPU here: measure on a GPU host, or use hardware=cpux1")
    return weights_of(wanted.shape, wanted.device)


def _whole(wanted: Wanted, segments: str = "layer") -> Trains:
    """A trainer of whole sequences, kept from trial to trial: capturing its graphs takes longer than many a sample."""
    if (wanted, segments) not in _KEPT:
        _KEPT.clear()
        trainer = Trainer(wanted.shape, _weights(wanted), _options(wanted, segments))
        _KEPT[wanted, segments] = _graphed(trainer, wanted)
    return _KEPT[wanted, segments]


def _wanted(trial: Trial) -> Wanted:
    return wanted_of(trial, utilisation=0.0)


def _options(wanted: Wanted, segments: str = "layer") -> Options:
    return Options(LoraConfig(wanted.rank), segments=segments, positions=max(2048, wanted.tuning_tokens))


def _graphed(trainer: Trainer, wanted: Wanted) -> Trains:
    if wanted.device != "cuda":
        return trainer
    from systems.llmstation.training.graphs import GraphedTrainer

    return GraphedTrainer(trainer)


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sample_s(trainer: Trains, wanted: Wanted, pause: Callable[[int], bool] = lambda _: False) -> Callable[[], float]:
    """A call that trains one sample and gives its seconds; after each tasklet whose number `pause` names the GPU runs dry.

    A suspension is just that: nothing of tuning is left on the GPU, and the next tasklet is launched from a standing start.
    """
    batches = samples(wanted.shape, wanted.tuning_tokens, 0, wanted.device)

    def once() -> float:
        sample = trainer.steps(next(batches))
        _settle(wanted.device)
        began = time.perf_counter()
        for done, _ in enumerate(sample, 1):
            if pause(done):
                _settle(wanted.device)
        _settle(wanted.device)
        return time.perf_counter() - began

    return once


def _alternating(*works: Callable[[], float]) -> tuple[list[float], int]:
    """The median of each, taken in turns, so that a drifting clock frequency harms all alike; and of how many."""
    for work in works:
        for _ in range(WARM):
            work()
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < LEAST or (len(rounds) < TIMED and time.perf_counter() - began < ENOUGH_S):
        rounds.append([work() for work in works])
    return [statistics.median(column) for column in zip(*rounds, strict=True)], len(rounds)


def suspension(trial: Trial) -> Outcome:
    """One sample with `suspends` suspensions, evenly spread over its tasklets, against one without.

    Parameters: `model`, `tuning_tokens`, `suspends`, optionally `rank`. Tasklets are attention and MLP of a layer each way,
    so that a 32-layer model can be suspended more than 80 times.
    """
    wanted, suspends = _wanted(trial), int(number(trial.parameters, "suspends", 0))
    trainer = _whole(wanted, "block")
    tasklets = len(trainer.plan(1, wanted.tuning_tokens))
    most = tasklets - 1
    if not 0 <= suspends <= most and wanted.device == "cuda":
        raise InputError("llmstation", "suspends", suspends, f"a sample has {tasklets} tasklets: give 0 to {most}")
    suspends = min(suspends, most)  # the tiny model of a CPU has fewer
    places = {round(k * tasklets / (suspends + 1)) for k in range(1, suspends + 1)}
    (straight_s, suspended_s), rounds = _alternating(
        sample_s(trainer, wanted), sample_s(trainer, wanted, lambda done: done in places)
    )
    extra = 100 * (suspended_s / straight_s - 1)
    told = {"sample_s": suspended_s, "straight_s": straight_s, "overhead_percent": extra, "tasklets": tasklets}
    return Outcome({**told, "rounds": rounds}, notes=_notes(wanted))


def chunked_cost(trial: Trial) -> Outcome:
    """One sample trained precisely in chunks of `chunk_tokens`, against the whole sequence at once.

    Parameters: `model`, `tuning_tokens`, `chunk_tokens`, optionally `rank`.
    """
    wanted = _wanted(trial)
    chunk = int(number(trial.parameters, "chunk_tokens", 0))
    size = cut(chunk) if wanted.device == "cpu" else chunk
    whole = _whole(wanted)
    chunked = _graphed(ChunkedTrainer(wanted.shape, _weights(wanted), size, _options(wanted)), wanted)
    (whole_s, chunked_s), rounds = _alternating(sample_s(whole, wanted), sample_s(chunked, wanted))
    told = {"sample_s": chunked_s, "whole_s": whole_s, "times_whole": chunked_s / whole_s, "rounds": rounds}
    return Outcome(told, notes=_notes(wanted))


def _notes(wanted: Wanted) -> tuple[str, ...]:
    if wanted.device == "cpu":
        return ("measured on a CPU with a tiny model: not the paper's experiment",)
    count = f"medians of {TIMED} samples, of {LEAST} or more where they take over {ENOUGH_S / TIMED:.2g} s"
    return (f"measured on {torch.cuda.get_device_name()}, torch {torch.__version__}, {count}",)
