"""Synthetic systems with a known knee, for the tests of the search."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

from harness.search import Answer, Knob, Probe, SearchSpace

Ask = Callable[[Probe], Answer]


def space(**changes: object) -> SearchSpace:
    """One knob `k` from 1 to 1000 under the limit `m <= 1`, 5 %."""
    rules = {"maximise": "y", "limits": {"m": 1.0}, "knobs": {"k": Knob(low=1, high=1000)}}
    return SearchSpace.model_validate({**rules, **changes})


def power(knee: float, exponent: float = 1.0, noise: float = 0.0, seed: int = 0, objective_noise: float = 0.0) -> Ask:
    """`m = (k / knee) ^ exponent`, `y = k`, each times its own log-normal noise, fresh for every setting and seed."""

    def ask(probe: Probe) -> Answer:
        value, draw = probe.knobs["k"], random.Random(f"{seed} {probe.knobs['k']!r} {probe.seed}")
        metric = (value / knee) ** exponent * math.exp(noise * draw.gauss(0, 1))
        return Answer(probe, value * math.exp(objective_noise * draw.gauss(0, 1)), {"m": metric})

    return ask


def queue(knee: float, load: float, noise: float = 0.0, seed: int = 0) -> Ask:
    """A saturating latency: `m` grows as 1 / (1 - k / capacity), is infinite from capacity on, and is 1 at `knee`.

    `load` is the share of capacity at the knee: the nearer to 1, the steeper.
    """

    def ask(probe: Probe) -> Answer:
        value, draw = probe.knobs["k"], random.Random(f"{seed} {probe.knobs['k']!r} {probe.seed}")
        free = 1 - value * load / knee
        metric = (1 - load) / free * math.exp(noise * draw.gauss(0, 1)) if free > 0 else math.inf
        return Answer(probe, value, {"m": metric})

    return ask


def of(objective: Callable[[float], float], metric: Callable[[float], float]) -> Ask:
    """Any noise-free system with one knob."""
    return lambda probe: Answer(probe, objective(probe.knobs["k"]), {"m": metric(probe.knobs["k"])})


def several(elasticities: Mapping[str, float], limits: Mapping[str, Mapping[str, float]], half: float = 30.0) -> Ask:
    """Several knobs: a product of saturating gains `(k / (k + half)) ^ e`, under metrics that are products of powers."""

    def ask(probe: Probe) -> Answer:
        y = math.prod((x / (x + half)) ** elasticities[name] for name, x in probe.knobs.items())
        metrics = {metric: math.prod(probe.knobs[k] ** e for k, e in powers.items()) for metric, powers in limits.items()}
        return Answer(probe, y, metrics)

    return ask


def settings(history: list[Answer]) -> int:
    """How many distinct knob settings a history holds."""
    return len({tuple(a.probe.knobs.items()) for a in history})
