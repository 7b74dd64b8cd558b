"""What tuning costs alone on a GPU, for real: chunks of a sequence (Figure 4) and suspensions (Figure 12). Imports torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from systems.common.core import Outcome, Trial
from systems.common.errors import InputError
from systems.common.torch_engine.weights import Weights, random_weights
from systems.llmstation.corun.measure import cut, number, wanted_of
from systems.llmstation.corun.session import Wanted, samples
from systems.llmstation.training import Trains
from systems.llmstation.training.adapters import LoraConfig
from systems.llmstation.training.chunked import ChunkedTrainer
from systems.llmstation.training.trainer import Options, Trainer

WARM = 3
TIMED = 15
_KEPT: dict[Wanted, Weights] = {}


def _weights(wanted: Wanted) -> Weights:
    """The weights, kept from trial to trial."""
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise InputError("llmstation", "hardware", "cuda", "no GPU here: measure on a GPU host, or use hardware=cpux1")
    if wanted not in _KEPT:
        _KEPT.clear()
        _KEPT[wanted] = random_weights(wanted.shape, 0, wanted.device)
    return _KEPT[wanted]


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


def _alternating(*works: Callable[[], float]) -> list[float]:
    """The median of each, taken in turns, so that a drifting clock frequency harms all alike."""
    for work in works:
        for _ in range(WARM):
            work()
    rounds = [[work() for work in works] for _ in range(TIMED)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def suspension(trial: Trial) -> Outcome:
    """One sample with `suspends` suspensions, evenly spread over its tasklets, against one without.

    Parameters: `model`, `tuning_tokens`, `suspends`, optionally `rank`. Tasklets are attention and MLP of a layer each way,
    so that a 32-layer model can be suspended more than 80 times.
    """
    wanted, suspends = _wanted(trial), int(number(trial.parameters, "suspends", 0))
    weights = _weights(wanted)
    trainer = _graphed(Trainer(wanted.shape, weights, _options(wanted, "block")), wanted)
    tasklets = len(trainer.plan(1, wanted.tuning_tokens))
    most = tasklets - 1
    if not 0 <= suspends <= most and wanted.device == "cuda":
        raise InputError("llmstation", "suspends", suspends, f"a sample has {tasklets} tasklets: give 0 to {most}")
    suspends = min(suspends, most)  # the tiny model of a CPU has fewer
    places = {round(k * tasklets / (suspends + 1)) for k in range(1, suspends + 1)}
    straight_s, suspended_s = _alternating(sample_s(trainer, wanted), sample_s(trainer, wanted, lambda done: done in places))
    extra = 100 * (suspended_s / straight_s - 1)
    told = {"sample_s": suspended_s, "straight_s": straight_s, "overhead_percent": extra, "tasklets": tasklets}
    return Outcome(told, notes=_notes(wanted))


def chunked_cost(trial: Trial) -> Outcome:
    """One sample trained precisely in chunks of `chunk_tokens`, against the whole sequence at once.

    Parameters: `model`, `tuning_tokens`, `chunk_tokens`, optionally `rank`.
    """
    wanted = _wanted(trial)
    chunk = int(number(trial.parameters, "chunk_tokens", 0))
    weights = _weights(wanted)
    options = _options(wanted)
    size = cut(chunk) if wanted.device == "cpu" else chunk
    whole = _graphed(Trainer(wanted.shape, weights, options), wanted)
    chunked = _graphed(ChunkedTrainer(wanted.shape, weights, size, options), wanted)
    whole_s, chunked_s = _alternating(sample_s(whole, wanted), sample_s(chunked, wanted))
    return Outcome({"sample_s": chunked_s, "whole_s": whole_s, "times_whole": chunked_s / whole_s}, notes=_notes(wanted))


def _notes(wanted: Wanted) -> tuple[str, ...]:
    if wanted.device == "cpu":
        return ("measured on a CPU with a tiny model: not the paper's experiment",)
    return (f"measured on {torch.cuda.get_device_name()}, torch {torch.__version__}, median of {TIMED}",)
