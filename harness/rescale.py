"""Moves a figure to other hardware than the paper's (`config: hardware`), by two kinds of factor found with serving alone.

* Request rates by the ratio of the saturation rates: the highest rates that either testbed sustains.
* Latency limits by the ratios of the unloaded latencies.

A rate counts as sustained while the metrics in `within` hold; on the new testbed these move with their own latency
factors. Both saturation rates are found by the same search as every knob. The trials are kept like all others.

Where a figure is measured on a GPU for which the simulator is calibrated, the factors are the simulator's, and one measured
run at the saturation rate that it found says how far it was right; on other GPUs the search itself is measured.

    python -m harness.rescale --figure figures/<system>/<figure>.yaml --results DIR --config-json '{"hardware": "h100x2"}'
        [--datasets NAME.json...] --out rescale.json

What is found is printed, written to rescale.json, and said under every figure that it moved.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import cli
from harness.atomic import write_atomically
from harness.code_version import calibrations
from harness.config import Config, config_from_json
from harness.figure_file import Factor, FigureFile, Level, RescaleRules, load_figure, system_of, without_nulls
from harness.manifest import Manifest, read_manifests
from harness.orphans import end_with_parent
from harness.reference import Reference
from harness.search import Answer, Knob, Probe, SearchSpace, propose
from harness.trials import TrialStore, store_of
from systems.registry import InputError, Scalar, Trial

TOLERANCE = 0.02
COARSE: Mapping[str, Any] = {"tolerance": 0.1, "repeats": 1, "budget": 10}
"""The search for a saturation rate where every probe costs a GPU the length of its workload."""
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Moved:
    """The way from one testbed to another: what was found on each, and the factors, new / paper."""

    testbed: str
    hardware: str
    saturation_rps: tuple[float, float]
    unloaded: Mapping[str, tuple[float, float]]
    how: str = ""
    """How the numbers of the new testbed were found, where not by the figure's own backend."""

    @property
    def rate_factor(self) -> float:
        """What request rates are multiplied by."""
        return self.saturation_rps[1] / self.saturation_rps[0]

    def latency_factor(self, limit: str) -> float:
        """What the limit on this metric is multiplied by; 1 where the figure does not rescale it."""
        before, after = self.unloaded.get(limit, (1.0, 1.0))
        return after / before

    def __str__(self) -> str:
        before, after = self.saturation_rps
        latencies = [f"{name} x {self.latency_factor(name):.3g}" for name in self.unloaded]
        rates = f"rates x {self.rate_factor:.3g} (saturation {before:.3g} to {after:.3g} req/s)"
        how = f"; {self.how}" if self.how else ""
        return f"rescaled from {self.testbed}: {', '.join([rates, *latencies])}{how}"


@dataclass(frozen=True, slots=True)
class Finder:
    """Runs serving alone on either testbed."""

    path: Path
    figure: FigureFile
    rules: RescaleRules
    config: Config
    datasets: Mapping[str, Manifest]
    store: TrialStore

    def find(self) -> Moved:
        """The way from the paper's testbed to the configured one.

        Raises:
            InputError: a testbed holds the limits at every rate from `low` to `high`, or at none.
        """
        before, after = self.figure.testbed, self.config.testbed(self.figure.testbed)
        foreseen = self.foreseen()
        if foreseen and is_calibrated(after):
            return self.checked(foreseen)
        low = self.rules.low * (foreseen.rate_factor if foreseen else 1.0)  # more requests in as short a run
        old, new = self._unloaded(before, self.rules.low), self._unloaded(after, low)
        unloaded = {limit: (old[limit], new[limit]) for limit in self.rules.latencies}
        for limit, pair in unloaded.items():
            if not all(math.isfinite(latency) and latency > 0 for latency in pair):
                name = self.rules.latencies[limit]
                raise InputError(self.path, f"rescale.latencies.{limit}", name, f"is {pair} there: choose another metric")
        at = Moved(before, after, (1.0, 1.0), unloaded)
        limits = {name: value * at.latency_factor(name) for name, value in self.rules.within.items()}
        start = foreseen.saturation_rps[1] if foreseen else None
        rates = self._saturation(before, self.rules.within), self._saturation(after, limits, start)
        return Moved(before, after, rates, unloaded)

    def foreseen(self) -> Moved | None:
        """Where it is measured: what the simulator finds, if it knows the hardware."""
        if self.config.backend != "measured":
            return None
        try:
            found = replace(self, config=self.config.model_copy(update={"backend": "simulated"})).find()
        except InputError as error:
            cli.say(f"no hint from the simulator: {error}")
            return None
        return replace(found, how="both simulated")

    def checked(self, foreseen: Moved) -> Moved:
        """`foreseen`, with what a measured run at its saturation rate says of it."""
        rate_rps = foreseen.saturation_rps[1]
        metrics = self._run(foreseen.hardware, rate_rps, 0)
        limits = {name: value * foreseen.latency_factor(name) for name, value in self.rules.within.items()}
        said = [f"{name} {self._number(metrics, name, 'within'):.3g} (limit {limit:.3g})" for name, limit in limits.items()]
        how = f"both simulated, on {foreseen.hardware} as calibrated; measured there at {rate_rps:.3g} req/s: {', '.join(said)}"
        return replace(foreseen, how=how)

    def _unloaded(self, testbed: str, rate_rps: float) -> dict[str, float]:
        metrics = self._run(testbed, rate_rps, 0)
        return {limit: self._number(metrics, name, "latencies") for limit, name in self.rules.latencies.items()}

    def backend(self, testbed: str) -> str:
        """What runs on `testbed`: the paper's own is at hand only as a cost model."""
        return self.config.backend if testbed == self.config.testbed(self.figure.testbed) else "simulated"

    def _saturation(self, testbed: str, limits: Mapping[str, float], start: float | None = None) -> float:
        """The highest rate, requests/s, at which all `limits` hold on `testbed`; the search may begin at `start`."""
        rate = Knob(low=self.rules.low, high=self.rules.high, start=start)
        coarse = COARSE if self.backend(testbed) == "measured" else {"tolerance": TOLERANCE}
        space = SearchSpace(maximise=self.rules.rate, limits=limits, knobs={self.rules.rate: rate}, **coarse)
        answers: list[Answer] = []
        while isinstance(step := propose(space, answers), Probe):
            metrics = self._run(testbed, step.knobs[self.rules.rate], step.seed)
            found = {name: self._number(metrics, name, "within") for name in limits}
            answers.append(Answer(step, step.knobs[self.rules.rate], found))
        if step.knobs is None:
            raise InputError(self.path, "rescale.low", self.rules.low, f"{testbed} does not even sustain this rate: lower it")
        if step.outcome == "no limit in range":
            raise InputError(self.path, "rescale.high", self.rules.high, f"{testbed} sustains even this rate: raise it")
        return step.knobs[self.rules.rate]

    def _run(self, testbed: str, rate_rps: float, seed: int) -> Mapping[str, Scalar]:
        backend = self.backend(testbed)
        smoke = self.figure.smoke.parameters if self.config.scale == "smoke" else {}
        given = self.figure.on(backend).parameters
        checking = self.rules.measured if backend == "measured" else {}
        trial = Trial(
            system=system_of(self.path),
            experiment=self.rules.experiment,
            parameters=without_nulls({**given, **smoke, **self.rules.parameters, **checking, self.rules.rate: rate_rps}),
            hardware=testbed,
            backend=backend,
            seed=self.config.seed + seed,
            datasets={name: found.path for name, found in self.datasets.items()},
        )
        return self.store.run(trial, f"{self.path}: rescale at {self.rules.rate}={rate_rps:g} on {testbed}").metrics

    def _number(self, metrics: Mapping[str, Scalar], name: str, key: str) -> float:
        value = metrics.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(self.path, f"rescale.{key}", name, f"is no number there: use one of {', '.join(sorted(metrics))}")
        return float(value)


def rescaled(figure: FigureFile, factors: Path | None) -> FigureFile:
    """`figure` on the hardware that the file `factors` moves it to; itself where there is no such file.

    What the paper printed belongs to the paper's hardware, and so do its claims: neither is kept.
    """
    if factors is None or figure.rescale is None:
        return figure
    moved, rates, search = read(factors), figure.rescale.rates, figure.search
    times = {name: moved.latency_factor(metric) for metric, name in figure.limits_from.items()}
    times |= dict.fromkeys(rates, moved.rate_factor)
    levels = {name: _rescaled(factor, times[name]) if name in times else factor for name, factor in figure.factors.items()}
    fixed = {name: _times(value, moved.rate_factor) for name, value in figure.parameters.items() if name in rates}
    if search:
        limits = {name: _times(limit, moved.latency_factor(name)) for name, limit in search.limits.items()}
        search = search.model_copy(update={"limits": limits})
    told: dict[str, Any] = {"factors": levels, "parameters": {**figure.parameters, **fixed}, "search": search}
    return figure.model_copy(update={**told, "published": [], "claims": []})


def _rescaled(factor: Factor, times: float) -> Factor:
    levels = [Level(value=_times(level.value, times), set=level.set) for level in factor.levels]
    smoke = None if factor.smoke is None else [_times(value, times) for value in factor.smoke]
    return factor.model_copy(update={"levels": levels, "smoke": smoke})


def _times(value: Any, factor: float) -> Any:  # noqa: ANN401
    """A number times `factor`, to a few digits, for it is read by people; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return float(f"{value * factor:.{DIGITS}g}")


def note(factors: Path | None) -> tuple[str, ...]:
    """What a figure's footer says of the factors in this file."""
    return () if factors is None else (str(read(factors)),)


def read(path: Path) -> Moved:
    """The factors in the file `path`. Raises InputError when it is not what `main` wrote."""
    try:
        told = json.loads(path.read_bytes())
        unloaded = {name: (float(before), float(after)) for name, (before, after) in told["unloaded"].items()}
        before, after = map(float, told["saturation_rps"])
        return Moved(told["testbed"], told["hardware"], (before, after), unloaded, told.get("how", ""))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(path, "rescale", str(error), "delete this file: the next run writes it again") from error


def write(moved: Moved, path: Path) -> None:
    """Put the factors into the file `path`, for `read`."""
    factors = {"rates": moved.rate_factor, "limits": {name: moved.latency_factor(name) for name in moved.unloaded}}
    write_atomically(path, json.dumps({**asdict(moved), "factors": factors}, indent=1) + "\n")


def is_calibrated(testbed: str) -> bool:
    """Whether the simulator has anything that was measured on the GPU of `testbed`."""
    return any(folder.startswith(f"reference/{testbed.rpartition('x')[0]}/") for folder in calibrations())


def main(argv: Sequence[str] | None = None) -> int:
    """Find the factors of one figure."""
    parser = argparse.ArgumentParser(prog="python -m harness.rescale")
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="trials go into its folder `trials`")
    parser.add_argument("--config-json", default="{}", help="keys of config/config.yaml that differ from their default")
    parser.add_argument("--datasets", type=Path, nargs="*", default=[], help="manifests of the figure's datasets")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    end_with_parent()
    figure, config, datasets = load_figure(args.figure), config_from_json(args.config_json), read_manifests(args.datasets)
    if config.backend == "recorded":
        reference = Reference.of(system_of(args.figure), args.figure.stem, config.testbed(figure.testbed))
        write_atomically(args.out, reference.rescale.read_bytes())
        return 0
    if figure.rescale is None:
        raise InputError(args.figure, "rescale", None, "say here how to rescale it")
    moved = Finder(args.figure, figure, figure.rescale, config, datasets, store_of(args.results, config, datasets)).find()
    if not all(
        math.isfinite(factor) and factor > 0 for factor in (moved.rate_factor, *map(moved.latency_factor, moved.unloaded))
    ):
        raise InputError(args.figure, "rescale", str(moved), "gives factors that are no positive numbers: choose other metrics")
    cli.say(f"{args.figure}: {moved}")
    write(moved, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
