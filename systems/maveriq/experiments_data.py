"""What experiments about the authors' measurements share: their tables, and the parameters of a trial."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.maveriq.configuration import Configuration, Floats, Question
from systems.maveriq.fingerprint import Fingerprints, Setting, read_fingerprints

DATASET = "maveriq_a6000"
PRINTS, SHORT, WHOLE = "fingerprint_data_collection.csv", "fingerprint_data_collection_BS.csv", "full_model_data_collection.csv"
SCALING, UNEVEN = "fingerprint_scaling_data.csv", "unbalanced_PP_data_collection.csv"
NOTE = "hardware model: published (the authors' measurements on 8 x RTX A6000)"


@lru_cache(maxsize=8)
def _read(file: Path, even_only: bool) -> Fingerprints:
    return read_fingerprints(file, even_only=even_only)


def folder(trial: Trial) -> Path:
    """The dataset's folder. Raises InputError when it is not there: nothing can stand in for measurements."""
    found = trial.datasets.get(DATASET)
    if found is None:
        raise bad("datasets", DATASET, "it has no stand-in: set dataset_mirror to a folder that holds it, or go online")
    return found


def read(trial: Trial, name: str, *, even_only: bool = False) -> Fingerprints:
    """One of the dataset's files; every process reads it once."""
    return _read(folder(trial) / name, even_only)


def fits(s: Setting, model: str, precision: tuple[str, bool], length: int) -> bool:
    """Whether a setting is of this model, precision and output length, at batch 1."""
    return (s.model, s.precision, s.output_length, s.batch) == (model, precision, length, 1)


def questions(truth: Fingerprints) -> list[Question]:
    """Questions whose answers `truth` holds, in its order."""
    return [Question(s.model, Configuration(s.tp, s.pp, s.dtype, s.int8_kv), s.batch, s.output_length) for s in truth.points]


def column(truth: Fingerprints, name: str) -> Floats:
    """One number of every point, in order."""
    return np.array([getattr(point, name) for point in truth.points.values()], dtype=np.float64)


def text(trial: Trial, key: str, known: tuple[str, ...] = (), default: str | None = None) -> str:
    """A parameter that is a word, one of `known` where given."""
    value = trial.parameters.get(key, default)
    if not isinstance(value, str) or (known and value not in known):
        raise bad(key, value, f"use one of {', '.join(known)}" if known else "give a word")
    return value


def whole_number(trial: Trial, key: str, default: int | None = None, least: int = 1) -> int:
    """A parameter that is a whole number of at least `least`."""
    value = trial.parameters.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise bad(key, value, f"give a whole number of at least {least}")
    return int(value)


def bad(key: str, value: object, mend: str) -> InputError:
    """An error about a figure's parameter."""
    return InputError("maveriq", key, value, mend)
