"""Efficiencies fitted on measured tables, and how far the roofline then is from points it has not seen.

    python -m systems.common.hardware.fit --mirror DIR --out FILE

writes the defaults that `costs` uses (`efficiencies.yaml`), with the tables they come from. The fit minimises the mean
squared relative error over all points of a set, every octave of sizes weighing the same, by Gauss-Newton steps: linear
least squares around the last guess until the error no longer falls. It is deterministic. Unknowns stay at or above 0.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from systems.common.errors import InputError
from systems.common.hardware.datasheet import GPUS, gpu
from systems.common.hardware.efficiencies import FILE, Efficiencies
from systems.common.hardware.measured_sets import BORROWED, MeasuredSet, measured_sets
from systems.common.hardware.observations import FIXED, SHARES, Observation, unknowns_of

LEAST_INVERSE_SHARE = 0.1  # no class of operators beats its datasheet peak tenfold
FOLDS = 5
STEPS = 50
# Exponent of the rounded maximum, one for all GPUs. Root-mean-square error of matrix products with no rounding, 3, 2.5, 2:
# RTX 4090 7.1, 5.3, 5.2, 5.6 %; A100 12.6, 10.9, 10.4, 9.7 %; H100 15.3, 13.4, 12.7, 11.9 %.
KNEE = 2.5
Array = npt.NDArray[np.float64]


def fit(observations: Sequence[Observation], unknowns: Sequence[str], start: Mapping[str, float]) -> dict[str, float]:
    """The values of `unknowns` with the least mean squared relative error; `start` gives the first guess and the rest.

    Returns all of `start`, with `unknowns` replaced.
    """
    best, least = dict(start), _mean_square(observations, start)
    current = dict(start)
    for _ in range(STEPS):
        current = current | _solve(observations, unknowns, current)
        error = _mean_square(observations, current)
        if error >= least * (1 - 1e-9):
            break
        best, least = current, error
    return best


def _mean_square(observations: Sequence[Observation], unknowns: Mapping[str, float]) -> float:
    weights = [o.weight for o in observations]
    return float(np.average(np.square(relative_errors(observations, unknowns)), weights=weights))


def relative_errors(observations: Sequence[Observation], unknowns: Mapping[str, float], knee: float = KNEE) -> list[float]:
    """Predicted over measured, less one, of each point."""
    return [o.predict(unknowns, knee) / o.seconds - 1 for o in observations]


def _solve(observations: Sequence[Observation], unknowns: Sequence[str], at: Mapping[str, float]) -> dict[str, float]:
    """Linear least squares in relative error around `at`, unknowns held at or above their least."""
    gradients = [o.linear_in(at, KNEE) for o in observations]
    free, held = list(unknowns), dict(at)
    while free:
        matrix, target = _system(observations, gradients, free, held)
        scale = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
        solution = (np.linalg.lstsq(matrix / scale, target, rcond=None)[0] / scale).tolist()
        short = {n: v - _least(n) for n, v in zip(free, solution, strict=True) if v < _least(n)}
        held |= dict(zip(free, solution, strict=True))
        if not short:
            break
        worst = min(short, key=lambda n: short[n])
        held[worst] = _least(worst)
        free.remove(worst)
    return {n: held[n] for n in unknowns}


def _least(unknown: str) -> float:
    return LEAST_INVERSE_SHARE if unknown in SHARES else 0.0


def _system(
    observations: Sequence[Observation],
    gradients: Sequence[Mapping[str, float]],
    free: Sequence[str],
    held: Mapping[str, float],
) -> tuple[Array, Array]:
    """Rows scaled so that every measured time is 1, times the root of their weights."""
    matrix = np.array([[g.get(name, 0.0) for name in free] for g in gradients])
    known = np.array([sum(c * held[name] for name, c in g.items() if name not in free) for g in gradients])
    seconds, root = np.array([o.seconds for o in observations]), np.sqrt([o.weight for o in observations])
    return matrix * (root / seconds)[:, None], (1 - known / seconds) * root


def held_out_errors(measured: MeasuredSet, start: Mapping[str, float]) -> list[float]:
    """Relative error of each point under a fit that has not seen it: every fifth point is predicted from the others."""
    errors = [0.0] * len(measured.observations)
    for fold in range(FOLDS):
        seen = [o for i, o in enumerate(measured.observations) if i % FOLDS != fold]
        unknowns = fit(seen, measured.unknowns, start)
        for i in range(fold, len(errors), FOLDS):
            errors[i] = relative_errors([measured.observations[i]], unknowns)[0]
    return errors


@dataclass(frozen=True, slots=True)
class Summary:
    """Relative errors in brief: median and 90th percentile of their size, and the median with its sign.

    Percentiles are weighted by octaves, as the fit is.
    """

    points: int
    median: float
    p90: float
    signed: float


def summary(observations: Sequence[Observation], errors: Sequence[float]) -> Summary:
    """Sum up `errors`, one for each of `observations`."""
    weights = [o.weight for o in observations]
    sizes = [abs(error) for error in errors]
    median, p90 = weighted_quantile(sizes, weights, 0.5), weighted_quantile(sizes, weights, 0.9)
    return Summary(len(sizes), median, p90, weighted_quantile(errors, weights, 0.5))


def weighted_quantile(values: Sequence[float], weights: Sequence[float], share: float) -> float:
    """The least value that `share` of the weight is at or below; midway to the next where exactly that much is."""
    order = sorted(zip(values, weights, strict=True))
    needed, reached = share * sum(weights), 0.0
    for (value, weight), (after, _) in zip(order, [*order[1:], order[-1]], strict=True):
        reached += weight
        if isclose(reached, needed, rel_tol=1e-9):
            return (value + after) / 2
        if reached > needed:
            return value
    return order[-1][0]


def fit_all(mirror: Path) -> dict[str, Any]:
    """The content of `efficiencies.yaml`: tables with checksum and number of points, values and their origin by GPU."""
    sets = measured_sets(mirror)
    fitted = {s.gpu: fit(s.observations, s.unknowns, start_of(s.gpu)) for s in sets}
    own = {s.gpu: s.unknowns for s in sets}
    gpus = {name: _row(name, fitted, own) for name in GPUS}
    tables = {s.gpu: {"points": len(s.observations), "sha256": {f: _sha256(mirror / f) for f in s.files}} for s in sets}
    return {"tables": tables, "gpus": gpus}


def start_of(name: str) -> dict[str, float]:
    """Where a fit begins: the bare datasheet."""
    return unknowns_of(Efficiencies.of_datasheet(gpu(name)))


def _row(name: str, fitted: Mapping[str, Mapping[str, float]], own: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    values, origins = {}, {}
    for unknown in (*SHARES, *FIXED):
        origin = name if unknown in own.get(name, ()) else BORROWED[name][unknown]
        value = fitted[origin][unknown]
        values[unknown] = float(f"{1 / value if unknown in SHARES else value:.4g}")
        origins[unknown] = origin
    return {"values": values | {"knee": KNEE}, "from": origins}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write under a temporary name and rename, so that no half file is ever seen.

    Raises InputError where the folder or disk refuses.
    """
    text = "# Generated by `python -m systems.common.hardware.fit`: do not edit. docs/hardware.md explains it.\n"
    text += yaml.safe_dump(dict(content), sort_keys=False, width=128)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(path, "file", str(error), "choose a file in a folder that can be written") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, write, and say how large the held-out errors are."""
    parser = argparse.ArgumentParser(description="Fit roofline efficiencies on published operator tables.")
    parser.add_argument("--mirror", type=Path, required=True, help="folder of the data files")
    parser.add_argument("--out", type=Path, default=FILE, help="YAML file to write")
    options = parser.parse_args(arguments)
    try:
        content = fit_all(options.mirror)
        _write(options.out, content)
        for measured in measured_sets(options.mirror):
            error = summary(measured.observations, held_out_errors(measured, start_of(measured.gpu)))
            said = f"held-out error median {error.median:.1%}, p90 {error.p90:.1%}, signed {error.signed:+.1%}"
            print(f"{measured.gpu}: {error.points} points, {said}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
