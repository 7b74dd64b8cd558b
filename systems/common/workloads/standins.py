"""Synthetic data in place of a dataset that is not there, fitted to the dataset's published statistics.

The statistics are data: the `stand_in` of each dataset in datasets/registry.yaml, with their source. A generator is
chosen by `kind`. A stand-in is one fixed table per dataset (its own seed, not the trial's), because it plays the part of
a file; a figure that used one says so in its footer.

| kind | makes | statistics |
| --- | --- | --- |
| `quantiles` | lengths through the given quantiles | `input_tokens`, `output_tokens`: percent to tokens |
| `modulated_gamma` | arrivals: gamma gaps under a redrawn rate | `rate_rps`, `gap_cv`, `rate_cv`, `period_s`, `whole_seconds` |
| `trace` | arrivals and lengths | `arrivals` and `lengths`: one of the above each |
| `functions` | no requests: how popular serverless functions are, see `functions` | `popularity` and what it takes |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from systems.common.errors import InputError
from systems.common.workloads import functions
from systems.common.workloads.arrivals import Extent, modulated_gamma
from systems.common.workloads.catalogue import REGISTRY, entry
from systems.common.workloads.readers import Recorded
from systems.common.workloads.streams import stream

Statistics = Mapping[str, object]

_SEED = 20251121
"""The same for all stand-ins and for ever: they are constants, like the files that they stand for."""


@lru_cache(maxsize=16)
def stand_in(name: str) -> Recorded:
    """The synthetic stand-in of dataset `name`.

    Raises InputError when the registry gives it no statistics.
    """
    statistics = entry(name).stand_in
    if statistics is None:
        raise InputError(REGISTRY.name, name, "no stand_in", "this dataset has no synthetic stand-in: provide the file")
    return generate(name, statistics)


def generate(name: str, statistics: Statistics) -> Recorded:
    """A table with the given `statistics` (see the module's table); `name` is for error messages.

    Raises InputError for a kind that does not exist, or statistics that its generator does not take.
    """
    kind = statistics.get("kind")
    if kind not in KINDS:
        raise InputError(REGISTRY.name, f"{name}.stand_in.kind", kind, f"use one of {', '.join(sorted(KINDS))}")
    try:
        return KINDS[str(kind)](**{key: value for key, value in statistics.items() if key not in ("kind", "source")})
    except TypeError as error:
        raise InputError(REGISTRY.name, f"{name}.stand_in", dict(statistics), str(error)) from error


def quantiles(rows: int, input_tokens: Mapping[float, float], output_tokens: Mapping[float, float] | None = None) -> Recorded:
    """Lengths whose quantiles are those given; between two of them, lengths are log-uniform.

    Each column takes `rows` evenly spread levels in random order, so its statistics hardly depend on the seed. The columns
    are independent: the rank correlation of prompt and answer is 0.05 (ShareGPT) and 0.07 (Azure). What that loses: answers to
    ShareGPT prompts of 200 to 500 tokens are shorter than others, so the mean answer behind vLLM's filter is 438, not 419.
    """
    rng = stream(_SEED, "lengths")
    return Recorded(
        input_tokens=_column(rng, rows, input_tokens),
        output_tokens=None if output_tokens is None else _column(rng, rows, output_tokens),
    )


def _column(rng: np.random.Generator, rows: int, points: Mapping[float, float]) -> npt.NDArray[np.int64]:
    levels = (rng.permutation(rows) + 0.5) / rows
    logs = np.interp(levels, np.array(list(points)) / 100, np.log(list(points.values())))
    return np.rint(np.exp(logs)).astype(np.int64)


def modulated(
    rows: int, rate_rps: float, gap_cv: float, rate_cv: float, period_s: float, whole_seconds: bool = False
) -> Recorded:
    """Arrivals of the given mean rate and burstiness; `whole_seconds` cuts them to full seconds, so that some coincide."""
    rng, modulation = stream(_SEED, "arrivals"), stream(_SEED, "modulation")
    times = modulated_gamma(rng, modulation, rate_rps, gap_cv, rate_cv, period_s, Extent(count=rows))
    times *= (rows - 1) / (rate_rps * (times[-1] - times[0]))  # a redrawn rate hardly averages out within one trace
    times -= times[0]
    return Recorded(arrival_s=np.floor(times) if whole_seconds else times)


def trace(arrivals: Statistics, lengths: Statistics) -> Recorded:
    """Arrivals and lengths, each by its own generator."""
    timed, sized = generate("arrivals", arrivals), generate("lengths", lengths)
    return replace(timed, input_tokens=sized.input_tokens, output_tokens=sized.output_tokens)


def popularity(**statistics: object) -> Recorded:
    """A trace of functions records no requests; its statistics are checked by making it."""
    functions.made_up(statistics)
    return Recorded()


KINDS: Mapping[str, Callable[..., Recorded]] = {
    "quantiles": quantiles,
    "modulated_gamma": modulated,
    "trace": trace,
    "functions": popularity,
}
