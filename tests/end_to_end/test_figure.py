"""A figure from its file to its PDF, by real `snakemake` commands."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable

import pypdf

from tests.end_to_end.conftest import Project


def rows(project: Project) -> list[dict[str, str]]:
    with (project.results / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_figure_is_built_and_the_second_run_does_nothing(project: Project) -> None:
    done = project.build("knee")
    for series in ("ours", "theirs"):
        assert f"fake/knee {series}: 100%" in done.stderr
    table = rows(project)
    columns = "series rate_rps work_per_s latency_p99_s unbounded how knob_knob feasible outcome probes trial"
    assert list(table[0]) == columns.split()
    levels = ["1", "2", "4", "1000000"]
    assert [(row["series"], row["rate_rps"]) for row in table] == [(s, rate) for s in ("ours", "theirs") for rate in levels]
    ours = {row["rate_rps"]: row for row in table if row["series"] == "ours"}
    assert abs(float(ours["1"]["knob_knob"]) / 40 - 1) < 0.08
    assert ours["1"]["unbounded"] == "inf"
    assert (ours["1000000"]["work_per_s"], ours["1000000"]["feasible"], ours["1000000"]["trial"]) == ("0.0", "false", "")
    verdicts = json.loads((project.results / "claims.json").read_text())
    assert [claim["status"] for claim in verdicts["claims"]] == ["reproduced", "reproduced"]
    assert (project.results / "search.pdf").read_bytes().startswith(b"%PDF")

    before, ran = project.outputs(), project.ran()
    again = project.build("knee")
    assert "Nothing to be done" in again.stdout + again.stderr
    assert project.outputs() == before
    assert project.ran() == ran


def test_every_trial_keeps_what_it_was_and_where_it_comes_from(project: Project) -> None:
    project.build("fake_knee", "--config", "seed=7")
    trials = sorted((project.root / "results" / "trials").iterdir())
    assert len(trials) == len(project.ran()) == len(set(project.ran()))
    for trial in trials:
        assert sorted(path.name for path in trial.iterdir()) == [
            "metrics.json",
            "provenance.json",
            "requests.parquet",
            "spec.json",
        ]
        origin = json.loads((trial / "provenance.json").read_text())
        assert origin["seed"] >= 7 and origin["config"]["seed"] == 7
        assert origin["commit"] == "unknown"  # the copy is no git checkout
        assert origin["notes"] == ["no hardware at all"]


def test_a_dry_run_shows_every_job_and_writes_nothing(project: Project) -> None:
    done = project.build("-n", "fake")
    for rule in ("run_series", "write_table", "draw_figure", "draw_search", "judge_claims"):
        assert rule in done.stdout + done.stderr
    assert not project.ran()
    assert not (project.root / "results").exists()


def test_smoke_scale_keeps_two_points_and_judges_nothing(project: Project) -> None:
    project.build("knee", "--config", "scale=smoke")
    folder = project.root / "results" / "paper-simulated-smoke" / "fake" / "knee"
    with (folder / "table.csv").open() as file:
        assert {row["rate_rps"] for row in csv.DictReader(file)} == {"1", "4"}
    verdicts = json.loads((folder / "claims.json").read_text())
    assert {claim["status"] for claim in verdicts["claims"]} == {"not testable here"}


def test_what_is_changed_decides_what_runs_again(project: Project) -> None:
    project.build("knee")
    ran, before = project.ran(), project.outputs()

    (project.root / "systems" / "fake" / "README.md").write_text("words")
    assert "Nothing to be done" in project.build("knee").stderr

    project.edit("figures/style.py", '"""', '"""Changed. ')  # how it is drawn
    assert "run_series" not in project.build("-n", "knee").stderr
    project.edit(project.figure, "title: A fake figure", "title: A renamed figure")
    project.build("knee")
    assert project.ran() == ran
    assert project.outputs()["table.csv"] == before["table.csv"]

    project.edit(project.figure, "levels: [1, 2, 4,", "levels: [1, 2, 3, 4,")  # one point more
    project.build("knee")
    assert project.ran()[: len(ran)] == ran
    assert {json.loads(line)["parameters"]["rate_rps"] for line in project.ran()[len(ran) :]} == {3}

    ran = project.ran()
    project.edit("systems/fake/experiments.py", "knob * 2.0", "knob * 3.0")
    project.build("knee")
    assert sorted(project.ran()[len(ran) :]) == sorted(ran)  # every trial, for the code is another


def test_claims_are_printed_and_an_unexplained_difference_fails(project: Project) -> None:
    done = project.build("claims")
    assert "K1" in done.stdout and "reproduced" in done.stdout
    project.edit(project.figure, "low: 1.8, high: 2.2", "low: 3, high: 4")
    done = project.snakemake("claims")
    assert done.returncode == 1
    assert "differs" in done.stdout


def test_results_may_have_a_name_with_a_space(project: Project) -> None:
    project.build("knee", "--config", "results='my results'")
    assert (project.root / "my results" / "paper-simulated" / "fake" / "knee" / "knee.pdf").exists()


def test_the_same_figure_twice_gives_the_same_bytes(new_project: Callable[[str], Project]) -> None:
    first, second = new_project("first"), new_project("second")
    first.build("knee")
    second.build("knee", "--cores", "1")
    assert first.outputs() == second.outputs()


def test_other_hardware_rescales_rates_and_limits_and_says_so(project: Project) -> None:
    """Twice the GPUs: limits x 0.5, and with them 4 / 2 = 2 times the rate; the knee of the knob stays where it was."""
    done = project.build("knee", "--config", "hardware=nothingx2")
    assert "knee.yaml: rescaled from nothingx1: rates x " in done.stderr
    folder = project.root / "results" / "nothingx2-simulated" / "fake" / "knee"
    factors = json.loads((folder / "rescale.json").read_text())["factors"]
    assert abs(factors["rates"] / 2 - 1) < 0.1
    assert factors["limits"] == {"latency_p99_s": 0.5}
    with (folder / "table.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["series"] == "ours"]
    assert [float(row["rate_rps"]) for row in table][:3] == [float(f"{rate * factors['rates']:.4g}") for rate in (1, 2, 4)]
    assert all(float(row["latency_p99_s"]) <= 0.5 for row in table[:3])
    assert abs(float(table[0]["knob_knob"]) / 40 - 1) < 0.15
    verdicts = json.loads((folder / "claims.json").read_text())
    assert {claim["status"] for claim in verdicts["claims"]} == {"not testable here"}
    pages = "".join(page.extract_text() for page in pypdf.PdfReader(folder / "knee.pdf").pages)
    assert "rescaled from nothingx1" in pages.replace("\n", " ")
    assert "Nothing to be done" in project.build("knee", "--config", "hardware=nothingx2").stderr


def test_lint_is_clean(project: Project) -> None:
    assert "good condition" in project.build("--lint").stderr
