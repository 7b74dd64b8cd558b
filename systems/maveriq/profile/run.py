"""Job after job within a budget; what is there so far is on disk after each."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from systems.maveriq.profile import tables
from systems.maveriq.profile.crew import Crew, Done
from systems.maveriq.profile.jobs import Job

JOB_S = 120.0
OVER_S = 20.0
"""How long after the budget's end the last job may still take, seconds."""


def profile(
    jobs: Sequence[Job],
    files: dict[str, Path],
    beside: Path,
    *,
    budget_s: float = float("inf"),
    job_s: float = JOB_S,
    commit: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> list[Done]:
    """Do `jobs` in order, and write after each.

    Args:
        jobs: what to measure; all must be possible (`Job.check`).
        files: per table (`Job.table`) its CSV file; one without rows is not written.
        beside: the provenance file.
        budget_s: no job begins after so long, and one that runs ends `OVER_S` later at the latest; those that remain are
            named in the provenance.
        job_s: limit of one job, its start left out.
        commit: of the code, where there is no git to ask.
        say: hears a line per job.

    Returns:
        What came of every job that began. A job that fails does not stop the others.

    Raises:
        InputError: a file can't be written.
    """
    began, until = datetime.datetime.now(datetime.UTC), time.monotonic() + budget_s
    done: list[Done] = []
    with Crew() as crew:
        for place, job in enumerate(jobs):
            if time.monotonic() > until:
                break
            limit_s = min(job_s, until + OVER_S - time.monotonic())
            done.append(crew.do(job, limit_s, more=len(jobs) - place - 1))
            say(_line(done[-1], place + 1, len(jobs)))
            write(done, [left.name for left in jobs[place + 1 :]], files, beside, began, commit)
    return done


def write(
    done: Sequence[Done], skipped: Sequence[str], files: dict[str, Path], beside: Path, began: datetime.datetime, commit: str
) -> None:
    """All tables as they are now. Raises InputError where the disk refuses."""
    by_table: dict[str, list[dict[str, Any]]] = {}
    for one in done:
        by_table.setdefault(one.job.table, []).extend(tables.rows_of(one))
    for table, rows in by_table.items():
        if rows:
            tables.put(files[table], tables.as_csv(rows))
    tables.put(beside, tables.as_json(tables.provenance(done, skipped, began, commit)))


def _line(done: Done, place: int, count: int) -> str:
    head = f"[{place}/{count}] {done.job.name}: "
    if not done.rows:
        return head + f"failed: {done.error}"
    last = done.rows[-1]
    error = f"; then failed: {done.error}" if done.error else ""
    took = f"{last['latency_s'] * 1e3:.2f} ms for {last['output_length']} tokens, {last['memory_gib']:.2f} GiB"
    return head + f"{took} ({done.wall_s:.1f} s){error}"
