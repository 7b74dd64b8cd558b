# mypy: disable-error-code="no-untyped-call"
"""Tasklets of one sample alone on the GPU, by its length: the rows of `tuning.csv`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from systems.common.models import ModelShape
from systems.common.torch_engine.weights import Weights
from systems.llmstation.corun.lanes import Lanes, lanes_of
from systems.llmstation.corun.session import Wanted, make_trainer, samples
from systems.llmstation.training import Trains
from systems.llmstation.training.trainer import Batch
from systems.llmstation.tuning_table import PER_SAMPLE

RUNS = 5
TuningRow = tuple[str, int, float]
"""Phase, tokens, microseconds."""


def tasklet_rows(
    shape: ModelShape, weights: Weights, wanted: Wanted, tokens: int, recompute: bool = False
) -> Iterator[TuningRow]:
    """The rows of one length; with `recompute` also what activation checkpointing adds to a backward tasklet."""
    plain = phases_s(shape, weights, wanted, tokens)
    for phase in ("forward", "backward", *PER_SAMPLE):
        yield phase, tokens, 1e6 * plain[phase]
    if recompute:
        again = phases_s(shape, weights, replace(wanted, recompute=True), tokens)
        extra_s = again["backward"] - plain["backward"]
        if extra_s > 0:
            yield "recompute", tokens, 1e6 * extra_s


def phases_s(shape: ModelShape, weights: Weights, wanted: Wanted, tokens: int) -> dict[str, float]:
    """Seconds: of `forward` and `backward` the median tasklet's, of `loss` and `step` all of a sample's."""
    trainer = make_trainer(shape, weights, replace(wanted, tuning_tokens=tokens))
    batches = samples(shape, tokens, 0, wanted.device)
    lanes = lanes_of(torch.device(wanted.device))
    each = [_sample(trainer, next(batches), lanes) for _ in range(RUNS + 1)][1:]
    names = [phase for phase, _ in each[0]]
    medians = [statistics.median(column) for column in zip(*([s for _, s in run] for run in each), strict=True)]
    found = {}
    for phase in dict.fromkeys(names):
        mine = [s for s, name in zip(medians, names, strict=True) if name == phase]
        found[phase] = sum(mine) if phase in PER_SAMPLE else statistics.median(mine)
    return found


def _sample(trainer: Trains, batch: Batch, lanes: Lanes) -> list[tuple[str, float]]:
    """Phase and seconds of every tasklet of one sample."""
    with lanes.tuning():
        marks, names = [lanes.mark(tuning=True)], []
        for tasklet in trainer.steps(batch):
            names.append(tasklet.phase)
            marks.append(lanes.mark(tuning=True))
    marks[-1].wait()
    return [(name, b.after_s(a)) for name, (a, b) in zip(names, pairwise(marks), strict=True)]
