"""Trials by content: what determines a trial names its folder, and a folder that is there is complete.

    results/trials/<hash>/spec.json         everything that determines the trial; its hash is the folder's name
                          metrics.json      what came out (NaN and inf as the texts "nan", "inf", "-inf")
                          requests.parquet  one row per request, where the experiment has requests
                          provenance.json   where and when it was run; not part of the hash

A trial is written into a folder of another name and renamed, so it is never half there; two processes that run the
same trial at once do no harm, the second one's folder is dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import provenance
from harness.atomic import atomic_folder
from harness.code_version import executing_version, system_version
from harness.columns import table_of
from harness.config import Config
from harness.manifest import Manifest
from systems.registry import InputError, Outcome, Scalar, Trial, experiment

HASH_LENGTH = 20  # 80 bits: a collision is out of reach
STAND_IN = "stand-in"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True)
class Ran:
    """A trial that has run, now or before (`fresh` says which)."""

    hash: str
    metrics: Mapping[str, Scalar]
    fresh: bool


@dataclass(frozen=True, slots=True)
class TrialStore:
    """The trials under `folder`. `checksums` gives the SHA-256 of each dataset, `config` is kept in the provenance."""

    folder: Path
    checksums: Mapping[str, str | None] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, trial: Trial) -> dict[str, Any]:
        """Everything that determines `trial`, as plain data."""
        return {
            "system": trial.system,
            "experiment": trial.experiment,
            "parameters": dict(trial.parameters),
            "hardware": trial.hardware,
            "backend": trial.backend,
            "seed": trial.seed,
            "datasets": {name: self._checksum(name, path) for name, path in trial.datasets.items()},
            "code": system_version(trial.system),
            **({"device": _device(), "executing": executing_version("measured")} if trial.backend == "measured" else {}),
        }

    def _checksum(self, name: str, path: Path | None) -> str:
        checksum = self.checksums.get(name) if path else STAND_IN
        assert checksum, f"dataset {name} has a file but no checksum"
        return checksum

    def run(self, trial: Trial, asked_by: str) -> Ran:
        """The metrics of `trial`: those stored, if it has run before, else it runs now.

        `asked_by` says in an error message whose trial it is.

        Raises:
            InputError: there is no such experiment, it refuses its parameters, or a stored trial is unreadable.
        """
        spec = self.spec(trial)
        name = hash_of(spec)
        stored = self.metrics(name)
        if stored is not None:
            return Ran(name, stored, fresh=False)
        start, clock = time.time(), time.perf_counter()
        try:
            outcome = experiment(trial.system, trial.experiment)(trial)
        except InputError as error:
            raise InputError(f"{asked_by}: {error.where}", error.key, error.value, error.mend) from error
        duration_s = time.perf_counter() - clock
        self._keep(name, spec, outcome, provenance.of_trial(spec, self.config, start, duration_s))
        return Ran(name, _plain(outcome.metrics), fresh=True)

    def metrics(self, name: str) -> Mapping[str, Scalar] | None:
        """The metrics of the trial with the hash `name`; None when it has not run."""
        found = self._read(name, "metrics.json")
        return None if found is None else {key: _NOT_FINITE.get(value, value) for key, value in found.items()}

    def provenance(self, name: str) -> Mapping[str, Any] | None:
        """The provenance of the trial with the hash `name`; None when it has not run."""
        return self._read(name, "provenance.json")

    def _read(self, name: str, file: str) -> dict[str, Any] | None:
        path = self.folder / name / file
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(path, "JSON", str(error), f"delete the folder {path.parent}: the trial runs again") from error
        assert isinstance(found, dict), path
        return found

    def _keep(self, name: str, spec: Mapping[str, Any], outcome: Outcome, origin: Mapping[str, Any]) -> None:
        with atomic_folder(self.folder / name) as draft:
            _write_json(draft / "spec.json", spec)
            _write_json(draft / "metrics.json", {key: _finite(value) for key, value in _plain(outcome.metrics).items()})
            _write_json(draft / "provenance.json", {**origin, "notes": list(outcome.notes)})
            if outcome.requests:
                _write_requests(draft / "requests.parquet", outcome.requests)


def store_of(results: Path, config: Config, datasets: Mapping[str, Manifest]) -> TrialStore:
    """The trials under the folder `results`, run with these datasets."""
    checksums = {name: found.sha256 for name, found in datasets.items()}
    return TrialStore(results / "trials", checksums, config.model_dump(mode="json"))


def hash_of(spec: Mapping[str, Any]) -> str:
    """The name of the trial with this `spec`: the SHA-256 of its canonical JSON, shortened."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()[:HASH_LENGTH]


def canonical(data: Mapping[str, Any]) -> str:
    """`data` as JSON in the one form that equal data have: keys sorted, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _device() -> list[str]:
    """What a measured trial depends on besides its spec: the GPUs, or else the processor, that it runs on."""
    found = [gpu["name"] for gpu in provenance.gpus()]
    return found or [str(provenance.environment()["cpu"])]


def _plain(metrics: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """`metrics` with plain Python values, whatever array library they come from."""
    plain = {key: _unboxed(value) for key, value in metrics.items()}
    for key, value in plain.items():
        assert value is None or isinstance(value, (str, int, float, bool)), f"metric {key} is no scalar: {value!r}"
    return plain


def _unboxed(value: Any) -> Any:  # noqa: ANN401
    return value.item() if hasattr(value, "item") else value


def _finite(value: Scalar) -> Scalar:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _write_requests(path: Path, columns: Mapping[str, Sequence[Scalar]]) -> None:
    import pyarrow.parquet  # not at import: a series whose trials have all run does not need it

    table = table_of(columns)
    with path.open("wb") as file:
        pyarrow.parquet.write_table(table, file, compression="zstd")
