"""How an estimator is made: from a fingerprint file and a mode.

estimator = load_estimator(Path("fingerprints.csv"), mode="improved")
estimator.estimate("llama-2-7b", Configuration(8, 1, "int4"), batch=1, output_length=100).latency_s
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, Unpack

from systems.common.errors import InputError
from systems.maveriq.configuration import Estimator, ModelFacts, known_models
from systems.maveriq.fingerprint import Fingerprints, read_fingerprints

MODES = ("improved", "paper")


class Options(TypedDict, total=False):
    """What the constructor of `ImprovedEstimator` takes beside fingerprints and models; paper mode has none of it."""

    level: float
    prompt_tokens: int | None
    use_all: bool


def load_estimator(
    fingerprints: Path, mode: str = "improved", models: Mapping[str, ModelFacts] | None = None, **options: Unpack[Options]
) -> Estimator:
    """The estimator of `mode` over the fingerprints in the CSV file `fingerprints`.

    `models` gives the depth of every model in question (default: `data/models.yaml` and the engine's shapes). `options` are
    those of improved mode; paper mode passes them over. Raises InputError for an unknown mode or an unusable file.
    """
    return make_estimator(read_fingerprints(fingerprints), mode, models, **options)


def make_estimator(
    fingerprints: Fingerprints,
    mode: str = "improved",
    models: Mapping[str, ModelFacts] | None = None,
    **options: Unpack[Options],
) -> Estimator:
    """The same from fingerprints that were read already."""
    facts = known_models() if models is None else models
    if mode == "paper":
        from systems.maveriq.estimator_paper import PaperEstimator

        return PaperEstimator(fingerprints, facts)
    if mode == "improved":
        from systems.maveriq.improved import ImprovedEstimator

        return ImprovedEstimator(fingerprints, facts, **options)
    raise InputError("estimator", "mode", mode, f"use one of {', '.join(MODES)}")
