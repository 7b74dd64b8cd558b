"""Straight lines of one split's own: what is left to fingerprints where a machine does not follow the terms.

Each number of ranks, precision and batch has four (once, once per layer, per token, per token and layer; for memory two: at
all and per layer), measured in units of what the terms say. On a machine like that of the priors they are 0; on a strange one
(`hierarchy`) they let a model's own fingerprints be extended as the paper does it, as far as these are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from systems.maveriq.configuration import Floats, ModelFacts
from systems.maveriq.fingerprint import Setting
from systems.maveriq.terms import Settings, latency_terms, memory_terms, settings

Split = tuple[int, str, bool, int]
"""(TP, dtype, int8_kv, batch)."""
_LATENCY_LEAST, _MEMORY_LEAST = 0.5, 0.05
"""A line's unit is at least this share of the largest of its kind. Latency: prefill per layer follows from a prompt length that
may not be known, so its unit says little."""


def splits(found: Sequence[Setting]) -> tuple[Split, ...]:
    """The splits among `found`, sorted."""
    return tuple(sorted({_split(s) for s in found}))


def _split(s: Setting) -> Split:
    return s.tp, s.dtype, s.int8_kv, s.batch


def latency_lines(
    asked: Sequence[Setting], known: Sequence[Split], models: Mapping[str, ModelFacts], prompt: float, mean: Floats
) -> Floats:
    """The lines' columns for `asked`, ms per unit. [n, 4 splits]."""

    def units(one: Settings, two: Settings) -> Floats:
        (once1, token1, _), (once2, token2, _) = (latency_terms(some) for some in (one, two))
        layer = np.stack([(once2 - once1) @ mean, (token2 - token1) @ mean], axis=1)
        rest = np.stack([once1 @ mean, token1 @ mean], axis=1) - layer
        return np.stack([rest[:, 0], layer[:, 0], rest[:, 1], layer[:, 1]], axis=1)

    def factors(s: Setting) -> tuple[int, ...]:
        return 1, s.layers, s.output_length, s.layers * s.output_length

    return _columns(asked, settings(asked, models, prompt), known, units, factors, _LATENCY_LEAST)


def memory_lines(
    asked: Sequence[Setting], known: Sequence[Split], models: Mapping[str, ModelFacts], prompt: float, mean: Floats
) -> Floats:
    """The lines' columns for `asked`, GiB per unit. [n, 2 splits]."""

    def units(one: Settings, two: Settings) -> Floats:
        first, second = (memory_terms(some) @ mean for some in (one, two))
        return np.stack([2 * first - second, second - first], axis=1)

    return _columns(asked, settings(asked, models, prompt), known, units, lambda s: (1, s.layers), _MEMORY_LEAST)


def _columns(
    asked: Sequence[Setting],
    described: Settings,
    known: Sequence[Split],
    units: Callable[[Settings, Settings], Floats],
    factors: Callable[[Setting], tuple[int, ...]],
    least: float,
) -> Floats:
    if not asked:
        return np.zeros((0, 0))
    single = np.ones_like(described.pp)
    one = described._replace(pp=single, layers=single)
    size = np.abs(units(one, one._replace(layers=2 * single)))
    size = np.maximum(size, least * size.max(axis=1, keepdims=True))
    found = np.zeros((len(asked), len(known), size.shape[1]))
    places = {split: place for place, split in enumerate(known)}
    for row, setting in enumerate(asked):
        place = _nearest(_split(setting), places)
        if place is not None:
            found[row, place] = size[row] * factors(setting)
    return found.reshape(len(asked), -1)


def _nearest(split: Split, places: Mapping[Split, int]) -> int | None:
    """The split itself, else the same at batch 1, else one with as many ranks; None where that was not measured."""
    if split in places:
        return places[split]
    single = (*split[:3], 1)
    if single in places:
        return places[single]
    alike = [place for known, place in places.items() if known[0] == split[0]]
    return alike[0] if alike else None
