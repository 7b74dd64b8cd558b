"""One series of a figure: a knob search at every point, and a parquet file with a row per point.

    python -m harness.series --figure figures/<system>/<figure>.yaml --series NAME --results DIR
        --config-json '{"seed": 0}' [--datasets NAME.json...] --out NAME.parquet

Beside the parquet file grow `NAME.history.jsonl`, every probe that was answered, and `NAME.key`, what the history
belongs to. A run that was killed replays its history and asks the next question; trials that have run are never run
again. When the figure file, the code, a dataset or the seed has changed since, the search starts over (from the
trials that still are the same). Two runs of one series wait for each other; a run whose parent dies ends.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import cli
from harness.atomic import write_atomically
from harness.code_version import code_version, executing_version, system_version
from harness.config import Config, config_from_json
from harness.figure_file import FigureFile, Point, load_figure, system_of
from harness.hint import Hint, hint, saved
from harness.leftovers import sweep
from harness.manifest import Manifest, read_manifests
from harness.orphans import end_with_parent
from harness.progress import Progress
from harness.reference import Reference
from harness.rescale import note, rescaled
from harness.rows import About, Row, write_rows
from harness.runlock import waiting_for
from harness.search import Answer, Entry, History, Probe, SearchSpace, Verdict, propose, violation
from harness.trials import STAND_IN, Ran, TrialStore, canonical, store_of
from harness.validation import suggest
from systems.registry import InputError, Scalar, Trial


@dataclass(frozen=True, slots=True)
class Job:
    """A series of a figure and what it runs under."""

    path: Path
    figure: FigureFile
    series: str
    config: Config
    datasets: Mapping[str, Manifest]
    store: TrialStore
    notes: tuple[str, ...] = ()
    hints: dict[str, Hint] = field(default_factory=dict)
    """On the measured backend, what the simulator found, by point."""

    @property
    def hardware(self) -> str:
        """The testbed that the trials run on."""
        return self.config.testbed(self.figure.testbed)

    @property
    def space(self) -> SearchSpace:
        """What the search may do; without a search in the figure, one trial."""
        return self.figure.space(self.series) or SearchSpace(maximise=self.figure.objective)

    def points(self) -> list[Point]:
        """The points of the series at this scale."""
        return self.figure.points(self.series, smoke=self.config.scale == "smoke")

    def space_at(self, point: Point) -> SearchSpace:
        """The space of the search at `point`: on the measured backend it starts where the simulator's search ends."""
        space = self.figure.space(self.series, point.at) or self.space
        if self.config.backend != "measured" or not space.knobs or "simulated" not in self.figure.backends:
            return space
        name = canonical(dict(point.at))
        if name not in self.hints:
            self.hints[name] = self._simulated(point, space)
        return self.hints[name].on(space)

    def _simulated(self, point: Point, space: SearchSpace) -> Hint:
        """The same search at the same point on the simulator; nothing where it does not know the hardware."""
        simulated = replace(self, config=self.config.model_copy(update={"backend": "simulated"}))
        fine = load_figure(self.path).search
        assert fine is not None, "a figure with knobs has a search"
        try:
            return hint(
                space, fine, lambda probe: _answer(simulated, space, probe, _run_trial(simulated, point, probe).metrics)
            )
        except InputError as error:
            cli.say(f"no hint from the simulator: {error}")
            return Hint(None, 0)

    def trial(self, point: Point, probe: Probe) -> Trial:
        """The trial that answers `probe` at `point`."""
        return Trial(
            system=system_of(self.path),
            experiment=self.figure.experiment,
            parameters={**point.parameters, **probe.knobs},
            hardware=self.hardware,
            backend=self.config.backend,
            seed=self.config.seed + probe.seed,
            datasets={name: found.path for name, found in self.datasets.items()},
        )

    def key(self) -> str:
        """Everything that the questions and the answers of this series depend on."""
        checksums = {name: found.sha256 or STAND_IN for name, found in self.datasets.items()}
        told = {
            "search": self.space.model_dump(mode="json"),
            **({"judging": [dict(self.figure.limits_from), self.figure.target_from]} if self.figure.judging else {}),
            "points": [{"at": dict(point.at), "parameters": dict(point.parameters)} for point in self.points()],
            "experiment": [system_of(self.path), self.figure.experiment, self.hardware, self.config.backend],
            "objective": self.figure.objective,
            "seed": self.config.seed,
            "datasets": checksums,
            "code": [
                system_version(system_of(self.path)),
                code_version("harness/search"),
                *executing_version(self.config.backend),
            ],
        }
        return canonical(told) + "\n"


def run(job: Job, out: Path) -> list[Row]:
    """Search every point of `job`, from where its history ends; one row per point.

    Raises:
        InputError: an experiment refuses its parameters, or a metric that the figure names is not there.
    """
    history = history_of(job, out)
    points = job.points()
    progress = Progress(f"{system_of(job.path)}/{job.path.stem} {job.series}", len(points))
    return [_search(Search.of(job, point, history), progress) for point in points]


def history_of(job: Job, out: Path) -> History:
    """The history beside `out`, emptied when it belongs to something else than `job`."""
    path, key = out.with_suffix(".history.jsonl"), out.with_suffix(".key")
    belongs_to = key.read_text(encoding="utf-8") if key.exists() else None
    if belongs_to != job.key():
        if path.exists():
            cli.say(f"{path}: what it depends on has changed: searching anew")
        path.unlink(missing_ok=True)
        write_atomically(key, job.key())
    return History(path)


@dataclass(frozen=True, slots=True)
class Search:
    """The search at one point of a series, probe by probe."""

    job: Job
    point: Point
    history: History
    space: SearchSpace
    answers: list[Answer]

    @classmethod
    def of(cls, job: Job, point: Point, history: History) -> Search:
        """The search at `point`, from where `history` ends."""
        space = job.space_at(point)
        return cls(job, point, history, space, history.replay(point.at, space))

    @property
    def step(self) -> Probe | Verdict:
        """The next question, or how it ended."""
        return _propose(self.job, self.space, self.answers)

    def ask(self, probe: Probe) -> None:
        """Run the trial of the next question."""
        ran = _run_trial(self.job, self.point, probe)
        answer = _answer(self.job, self.space, probe, ran.metrics)
        self.history.append(self.point.at, answer, ran.hash)
        self.answers.append(answer)

    @property
    def best(self) -> float | None:
        """The best objective within the limits so far."""
        return max((answer.objective for answer in self.answers if violation(answer, self.space) <= 0), default=None)

    def row(self) -> Row | None:
        """The point of the table: what has been found so far, if anything was asked."""
        if not self.answers:
            return None
        step = self.step
        if isinstance(step, Probe):  # cut short: judged as if no more probes had been granted
            step = _propose(self.job, self.space.model_copy(update={"budget": len(self.answers)}), self.answers)
        assert isinstance(step, Verdict)
        return _row(self.job, self.point, step, len(self.answers))


def _search(search: Search, progress: Progress) -> Row:
    at = search.point.at
    while isinstance(step := search.step, Probe):
        search.ask(step)
        progress.probe(at, search.best)
    progress.point(at, step.objective if step.feasible else None)
    return _row(search.job, search.point, step, len(search.answers))


def _run_trial(job: Job, point: Point, probe: Probe) -> Ran:
    at = ", ".join(f"{name}={value}" for name, value in {**point.at, **probe.knobs}.items())
    return job.store.run(job.trial(point, probe), f"{job.path}: series {job.series}{f' at {at}' if at else ''}")


def _propose(job: Job, space: SearchSpace, answers: Sequence[Answer]) -> Probe | Verdict:
    if job.figure.search:
        return propose(space, answers)
    # nothing is sought, so nothing can be missed: what the one trial gives is the answer, whatever it is
    return Verdict("single trial", {}, answers[0].objective, answers[0]) if answers else Probe({}, 0)


def _answer(job: Job, space: SearchSpace, probe: Probe, metrics: Mapping[str, Scalar]) -> Answer:
    return Answer(
        probe,
        objective=_number(job, metrics, job.figure.objective),
        metrics={name: _number(job, metrics, name) for name in space.bounds},
    )


def _number(job: Job, metrics: Mapping[str, Scalar], name: str) -> float:
    value = _metric(job, metrics, name)
    if value is None:
        return float("nan")
    if isinstance(value, str):
        raise InputError(job.path, "search", name, f"this metric is text ({value!r}): name one that is a number")
    return float(value)


def _metric(job: Job, metrics: Mapping[str, Scalar], name: str) -> Scalar:
    if name not in metrics:
        mend = f"{job.figure.experiment} has no such metric{suggest(name, sorted(metrics))}"
        raise InputError(job.path, "columns" if name in job.figure.columns else "search", name, mend)
    return metrics[name]


def _row(job: Job, point: Point, verdict: Verdict, probes: int) -> Row:
    """A point of the table. Where no setting meets the limits its metrics and knobs are absent, and so is the trial."""
    figure, chosen = job.figure, None
    if verdict.answer is not None:
        chosen = _run_trial(job, point, verdict.answer.probe)  # stored, unless somebody deleted it
    row: Row = {"series": job.series, **point.at, figure.objective: verdict.objective}
    row |= {name: _metric(job, chosen.metrics, name) if chosen else None for name in figure.columns}
    row |= {f"knob_{name}": (verdict.knobs or {}).get(name) for name in figure.knobs}
    row |= {"feasible": verdict.feasible, "outcome": verdict.outcome, "probes": probes}
    return row | {"trial": chosen.hash if chosen else None}


def about(job: Job, out: Path) -> About:
    """What stands behind the rows of `job`: everything that its trials, the rejected ones too, say of themselves."""
    entries = History(out.with_suffix(".history.jsonl")).entries()
    trials = sorted({entry.trial for entry in entries})
    found = [origin for origin in map(job.store.provenance, trials) if origin is not None]
    return About(
        hardware=[job.hardware],
        backends=[job.config.backend],
        scales=[job.config.scale],
        seeds=[job.config.seed],
        commits=sorted({_commit(origin) for origin in found}),
        datasets=sorted(name for name, manifest in job.datasets.items() if manifest.path),
        stand_ins=sorted(name for name, manifest in job.datasets.items() if not manifest.path),
        notes=sorted({*job.notes, *(note for origin in found for note in origin["notes"]), *_spent(job, entries, found)}),
        trials=trials,
    )


def _spent(job: Job, entries: Sequence[Entry], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What measuring cost, and what the simulator's choice of where to begin saved."""
    if job.config.backend != "measured":
        return []
    probes = Counter(canonical(dict(entry.point)) for entry in entries)
    return [f"{job.series}: {saved(job.hints, probes, sum(origin['duration_s'] for origin in found))}"]


def _commit(origin: Mapping[str, Any]) -> str:
    changed = "+" if origin["dirty"] is True else ""
    return f"{origin['commit'][:10]}{changed}"


def _job(args: argparse.Namespace) -> Job:
    config = config_from_json(args.config_json)
    figure = rescaled(load_figure(args.figure).on(config.backend), args.rescale)
    if args.series not in [series.name for series in figure.series]:
        mend = f"no such series{suggest(args.series, [series.name for series in figure.series])}"
        raise InputError(args.figure, "series", args.series, mend)
    datasets = read_manifests(args.datasets)
    notes = note(args.rescale)
    return Job(args.figure, figure, args.series, config, datasets, store_of(args.results, config, datasets), notes)


def _show(job: Job, out: Path) -> None:
    """The series as it was recorded, with its history."""
    reference = Reference.of(system_of(job.path), job.path.stem, job.hardware)
    write_rows(out, *reference.rows(job.series, job.hardware))
    if reference.history(job.series).is_file():
        write_atomically(out.with_suffix(".history.jsonl"), reference.history(job.series).read_bytes())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one series."""
    parser = argparse.ArgumentParser(prog="python -m harness.series")
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--series", required=True)
    parser.add_argument("--results", type=Path, required=True, help="trials go into its folder `trials`")
    parser.add_argument("--config-json", default="{}", help="keys of config/config.yaml that differ from their default")
    parser.add_argument("--datasets", type=Path, nargs="*", default=[], help="manifests of the figure's datasets")
    parser.add_argument("--rescale", type=Path, nargs="?", help="rescale.json, on other hardware than the paper's")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    end_with_parent()
    job = _job(args)
    with waiting_for(args.out.with_suffix(".lock"), cli.say):
        sweep(job.store.folder)
        sweep(args.out.parent)
        if job.config.backend == "recorded":
            _show(job, args.out)
        else:
            rows = run(job, args.out)
            write_rows(args.out, rows, about(job, args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
