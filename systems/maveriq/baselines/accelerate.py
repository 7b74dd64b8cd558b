"""Hugging Face Accelerate as the artifact runs it (sheet, 3): fp16, `device_map="balanced"`, one request at a time for the box.

Every model lies across all GPUs, balanced by memory; one thread replays the trace, so loading holds up requests and requests
hold up loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from systems.maveriq.configuration import ModelFacts
from systems.maveriq.serving.queueing import Served
from systems.maveriq.serving.workload import Trace


def balanced_map(layers: int, gpus: int) -> tuple[int, ...]:
    """Layers per GPU as even as can be; the first GPUs take what is left over."""
    return tuple(layers // gpus + (gpu < layers % gpus) for gpu in range(gpus))


def request_s(model: str, facts: Mapping[str, ModelFacts], known: Mapping[str, float]) -> float:
    """Seconds of a request: measured where `known`, else a fit through what is.

    A decode step reads all weights and launches every layer's kernels: time = a x (layers x hidden^2) + b x layers, by least
    squares over the models in `known`, neither term below 0.
    """
    if model in known:
        return known[model]
    names = sorted(known)
    terms = np.array([_terms(facts[name]) for name in names])
    took = np.array([known[name] for name in names])
    best = np.linalg.lstsq(terms, took, rcond=None)[0]
    if (best < 0).any():  # one term explains it all
        alone = terms[:, 0] @ took / (terms[:, 0] @ terms[:, 0])
        best = np.array([alone, 0.0])
    return float(np.array(_terms(facts[model])) @ best)


def _terms(facts: ModelFacts) -> tuple[float, float]:
    return facts.layers * facts.hidden**2 / 1e9, float(facts.layers)


def replay(trace: Trace, request_times_s: Sequence[float], load_times_s: Sequence[float]) -> Served:
    """One thread works off deploy commands and requests in the order of their times (entry e's of each kind)."""
    commands = [(float(at), -1, entry) for entry, at in enumerate(trace.deploy_s)]
    commands += [(at, request, entry) for request, (at, entry) in enumerate(zip(trace.arrival_s, trace.target, strict=True))]
    now = 0.0
    start, finish = np.full(len(trace.arrival_s), np.nan), np.full(len(trace.arrival_s), np.nan)
    for at, request, entry in sorted(commands):
        now = max(now, at)
        if request < 0:
            now += load_times_s[entry]
        else:
            start[request] = now
            now += request_times_s[entry]
            finish[request] = now
    return Served(start, finish)
