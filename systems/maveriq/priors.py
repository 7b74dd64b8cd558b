"""What measured models lend to a model that only has fingerprints: learning it, and the file that holds it.

    python -m systems.maveriq.priors --data FOLDER [--out FILE.json]

FOLDER is the dataset `maveriq_a6000`. The file holds the constants learned from all its models and, for each model, those
learned without it: an estimate never rests on whole-model measurements of the very model that it is for. Margins of the
intervals are made the same way, one level deeper: for a left-out model they come from leaving out each of the others in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from systems.common.errors import InputError
from systems.maveriq.configuration import Floats, ModelFacts, known_models
from systems.maveriq.files import write
from systems.maveriq.fingerprint import Fingerprints, Point, Setting, improved_points, read_fingerprints
from systems.maveriq.hierarchy import Known, Prior, Rows, fit, predicted, update, widths
from systems.maveriq.terms import (
    LATENCY_GROUPS,
    LATENCY_TERMS,
    LONG_PROMPT,
    MEMORY_GROUPS,
    MEMORY_TERMS,
    SHORT_PROMPT,
    latency_rows,
    memory_rows,
)

PRIORS = Path(__file__).parent / "data" / "priors.json"
LEVELS = (0.0, 0.25, 0.5, 0.8, 0.9, 0.95, 0.99)
Pair = tuple[Prior, Prior]
"""(latency, memory)."""


class Source(NamedTuple):
    """Measurements of one regime of prompts."""

    measured: Fingerprints
    prompt_tokens: int


@dataclass(frozen=True)
class Evidence:
    """What priors are learned from: whole models and fingerprints. Those of the first regime make the margins."""

    whole: tuple[Source, ...]
    prints: tuple[Source, ...]
    models: Mapping[str, ModelFacts]

    @property
    def names(self) -> tuple[str, ...]:
        """The models measured whole in the first regime."""
        return self.whole[0].measured.models


@dataclass(frozen=True)
class Priors:
    """Priors from all models, and from all but one."""

    source: str
    everyone: Pair
    without: Mapping[str, Pair]

    def of(self, model: str) -> Pair:
        """The priors for `model`: without its own whole-model measurements, if there are any."""
        return self.without.get(model, self.everyone)


def evidence(data: Path, models: Mapping[str, ModelFacts] | None = None) -> Evidence:
    """The authors' measurements in the folder `data`. Raises InputError when a file is missing or unusable."""

    def read(name: str, prompt: int) -> Source:
        return Source(read_fingerprints(data / name, even_only=True), prompt)

    return Evidence(
        (read("full_model_data_collection.csv", LONG_PROMPT), read("unbalanced_PP_data_collection.csv", SHORT_PROMPT)),
        (read("fingerprint_data_collection.csv", LONG_PROMPT), read("fingerprint_data_collection_BS.csv", SHORT_PROMPT)),
        known_models() if models is None else models,
    )


def learn(found: Evidence, names: Iterable[str]) -> Pair:
    """Latency and memory priors from the models `names`, without margins."""
    names = tuple(names)
    latency = fit([_known(found, name, latency_rows) for name in names], LATENCY_TERMS)
    return latency, fit([_known(found, name, memory_rows) for name in names], MEMORY_TERMS)


def calibrated(found: Evidence, names: Sequence[str]) -> Pair:
    """The same with margins: how far off each of `names` is when the others make its prior, in standard deviations."""
    offs: tuple[list[Floats], list[Floats]] = ([], [])
    for name in names:
        priors = learn(found, [other for other in names if other != name])
        for place, off in enumerate(_offs(found, name, priors)):
            offs[place].append(off)
    latency, memory = learn(found, names)
    return replace(latency, margins=_margins(offs[0])), replace(memory, margins=_margins(offs[1]))


def make_priors(found: Evidence, source: str) -> Priors:
    """Priors from all models, and without each of them."""
    names = found.names
    without = {name: calibrated(found, [other for other in names if other != name]) for name in names}
    return Priors(source, calibrated(found, names), without)


def _of_model(sources: Sequence[Source], name: str) -> list[tuple[Mapping[Setting, Point], int]]:
    return [({s: p for s, p in source.measured.points.items() if s.model == name}, source.prompt_tokens) for source in sources]


def _known(found: Evidence, name: str, rows_of: Any) -> Known:  # noqa: ANN401
    def together(sources: Sequence[Source]) -> Rows:
        parts = [rows_of(points, found.models, prompt) for points, prompt in _of_model(sources, name) if points]
        return Rows(np.vstack([part.terms for part in parts]), np.concatenate([part.noise_class for part in parts]))

    return Known(together(found.whole), together(found.prints))


def _offs(found: Evidence, name: str, priors: Pair) -> tuple[Floats, Floats]:
    """|error| / standard deviation of each whole-model measurement of `name`, in the logarithm, from its fingerprints alone."""
    prints = found.prints[0]
    chosen = {setting: prints.measured.points[setting] for setting in improved_points(prints.measured, name)}
    (whole, prompt), *_ = _of_model(found.whole, name)
    kinds = ((latency_rows, LATENCY_GROUPS), (memory_rows, MEMORY_GROUPS))
    results = []
    for (rows_of, groups), prior in zip(kinds, priors, strict=True):
        posterior = update(prior, rows_of(chosen, found.models, prompt), widths(prior, groups))
        truth = rows_of(whole, found.models, prompt)
        value, share = predicted(truth.terms, truth.noise_class, prior, posterior)
        results.append(np.abs(np.log(np.maximum(value, 1e-9))) / share)
    return results[0], results[1]


def _margins(offs: Sequence[Floats]) -> dict[float, float]:
    """Quantiles of how far off left-out models were, each model with the same weight."""
    every = np.concatenate(offs)
    weight = np.concatenate([np.full(len(off), 1 / len(off) / len(offs)) for off in offs])
    order = np.argsort(every)
    reached = np.cumsum(weight[order])
    return {level: float(np.interp(level, reached, every[order])) if level else 0.0 for level in LEVELS}


_DIGITS = 6


def _to_json(prior: Prior) -> dict[str, Any]:
    size = len(prior.terms)
    # the covariance in units of the constants' sizes, lower triangle: few digits do
    scaled = prior.covariance / np.outer(prior.scale, prior.scale)
    return {
        "terms": {
            term: [_short(value) for value in values]
            for term, *values in zip(prior.terms, prior.mean, prior.spread, prior.floor, strict=True)
        },
        "covariance": [_short(scaled[row, column]) for row in range(size) for column in range(row + 1)],
        "whole_noise": [_short(value) for value in prior.whole_noise],
        "print_noise": [_short(value) for value in prior.print_noise],
        "margins": {str(level): _short(value) for level, value in prior.margins.items()},
    }


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _from_json(raw: Mapping[str, Any], terms: tuple[str, ...]) -> Prior:
    assert tuple(raw["terms"]) == terms, "data/priors.json is of other terms: run python -m systems.maveriq.priors"
    mean, spread, floor = np.array(list(raw["terms"].values()), dtype=np.float64).T
    scale = np.maximum(mean, floor)
    covariance = np.zeros((len(terms), len(terms)))
    covariance[np.tril_indices(len(terms))] = raw["covariance"]
    covariance = (covariance + np.tril(covariance, -1).T) * np.outer(scale, scale)
    whole, prints = (np.array(raw[name]) for name in ("whole_noise", "print_noise"))
    return Prior(terms, mean, covariance, spread, floor, whole, prints, {float(k): v for k, v in raw["margins"].items()})


def to_json(priors: Priors) -> str:
    """The file's text: a line per prior, so that a difference between two files can be read."""
    lines = [("everyone", priors.everyone), *((f"without {name}", pair) for name, pair in priors.without.items())]
    body = ",\n".join(f"{json.dumps(name)}: {json.dumps([_to_json(prior) for prior in pair])}" for name, pair in lines)
    return f'{{"source": {json.dumps(priors.source)},\n{body}}}\n'


_READ: dict[Path, Priors] = {}


def read_priors(file: Path = PRIORS) -> Priors:
    """Read what `to_json` wrote. Raises InputError when there is no such file or it is none of ours."""
    if file not in _READ:
        mend = "make it anew: python -m systems.maveriq.priors"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            source = str(raw.pop("source"))
            pairs = {name: (_from_json(a, LATENCY_TERMS), _from_json(b, MEMORY_TERMS)) for name, (a, b) in raw.items()}
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise InputError(file, "priors", str(error), mend) from error
        without = {name.removeprefix("without "): pair for name, pair in pairs.items() if name != "everyone"}
        _READ[file] = Priors(source, pairs["everyone"], without)
    return _READ[file]


SOURCE = (
    "Constants of 8 x RTX A6000 (PCIe) with TensorRT-LLM 0.9, learned by `python -m systems.maveriq.priors` from the "
    "measurements in UT-SysML/MaverIQ (outputs/profiling_data, outputs/measurment_study): ms and GiB per unit of each term"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    options = argparse.ArgumentParser(prog="python -m systems.maveriq.priors", description="Learn the priors anew.")
    options.add_argument("--data", type=Path, required=True, help="folder of the dataset maveriq_a6000")
    options.add_argument("--out", type=Path, default=PRIORS, help="file to write (default: the one that improved mode uses)")
    given = options.parse_args(arguments)
    try:
        write(given.out, to_json(make_priors(evidence(given.data), SOURCE)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
