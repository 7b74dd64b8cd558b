"""Measures several figures in one process and in a given time, without Snakemake: for a GPU that is lent by the minute.

    python -m harness.measure_figures --figures llmstation/fig8a,llmstation/fig4 --config-json '{"hardware": "h200x1"}'
        --limit-s 420 --out DIR [--pack FILE.tar.gz] [--plan]

The same searches, trials and files as `snakemake <figure> --config backend=measured` gives, under DIR instead of `results`;
what belongs to the figures is also packed into FILE, to be unpacked into `results` for `python -m harness.record`. What one
trial has started (model, graphs, processes) the next one uses, of whatever figure.

`--figures` says the order: `fig8a` is every point of a figure that is not done yet, `fig8a@2` its second one, `check` the
measured runs that check how the simulator moved the figures. At a point the series take turns, probe by probe. No trial
begins that may not end within the limit; every trial is kept when it ends, and the same command goes on where this one
stopped. A search that ran out of time stands in the tables as far as it got, if it found anything within the limits.

`--plan` does all that needs no GPU: factors, and where the simulator says to begin. On the GPU's machine DIR then brings it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import cli
from harness.atomic import make_folder, temporary_beside, write_atomically, writing
from harness.config import Config, config_from_json
from harness.datasets import default_cache, resolve
from harness.figure_file import FigureFile, load_figure, system_of
from harness.hint import Hint
from harness.manifest import Manifest, read_manifests
from harness.rescale import Finder, is_calibrated, note, rescaled
from harness.rescale import read as read_factors
from harness.rescale import write as write_factors
from harness.rows import Row, write_rows
from harness.search import Probe
from harness.series import Job, Search, about, history_of
from harness.table import as_csv, columns
from harness.trials import hash_of, store_of
from harness.worker import Fault, WorkedStore, Worker
from systems.registry import InputError, Trial

FIGURES = Path("figures")
CHECK = "check"
FIRST_S = 25.0
"""What the first trial is taken to need; the later ones of a figure what its longest one needed."""
HANGS_S = 75.0
"""A trial that says nothing for so long beyond what is expected of it hangs."""
FAULTS = 2
"""So many faults of a series, at whatever points and figures, end it: each costs a start of everything."""
PACK_S = 8.0


@dataclass(slots=True)
class Place:
    """One point of one series: its search, and why it was given up, if it was."""

    search: Search
    refused: str = ""

    @property
    def is_open(self) -> bool:
        """Whether there is anything left to ask."""
        return not self.refused and isinstance(self.search.step, Probe)


@dataclass(slots=True)
class Measured:
    """A figure under measurement.

    Attributes:
        path: its file.
        run: its folder of results.
        jobs: its series.
        rounds: its points, each with a place per series.
    """

    path: Path
    run: Path
    original: FigureFile
    figure: FigureFile
    jobs: list[Job]
    rounds: list[list[Place]]

    @property
    def name(self) -> str:
        """Such as `llmstation/fig8a`."""
        return f"{self.path.parent.name}/{self.path.stem}"

    def rows(self, series: str) -> list[Row]:
        """What there is of a series."""
        places = [place for places in self.rounds for place in places if place.search.job.series == series]
        return [row for row in (place.search.row() for place in places) if row is not None]

    def write(self) -> None:
        """Series and table as far as they go. Without a row of every series there is no table."""
        tables = [(job, self.rows(job.series)) for job in self.jobs]
        for job, rows in tables:
            if rows:
                out = self.out(job.series)
                write_rows(out, rows, about(job, out))
        if all(rows for _, rows in tables):
            rows = [row for _, rows in tables for row in rows]
            write_atomically(self.run / "table.csv", as_csv(rows, columns(self.figure)))

    def out(self, series: str) -> Path:
        """The parquet file of a series."""
        return self.run / "series" / f"{series}.parquet"


class Measuring:
    """All of it: what is asked for, what has been found, and the time that is left."""

    def __init__(self, config: Config, out: Path, limit_s: float, pack: Path | None) -> None:
        self.config, self.out, self.limit_s, self.pack_file = config, out, limit_s, pack
        self.began = time.monotonic()
        self._packed_s = 0.0
        self.longest_s: dict[str, float] = {}
        self.faults: Counter[str] = Counter()
        self.log: list[dict[str, Any]] = []
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        self._earlier: list[dict[str, Any]] = _read_log(self._log_file)
        self.figures: dict[str, Measured] = {}
        self.manifests: dict[str, Path] = {}
        self.worker: Worker | None = None

    @property
    def _log_file(self) -> Path:
        return self.out / self.config.run_name / "measured.json"

    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.limit_s - (time.monotonic() - self.began)

    # ---- what needs no GPU

    def plan(self, names: Sequence[str]) -> None:
        """Datasets, factors, and where each search begins, of the figures `names` (such as `llmstation/fig8a`)."""
        files = {name: load_figure(FIGURES / f"{name}.yaml") for name in names}
        for dataset in sorted({dataset for figure in files.values() for dataset in figure.datasets}):
            self.manifests[dataset] = self._manifest(dataset)
        self.worker = Worker(self.out, self.config.model_dump_json(), list(self.manifests.values()))
        for name, figure in files.items():
            self.figures[name] = self._measured(FIGURES / f"{name}.yaml", figure)
            cli.say(f"{name}: {len(self.figures[name].rounds)} points, {len(figure.series)} series")

    def _manifest(self, name: str) -> Path:
        found = resolve(name, self.config.mirror, default_cache(), self.config.offline)
        told = {**asdict(found), "path": None if found.path is None else str(found.path.resolve())}
        path = self.out / "datasets" / f"{name}.json"
        write_atomically(path, json.dumps(told, indent=1) + "\n")
        return path

    def _measured(self, path: Path, file: FigureFile) -> Measured:
        run = self.out / self.config.run_name / system_of(path) / path.stem
        datasets = read_manifests(self.manifests[name] for name in file.datasets)
        factors = self._factors(path, file, run, datasets)
        figure = rescaled(file.on("measured"), factors)
        store = store_of(self.out, self.config, datasets)
        worked = WorkedStore(store.folder, store.checksums, store.config)
        hints = _read_hints(run / "hints.json")
        jobs = [
            Job(path, figure, one.name, self.config, datasets, worked, note(factors), hints.setdefault(one.name, {}))
            for one in figure.series
        ]
        make_folder(run / "series")
        histories = {job.series: history_of(job, run / "series" / f"{job.series}.parquet") for job in jobs}
        points = [job.points() for job in jobs]
        rounds = [
            [Place(Search.of(job, at, histories[job.series])) for job, at in zip(jobs, row, strict=True)]
            for row in zip(*points, strict=True)
        ]
        _write_hints(run / "hints.json", {job.series: job.hints for job in jobs})
        return Measured(path, run, file, figure, jobs, rounds)

    def _factors(self, path: Path, figure: FigureFile, run: Path, datasets: Mapping[str, Manifest]) -> Path | None:
        """`rescale.json` of a figure, found now if it is not there; None for a figure that needs none."""
        if self.config.hardware == "paper" or figure.portable or figure.rescale is None:
            return None
        file = run / "rescale.json"
        if not file.exists():
            finder = self._finder(path, figure, datasets)
            foreseen = finder.foreseen() if is_calibrated(self.config.testbed(figure.testbed)) else None
            write_factors(foreseen or finder.find(), file)
        return file

    def _finder(self, path: Path, figure: FigureFile, datasets: Mapping[str, Manifest]) -> Finder:
        assert figure.rescale is not None
        return Finder(path, figure, figure.rescale, self.config, datasets, self._store(datasets, FIRST_S))

    # ---- what does

    def _store(self, datasets: Mapping[str, Manifest], expected_s: float) -> WorkedStore:
        store = store_of(self.out, self.config, datasets)
        limit_s = max(1.0, min(expected_s + HANGS_S, self.left_s() + expected_s / 2))
        return WorkedStore(store.folder, store.checksums, store.config, self.worker, limit_s)

    def measure(self, asked: Sequence[tuple[str, int | None]]) -> None:
        """Work through `asked`, figures and points, until all is done or the time is up."""
        assert self.worker is not None, "plan first"
        try:
            self.worker.prepare(list(self._first_trials(asked)))
            for name, point in asked:
                if name == CHECK:
                    self._check()
                else:
                    figure = self.figures[name]
                    self._figure(figure, figure.rounds if point is None else figure.rounds[point - 1 : point])
            self._use_stored()
        finally:
            self._finish()

    def close(self) -> None:
        """End the process that measures."""
        if self.worker is not None:
            self.worker.close(patience_s=10.0)

    def _first_trials(self, asked: Sequence[tuple[str, int | None]]) -> Iterator[Trial]:
        """The first question of every search, in the order in which they come."""
        for name, point in asked:
            for places in [] if name == CHECK else self.figures[name].rounds[slice(point and point - 1, point)]:
                for place in places:
                    if isinstance(step := place.search.step, Probe):
                        yield place.search.job.trial(place.search.point, step)

    def _figure(self, figure: Measured, rounds: Sequence[Sequence[Place]]) -> None:
        for places in rounds:
            while turn := [place for place in places if place.is_open]:
                for place in turn:
                    if self.faults[place.search.job.series] >= FAULTS:
                        place.refused = "too many faults"
                    elif not self._ask(figure, place):
                        return

    def _ask(self, figure: Measured, place: Place) -> bool:
        """One probe; False where there is no time for it."""
        expected_s = 0.0 if self._is_stored(place) else self.longest_s.get(figure.name, FIRST_S)
        if self.left_s() < expected_s:
            cli.say(f"{figure.name}: {self.left_s():.0f} s left, {expected_s:.0f} s needed: not begun")
            return False
        search, probe = place.search, place.search.step
        assert isinstance(probe, Probe)
        job = search.job
        search = replace(search, job=replace(job, store=self._store(job.datasets, expected_s)))
        began = time.monotonic()
        told: dict[str, Any] = {"figure": figure.name, "series": job.series, "at": dict(search.point.at), **probe.knobs}
        try:
            search.ask(probe)
        except InputError as error:
            place.refused = told["refused"] = str(error)
        except Fault as error:
            told["fault"] = str(error)
            self.faults[job.series] += 1
        else:
            answer = search.answers[-1]
            told |= {"objective": answer.objective, **answer.metrics}
        took_s = time.monotonic() - began
        if "objective" in told and expected_s and len(self.log) > 0:  # the first one starts everything
            self.longest_s[figure.name] = max(self.longest_s.get(figure.name, 0.0), took_s)
        self._note({**told, "took_s": round(took_s, 1), "until_s": round(time.monotonic() - self.began, 1)})
        figure.write()
        self._pack()
        return True

    def _is_stored(self, place: Place) -> bool:
        """Whether the next question of this search was answered for another one."""
        search, probe = place.search, place.search.step
        if not isinstance(probe, Probe):
            return False
        store = search.job.store
        return store.metrics(hash_of(store.spec(search.job.trial(search.point, probe)))) is not None

    def _use_stored(self) -> None:
        """Go on with every search as far as trials that were run for others take it."""
        for figure in self.figures.values():
            for place in (place for places in figure.rounds for place in places):
                while place.is_open and self._is_stored(place):
                    self._ask(figure, place)

    def _check(self) -> None:
        """Measure at the saturation rates that the simulator found, and say so in the factors' files."""
        for figure in self.figures.values():
            file = figure.run / "rescale.json"
            if not file.exists() or "measured there" in (found := read_factors(file)).how:
                continue
            if self.left_s() < FIRST_S:
                return
            began = time.monotonic()
            try:
                finder = self._finder(figure.path, figure.original, figure.jobs[0].datasets)
                write_factors(finder.checked(found), file)
            except (InputError, Fault) as error:
                self._note({"figure": figure.name, "check": str(error), "took_s": round(time.monotonic() - began, 1)})
                continue
            for places in figure.rounds:
                for place in places:
                    place.search = replace(place.search, job=replace(place.search.job, notes=note(file)))
            figure.jobs = [replace(job, notes=note(file)) for job in figure.jobs]
            self._note({"figure": figure.name, "check": note(file)[0], "took_s": round(time.monotonic() - began, 1)})

    # ---- what is kept

    def _note(self, told: dict[str, Any]) -> None:
        self.log.append({"session": self.since, **told})
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in told.items()}
        cli.say(", ".join(f"{key} {value}" for key, value in shown.items()))

    def _finish(self) -> None:
        for figure in self.figures.values():
            figure.write()
            done = sum(not place.is_open and not place.refused for places in figure.rounds for place in places)
            cli.say(f"{figure.name}: {done} of {sum(map(len, figure.rounds))} searches done")
        self._pack(always=True)
        cli.say(f"{len(self.log)} trials in {time.monotonic() - self.began:.0f} s")

    def _pack(self, always: bool = False) -> None:
        """Put what belongs to the figures into one file: their folders, their trials, and the log of this session."""
        run = self.out / self.config.run_name
        if self.log:
            write_atomically(self._log_file, json.dumps([*self._earlier, *self.log], indent=1, default=str) + "\n")
        if self.pack_file is None or (not always and time.monotonic() - self._packed_s < PACK_S):
            return
        temporary = temporary_beside(self.pack_file)
        with writing(self.pack_file), contextlib.ExitStack() as undo:
            make_folder(self.pack_file.parent)
            undo.callback(temporary.unlink, missing_ok=True)
            with tarfile.open(temporary, "w:gz", compresslevel=1) as archive:
                if run.exists():
                    archive.add(run, self.config.run_name)
                for trial in sorted(self._trials()):
                    archive.add(self.out / "trials" / trial, f"trials/{trial}")
            temporary.replace(self.pack_file)
        self._packed_s = time.monotonic()

    def _trials(self) -> Iterator[str]:
        """Measured trials under `out`."""
        for spec in self.out.glob("trials/*/spec.json"):
            if json.loads(spec.read_bytes())["backend"] == "measured":
                yield spec.parent.name


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The trials of earlier sessions."""
    return list(json.loads(path.read_bytes())) if path.exists() else []


def _read_hints(path: Path) -> dict[str, dict[str, Hint]]:
    if not path.exists():
        return {}
    told = json.loads(path.read_bytes())
    return {series: {at: Hint(**hint) for at, hint in hints.items()} for series, hints in told.items()}


def _write_hints(path: Path, hints: Mapping[str, Mapping[str, Hint]]) -> None:
    told = {series: {at: asdict(hint) for at, hint in found.items()} for series, found in hints.items()}
    write_atomically(path, json.dumps(told, indent=1) + "\n")


def _asked(text: str) -> list[tuple[str, int | None]]:
    """What `--figures` says: names with the number of a point or None. Raises InputError."""
    asked: list[tuple[str, int | None]] = []
    for token in filter(None, text.split(",")):
        name, at, number = token.partition("@")
        if name != CHECK and not (FIGURES / f"{name}.yaml").is_file():
            raise InputError("--figures", "name", name, "write <system>/<figure>, as under figures/")
        if at and not (number.isdigit() and int(number) > 0):
            raise InputError("--figures", name, number, "give the number of a point, from 1")
        asked.append((name, int(number) if at else None))
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Measure figures."""
    parser = argparse.ArgumentParser(prog="python -m harness.measure_figures")
    parser.add_argument("--figures", required=True, help="in the order of their importance, with commas between")
    parser.add_argument("--config-json", default="{}", help="keys of config/config.yaml that differ from their default")
    parser.add_argument("--limit-s", type=float, default=420.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pack", type=Path, help="where to put what belongs to the figures, as one .tar.gz")
    parser.add_argument("--plan", action="store_true", help="only what needs no GPU")
    args = parser.parse_args(argv)
    config = config_from_json(args.config_json).model_copy(update={"backend": "measured", "results": str(args.out)})
    asked = _asked(args.figures)
    measuring = Measuring(config, args.out, args.limit_s, args.pack)
    with contextlib.closing(measuring):
        measuring.plan(list(dict.fromkeys(name for name, _ in asked if name != CHECK)))
        for name, point in asked:
            if point is not None and name != CHECK and point > len(measuring.figures[name].rounds):
                raise InputError("--figures", name, point, f"it has {len(measuring.figures[name].rounds)} points")
        if not args.plan:
            measuring.measure(asked)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
