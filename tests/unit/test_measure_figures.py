"""Measuring several figures in one go: whose turn it is, when it ends, what is kept; the worker is one of this process."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness import figure_file, measure_figures, series, trials
from harness.config import Config
from harness.record import record
from harness.rows import read_rows
from harness.trials import TrialStore
from harness.worker import Fault, told_of, trial_of
from systems.registry import InputError, Outcome, Trial
from tests.fakes.fake.experiments import knee

FAKES = Path(__file__).resolve().parent.parent / "fakes"


class Bench:
    """A folder with a fake figure; a worker that runs in this process, on a clock of its own: a trial takes 10 s."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ran: list[Trial] = []
        self.prepared: list[Trial] = []
        self.wrong: dict[int, Exception] = {}
        """By number of the measured trial, what is raised instead."""

    def worker(self, results: Path, _config: str, _manifests: Sequence[Path]) -> Bench:
        self.store = TrialStore(results / "trials")
        return self

    def prepare(self, asked: Sequence[Trial]) -> None:
        self.prepared = list(asked)

    def run(self, trial: Trial, asked_by: str, limit_s: float) -> None:
        self.ran.append(trial)
        self.now_s += 10
        assert limit_s > 0
        if (error := self.wrong.get(len(self.ran))) is not None:
            raise error
        self.store.run(trial, asked_by)

    def close(self, patience_s: float = 0.0) -> None:
        pass

    def measure(self, figures: str = "fake/knee", limit_s: float = 1e6, pack: Path | None = None) -> int:
        options = ["--figures", figures, "--out", "out", "--limit-s", str(limit_s)]
        return measure_figures.main([*options, *(["--pack", str(pack)] if pack else [])])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    found = Bench()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures" / "fake").mkdir(parents=True)
    text = (FAKES / "knee.yaml").read_text().replace("[1, 2, 4, 1000000]", "[1, 2]").replace("smoke: [1, 4]", "smoke: [1]")
    text += "measured: {tolerance: 0.5, repeats: 1, budget: 3}\n"
    (tmp_path / "figures" / "fake" / "knee.yaml").write_text(text)
    monkeypatch.setattr(figure_file, "SYSTEMS", {"fake": "A fake"})
    monkeypatch.setattr(trials, "experiment", lambda _system, _name: _ask)
    monkeypatch.setattr(trials, "system_version", lambda _system: "v1")
    monkeypatch.setattr(series, "system_version", lambda _system: "v1")
    monkeypatch.setattr(measure_figures, "Worker", found.worker)
    monkeypatch.setattr(measure_figures.time, "monotonic", lambda: found.now_s)
    return found


def _ask(trial: Trial) -> Outcome:
    """The real thing is a tenth better than the simulator thinks."""
    better = 1.1 if trial.backend == "measured" else 1.0
    return knee(Trial(**{**told_of(trial), "parameters": {**trial.parameters, "knee": better * trial.parameters["knee"]}}))  # type: ignore[operator]


RUN = Path("out", "paper-measured", "fake", "knee")


def test_the_series_take_turns_and_the_tables_are_those_of_the_workflow(bench: Bench, tmp_path: Path) -> None:
    assert bench.measure("fake/knee@2,fake/knee") == 0
    rates = [trial.parameters["rate_rps"] for trial in bench.ran]
    assert rates == sorted(rates, reverse=True) and set(rates) == {1, 2}  # type: ignore[type-var]
    assert [trial.parameters["knee"] for trial in bench.ran[:4]] == [40, 20, 40, 20]
    assert {trial.parameters["rate_rps"] for trial in bench.prepared[:2]} == {2}
    config = '{"backend": "measured"}'
    for name in ("ours", "theirs"):
        where = ["--figure", "figures/fake/knee.yaml", "--series", name, "--results", "other", "--config-json", config]
        assert series.main([*where, "--out", f"other/{name}.parquet"]) == 0
        again, mine = read_rows(Path(f"other/{name}.parquet")), read_rows(RUN / "series" / f"{name}.parquet")
        assert again[0] == mine[0]
        assert again[1].trials == mine[1].trials
    assert (RUN / "table.csv").read_text().count("\n") == 1 + 4


def test_a_search_begins_where_the_simulator_ended(bench: Bench) -> None:
    bench.measure()
    first = {trial.parameters["knee"]: trial.parameters["knob"] for trial in bench.ran if trial.parameters["rate_rps"] == 1}
    assert first.keys() == {40, 20}
    knobs = [trial.parameters["knob"] for trial in bench.ran[:2]]
    assert knobs == pytest.approx([40, 20], rel=0.06)
    assert len(bench.ran) <= 8


def test_no_trial_begins_that_may_not_end_in_time_and_what_was_found_stands(bench: Bench) -> None:
    bench.measure(limit_s=42)
    assert len(bench.ran) == 4  # 25 s for the first, then 10 each
    before = list(bench.ran)
    rows = {name: read_rows(RUN / "series" / f"{name}.parquet")[0] for name in ("ours", "theirs")}
    assert [(row["rate_rps"], row["feasible"]) for row in rows["ours"]] == [(1, True)]
    bench.now_s = 0.0
    bench.measure()
    assert bench.ran[:4] == before
    assert len({str(trial.parameters) for trial in bench.ran}) == len(bench.ran)  # none was run twice
    assert len(read_rows(RUN / "series" / "ours.parquet")[0]) == 2
    told = json.loads((RUN.parent.parent / "measured.json").read_bytes())
    assert len(told) == len(bench.ran) and {entry["took_s"] for entry in told} == {10.0}  # of both sessions
    bench.ran.clear()
    bench.measure()
    assert bench.ran == []


def test_a_search_that_found_nothing_yet_is_no_row(bench: Bench) -> None:
    path = Path("figures/fake/knee.yaml")
    path.write_text(path.read_text() + "backends: [measured]\n")
    bench.measure(limit_s=26)
    (told,) = bench.ran
    assert told.parameters["knob"] == 1  # no simulator to ask: from the safest end
    assert len(read_rows(RUN / "series" / "ours.parquet")[0]) == 1
    assert not (RUN / "series" / "theirs.parquet").exists() and not (RUN / "table.csv").exists()


def test_faults_end_a_series_and_nothing_else(bench: Bench) -> None:
    bench.wrong = {1: Fault("its process ended with exit code 1"), 3: Fault("no answer within 9 s")}
    bench.measure()
    assert not (RUN / "series" / "ours.parquet").exists()
    assert [row["rate_rps"] for row in read_rows(RUN / "series" / "theirs.parquet")[0]] == [1, 2]


def test_what_is_refused_is_asked_once(bench: Bench) -> None:
    bench.wrong = {2: InputError("x", "y", "z", "mend it")}
    bench.measure()
    assert [row["rate_rps"] for row in read_rows(RUN / "series" / "theirs.parquet")[0]] == [2]
    assert [row["rate_rps"] for row in read_rows(RUN / "series" / "ours.parquet")[0]] == [1, 2]


def test_the_pack_is_all_that_recording_needs(bench: Bench, tmp_path: Path) -> None:
    bench.measure(pack=tmp_path / "packed" / "all.tar.gz")
    with tarfile.open(tmp_path / "packed" / "all.tar.gz") as archive:
        archive.extractall(tmp_path / "results", filter="data")
    shutil.rmtree("out")
    assert len(list((tmp_path / "results" / "trials").iterdir())) == len(bench.ran)  # those measured alone
    folder = record(Path("figures/fake/knee.yaml"), tmp_path / "results", Config(), tmp_path / "reference")
    assert (folder / "table.csv").read_text().count("\n") == 1 + 4
    with pytest.raises(InputError, match="was not measured"):
        record(Path("figures/fake/knee.yaml"), tmp_path / "nothing", Config(), tmp_path / "reference")


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ("fake/nothing", "write <system>/<figure>"),
        ("fake/knee@x", "give the number of"),
        ("fake/knee@3", "it has 2 points"),
    ],
)
def test_bad_names_are_one_line(bench: Bench, figures: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        bench.measure(figures)


def test_a_plan_measures_nothing(bench: Bench) -> None:
    assert measure_figures.main(["--figures", "fake/knee", "--out", "out", "--plan"]) == 0
    assert bench.ran == [] and (RUN / "hints.json").is_file()


def test_a_trial_goes_through_json() -> None:
    trial = Trial("fake", "knee", {"a": 1, "b": {"c": [1.5]}}, "nothingx1", "measured", 3, {"d": Path("/x"), "e": None})
    assert trial_of(told_of(trial)) == trial


def test_trials_that_another_figure_had_need_no_time(bench: Bench) -> None:
    text = Path("figures/fake/knee.yaml").read_text()
    Path("figures/fake/again.yaml").write_text(text.replace("A fake figure", "Its other panel"))
    bench.measure("fake/knee@1,fake/again", limit_s=62)
    again = RUN.parent / "again" / "series"
    ran = [str(trial.parameters) for trial in bench.ran]
    assert len(set(ran)) == len(ran) and {trial.parameters["rate_rps"] for trial in bench.ran} == {1}
    for name in ("ours", "theirs"):
        assert read_rows(again / f"{name}.parquet")[0] == read_rows(RUN / "series" / f"{name}.parquet")[0]
