"""Which jobs Snakemake may try a second time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import cli, retries
from systems.registry import InputError


@pytest.mark.parametrize(
    ("error", "marked"),
    [(InputError("figure", "knob", 1, "mend it"), True), (RuntimeError("a fault of the program"), False), (None, False)],
)
def test_a_command_that_refuses_its_input_says_so_to_snakemake(tmp_path: Path, error: Exception | None, marked: bool) -> None:
    log = tmp_path / "job.log"

    def work(argv: object) -> int:
        if error is not None:
            raise error
        return 0

    cli.run(work, ["--log", str(log)])
    assert retries.refused(log) is marked
    cli.run(lambda argv: 0, ["--log", str(log)])
    assert not retries.refused(log), "the next attempt begins anew"


def test_a_mark_of_an_earlier_run_does_not_count(tmp_path: Path) -> None:
    retries.mark(tmp_path / "job.log")
    assert retries.refused(tmp_path / "job.log")
    assert not retries.refused(tmp_path / "job.log", since=2e9 * 2)


def test_a_mark_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    retries.mark(tmp_path / "nowhere" / "job.log")
    retries.unmark(tmp_path / "nowhere" / "job.log")
    assert not retries.refused(tmp_path / "nowhere" / "job.log")


def test_a_job_is_repeated_unless_it_or_one_of_its_group_refused_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = pytest.importorskip("snakemake.jobs")
    for name in ("Job", "GroupJob"):  # put back what the call replaces
        monkeypatch.setattr(getattr(jobs, name), "restart_times", getattr(jobs, name).restart_times)
    retries.only_where_they_may_help()

    def attempts(of: type, **parts: Any) -> Any:
        return of.restart_times.fget(SimpleNamespace(**parts))  # type: ignore[attr-defined]

    rule = SimpleNamespace(restart_times=2)
    bad, good = (SimpleNamespace(log=[str(tmp_path / f"{name}.log")], rule=rule, restart_times=2) for name in ("bad", "good"))
    retries.mark(tmp_path / "bad.log")
    assert attempts(jobs.Job, **vars(bad)) == 0 and attempts(jobs.Job, **vars(good)) == 2
    assert attempts(jobs.GroupJob, jobs=[good, good]) == 2 and attempts(jobs.GroupJob, jobs=[good, bad]) == 0
