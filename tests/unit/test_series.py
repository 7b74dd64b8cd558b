"""A series: its rows, how it resumes, when it starts over, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import figure_file, series, trials
from harness.progress import Progress
from harness.rows import read_rows
from systems.registry import InputError, Outcome, Trial
from tests.fakes.fake.experiments import knee

FAKES = Path(__file__).resolve().parent.parent / "fakes"


class Bench:
    """A folder with the fake figure in it, run in this process; `ran` lists the trials that were really run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.figure = folder / "fake" / "knee.yaml"
        self.figure.parent.mkdir()
        shutil.copy(FAKES / "knee.yaml", self.figure)
        self.out = folder / "out" / "ours.parquet"
        self.history = self.out.with_suffix(".history.jsonl")
        self.ran: list[Trial] = []
        self.experiment: Callable[[Trial], Outcome] = knee

    def run(self, name: str = "ours", **config: object) -> list[dict[str, object]]:
        where = ["--figure", str(self.figure), "--series", name, "--results", str(self.folder / "results")]
        series.main([*where, "--config-json", json.dumps(config), "--out", str(self.out)])
        return read_rows(self.out)[0]  # type: ignore[return-value]

    def edit(self, old: str, new: str) -> None:
        text = self.figure.read_text()
        assert old in text
        self.figure.write_text(text.replace(old, new, 1))

    def ask(self, trial: Trial) -> Outcome:
        self.ran.append(trial)
        return self.experiment(trial)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    found = Bench(tmp_path)
    monkeypatch.setattr(figure_file, "SYSTEMS", {"fake": "A fake"})
    monkeypatch.setattr(trials, "experiment", lambda _system, _name: found.ask)
    monkeypatch.setattr(trials, "system_version", lambda _system: "v1")
    monkeypatch.setattr(series, "end_with_parent", lambda: None)
    return found


def test_rows_are_the_points_of_the_figure(bench: Bench) -> None:
    rows = bench.run()
    assert [row["rate_rps"] for row in rows] == [1, 2, 4, 1000000]
    for row, knob in zip(rows, (40, 20, 10), strict=False):
        assert math.isclose(float(row["knob_knob"]), knob, rel_tol=0.08)  # type: ignore[arg-type]
        assert row["work_per_s"] == 2 * float(row["knob_knob"])  # type: ignore[arg-type]
        assert float(row["latency_p99_s"]) <= 1  # type: ignore[arg-type]
        assert (bench.folder / "results" / "trials" / str(row["trial"])).is_dir()
    last = rows[3]
    assert (last["feasible"], last["work_per_s"], last["trial"], last["knob_knob"]) == (False, 0.0, None, None)
    about = read_rows(bench.out)[1]
    assert len(about.trials) == len(bench.ran) and about.notes == ["no hardware at all"]


def test_every_prefix_of_the_history_leads_to_the_same_rows_without_running_a_trial_again(bench: Bench) -> None:
    rows, whole, count = bench.run(), bench.history.read_bytes(), len(bench.ran)
    lines = whole.splitlines(keepends=True)
    for end in range(len(lines)):
        torn = lines[end][: len(lines[end]) // 2]
        bench.history.write_bytes(b"".join(lines[:end]) + torn)
        bench.out.unlink()
        assert bench.run() == rows
        assert bench.history.read_bytes() == whole
    assert len(bench.ran) == count


def test_trials_that_somebody_deleted_run_again(bench: Bench) -> None:
    rows = bench.run()
    shutil.rmtree(bench.folder / "results" / "trials")
    assert bench.run() == rows
    assert {row["trial"] for row in rows if row["trial"]} == {
        path.name for path in (bench.folder / "results" / "trials").iterdir()
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [("tolerance: 0.05", "tolerance: 0.2"), ("{latency_p99_s: 1}", "{latency_p99_s: 2}"), ("{knee: 40}", "{knee: 30}")],
)
def test_a_changed_figure_searches_anew_and_says_so(
    bench: Bench, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    bench.run()
    bench.edit(old, new)
    capsys.readouterr()
    bench.run()
    assert "what it depends on has changed: searching anew" in capsys.readouterr().err


def test_another_seed_is_another_search(bench: Bench) -> None:
    bench.run()
    first, bench.ran = bench.ran, []
    bench.run(seed=100)
    assert {trial.seed for trial in first} & {trial.seed for trial in bench.ran} == set()


def test_a_title_changes_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run()
    count = len(bench.ran)
    bench.edit("title: A fake figure", "title: Another")
    bench.run()
    assert len(bench.ran) == count and "anew" not in capsys.readouterr().err


def test_a_history_that_somebody_changed_is_refused(bench: Bench) -> None:
    bench.run()
    lines = bench.history.read_text().splitlines(keepends=True)
    bench.history.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(InputError, match=r"history\.jsonl:1: probe"):
        bench.run()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("maximise: work_per_s", "maximise: work_per", r"knee has no such metric, did you mean work_per_s\?"),
        ("{latency_p99_s: 1}", "{latency_p90_s: 1}", r"search: 'latency_p90_s': knee has no such metric"),
        ("unbounded, how]", "unbound, how]", r"columns: 'unbound': knee has no such metric, did you mean unbounded\?"),
        ("maximise: work_per_s", "maximise: how_", r"knee has no such metric"),
    ],
)
def test_metrics_that_are_not_there_are_named(bench: Bench, old: str, new: str, said: str) -> None:
    bench.edit(old, new)
    with pytest.raises(InputError, match=said):
        bench.run()
    assert not bench.out.exists()


def test_a_text_cannot_be_maximised(bench: Bench) -> None:
    bench.edit("maximise: work_per_s", "maximise: how")
    bench.edit("unbounded, how]", "unbounded]")
    with pytest.raises(InputError, match="this metric is text"):
        bench.run()


def test_an_unknown_series_is_refused(bench: Bench) -> None:
    with pytest.raises(InputError, match=r"series: 'our': no such series, did you mean ours\?"):
        bench.run("our")


def test_without_a_search_the_one_trial_is_the_answer_even_when_it_is_no_number(bench: Bench) -> None:
    text = bench.figure.read_text()
    start, end = text.index("search:"), text.index("columns:")
    bench.figure.write_text(text[:start] + text[end:])
    for name in ("ours", "theirs"):
        bench.edit("knobs: {knob: {low: 1, high: 100}}", f"parameters: {{knob: 2, {name}: 1}}")
    bench.edit("label: Theirs, parameters: {knee: 20}, ", "label: Theirs, ")
    bench.experiment = lambda _: Outcome({"work_per_s": math.nan, "latency_p99_s": 3.0, "unbounded": None, "how": "x"})
    rows = bench.run()
    assert all(math.isnan(float(row["work_per_s"])) for row in rows)  # type: ignore[arg-type]
    assert {(row["feasible"], row["outcome"], row["probes"]) for row in rows} == {(True, "single trial", 1)}
    assert bench.run() and len(bench.ran) == 4


def test_progress_is_one_line_per_update() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress("fake/knee ours", 2, stream=stream, clock=lambda: now[0])
    for step in range(8):
        now[0] += 0.3
        progress.probe({"rate_rps": 1}, None if step < 5 else 7.25)
    progress.point({"rate_rps": 1}, 7.25)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # every full second, and the point
    assert "0/2" in lines[0] and "none within the limits yet" in lines[0] and "4 probes" in lines[0]
    assert "1/2" in lines[2] and "best 7.25" in lines[2] and "rate_rps=1" in lines[2] and "50%" in lines[2]
