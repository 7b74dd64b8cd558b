"""The artifact's workloads (sheet, 4): requests per minute of the Azure 2023 traces, replayed over models that arrive.

The construction is deterministic: it draws from numpy's legacy generator with seed 42 in the artifact's order (arrivals of a
slot, then the target of each of its requests), so that arrival times and targets come out as in the authors' logs. Traces
for baselines choose among replicas with Python's own generator after shuffling all prompts; that stream can't be known
without the prompts, so replicas and targets come from a generator of our own there.

The artifact feeds the Poisson process, whose bins are seconds, to the code for slots of 30 s (a bug); only the process itself
is used here.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from systems.common.errors import InputError
from systems.maveriq.configuration import Floats

Ints = npt.NDArray[np.int64]

SLOT_S, SPREAD_S, LOAD_PAUSE_S, DEPLOY_LEAD_S = 30.0, 29.9, 90.0, 30.0
SEED = 42

MODEL_LISTS = {
    "large": [("llama-2-70b", 0), ("falcon-40b", 5), ("llama-2-7b", 10), ("falcon-40b", 15)],
    "regular": [
        (model, 3 * place)
        for place, model in enumerate(("llama-2-7b", "gptj-6b", "falcon-40b", "llama-2-13b") * 2)
    ],
    "twentyone": [
        (model, place)
        for place, model in enumerate(
            ("llama-2-7b", "llama-2-13b", "falcon-7b", "gptj-6b", "llama-2-70b", "llama-2-70b", "falcon-40b", "falcon-40b") * 3
        )
    ][:21],
}  # fmt: skip
"""Who arrives when: (model, slot), in the order of their numbers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a model list: `entry` 3 of `large` is a Falcon-40B that is loaded at slot 15."""

    model: str
    slot: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A workload. `target[i]` is the entry that request i is for; entry e is deployed at `deploy_s[e]` (seconds)."""

    entries: tuple[Entry, ...]
    deploy_s: Floats
    arrival_s: Floats
    target: Ints

    @property
    def end_s(self) -> float:
        """When the last request arrives."""
        return float(self.arrival_s[-1]) if len(self.arrival_s) else 0.0


def model_list(name: str) -> tuple[Entry, ...]:
    """The entries of a model list. Raises InputError for an unknown name."""
    if name not in MODEL_LISTS:
        raise InputError("maveriq", "model_list", name, f"use one of {', '.join(MODEL_LISTS)}")
    return tuple(Entry(model, slot) for model, slot in MODEL_LISTS[name])


@lru_cache(maxsize=8)
def minute_counts(path: Path) -> tuple[int, ...]:
    """Requests per minute of an Azure 2023 trace, its times rounded to the nearest minute (half a minute to the even one).

    Raises InputError for a file without a TIMESTAMP column or with a time that is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = csv.reader(stream)
            place = next(rows, []).index("TIMESTAMP")
            stamps = np.array([row[place] for row in rows if row], dtype="datetime64[ns]")
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise InputError(path, "TIMESTAMP", str(error), "give an Azure LLM trace of 2023") from error
    if not len(stamps):
        raise InputError(path, "rows", 0, "the trace is empty")
    minutes = np.rint(stamps.astype(np.int64) / 6e10).astype(np.int64)
    return tuple(np.bincount(minutes - minutes.min()).tolist())


def scaled(counts: Sequence[int], factor: float) -> list[int]:
    """Each count times `factor`, rounded down (with the same rounding of floats as the artifact)."""
    return [int(count * factor) for count in counts]


def replayed(counts: Sequence[int], entries: Sequence[Entry], seed: int = SEED) -> Trace:
    """A trace from requests per slot: the artifact's construction for MaverIQ (and Accelerate).

    Slot i spreads its requests evenly over 29.9 s, behind one pause of 90 s for every model loaded so far; a model's deploy
    command comes 30 s into its pause. Each request goes to one of the models loaded so far, all alike.
    """
    random = np.random.RandomState(seed)
    arrivals, targets, deploys, loaded = list[Floats](), list[Ints](), list[float](), 0
    for slot, count in enumerate(counts):
        for entry in entries:
            if entry.slot == slot:
                deploys.append((DEPLOY_LEAD_S if slot else 0.0) + slot * SLOT_S + loaded * LOAD_PAUSE_S)
                loaded += 1
        offsets: Floats = np.sort(random.uniform(0, SPREAD_S, count))
        if loaded:
            arrivals.append(slot * SLOT_S + loaded * LOAD_PAUSE_S + offsets)
            targets.append(random.randint(0, loaded, count))
    deploys += [math.inf] * (len(entries) - len(deploys))
    return Trace(tuple(entries), np.array(deploys), _joined(arrivals, np.float64), _joined(targets, np.int64))


def _joined(parts: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate(parts).astype(kind) if parts else np.empty(0, dtype=kind)


STAGES, STAGE_RATIO, STAGE_REQUESTS = 15, 2.5, 120


def poisson_arrivals(factor: float, seed: int) -> Floats:
    """The authors' Poisson stages: 15, by turns at s and 2.5 s requests per second with s = factor / 0.2 (sheet, 4.5).

    A slow stage has 120 s requests and a fast one twice that (the artifact rounds its ratio of 2.5 down).
    """
    random, scale, now = np.random.default_rng(seed), factor / 0.2, 0.0
    parts = []
    for stage in range(STAGES):
        fast = stage % 2 == 1
        count = int(int(STAGE_RATIO) * (STAGE_REQUESTS * scale // 1)) if fast else int(STAGE_REQUESTS * scale)
        parts.append(now + np.cumsum(random.exponential(1 / (scale * (STAGE_RATIO if fast else 1)), count)))
        now = float(parts[-1][-1]) if count else now
    return np.concatenate(parts)


def poisson(factor: float, entries: Sequence[Entry], gap_s: float, seed: int) -> Trace:
    """Poisson stages over models of which one is deployed every `gap_s` seconds, ready one load pause later.

    Requests start when the first model is ready and go to those that are ready, all alike.
    """
    arrivals = LOAD_PAUSE_S + poisson_arrivals(factor, seed)
    deploys = np.arange(len(entries), dtype=np.float64) * gap_s
    ready = np.searchsorted(deploys + LOAD_PAUSE_S, arrivals, side="right")
    draws = np.random.default_rng([seed, 1]).random(len(arrivals))
    return Trace(tuple(entries), deploys, arrivals, np.minimum((draws * ready).astype(np.int64), ready - 1))


@dataclass(frozen=True, slots=True)
class Replicated:
    """A model list with a fixed placement: for each entry of the list the groups that host it, none where it is dropped."""

    entries: tuple[Entry, ...]
    hosts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ReplicaTrace:
    """A trace and, for every request, which of its entry's replicas it is for (-1: the entry is dropped)."""

    trace: Trace
    replica: Ints


def replayed_on(counts: Sequence[int], placed: Replicated, seed: int = SEED) -> ReplicaTrace:
    """The same construction for AlpaServe's placements: each replica of an entry costs a pause of its own.

    Traffic is split over entries, dropped ones included, and then over an entry's replicas, all alike.
    """
    legacy, random = np.random.RandomState(seed), np.random.default_rng(seed)
    arrivals, targets, replicas = list[Floats](), list[Ints](), list[Ints]()
    deploys, pauses, loaded = list[float](), 0, 0
    copies = np.array([len(hosts) for hosts in placed.hosts])
    for slot, count in enumerate(counts):
        for entry, hosts in zip(placed.entries, placed.hosts, strict=True):
            if entry.slot == slot:
                deploys.append((DEPLOY_LEAD_S if slot else 0.0) + slot * SLOT_S + pauses * LOAD_PAUSE_S)
                pauses += max(1, len(hosts))
                loaded += 1
        arrivals.append(slot * SLOT_S + pauses * LOAD_PAUSE_S + np.sort(legacy.uniform(0, SPREAD_S, count)))
        target = random.integers(0, loaded, count)
        targets.append(target)
        replicas.append((random.random(count) * copies[target]).astype(np.int64) - (copies[target] == 0))
    deploys += [math.inf] * (len(placed.entries) - len(deploys))
    joined = Trace(placed.entries, np.array(deploys), _joined(arrivals, np.float64), _joined(targets, np.int64))
    return ReplicaTrace(joined, _joined(replicas, np.int64))


SLO_TIMES = {  # model: (TTFT, TPOT) in seconds; fp16, smallest PP-only layout, 923-token prompt (sheet, 4)
    "falcon-7b": (0.12082, 0.022863),
    "falcon-40b": (0.62410, 0.124155),
    "gptj-6b": (0.09603, 0.020059),
    "llama-2-7b": (0.11806, 0.022633),
    "llama-2-13b": (0.20676, 0.041599),
    "llama-2-70b": (1.03180, 0.204316),
}


def slo_s(model: str, factor: float, output_length: int = 20) -> float:
    """The latency limit of a request (seconds): `factor` times its unloaded fp16 latency. Raises InputError without one."""
    if model not in SLO_TIMES:
        raise InputError("maveriq", "slo", model, f"no unloaded latency is known for it: use one of {', '.join(SLO_TIMES)}")
    ttft_s, tpot_s = SLO_TIMES[model]
    return factor * (ttft_s + tpot_s * output_length)
