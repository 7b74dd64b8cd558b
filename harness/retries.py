"""No second attempt for what cannot go better a second time.

Snakemake's `retries` are for jobs that ran out of time or lost their node. It repeats whatever fails, and a job whose input is
unusable fails again in the same way, after another wait in the queue. So a command that ends with one line about its input
(`harness.cli`, status 2) leaves a mark beside its log, and a job with such a mark is not repeated.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

_BEGAN = time.time()


def mark_of(log: Path) -> Path:
    """The file that is there when the command whose log is `log` refused its input."""
    return log.with_name(f"{log.name}.refused")


def mark(log: Path) -> None:
    """Note that the command with this log refused its input; where that cannot be noted, the job is merely repeated."""
    with contextlib.suppress(OSError):
        mark_of(log).touch()


def unmark(log: Path) -> None:
    """The command with this log begins anew."""
    with contextlib.suppress(OSError):
        mark_of(log).unlink(missing_ok=True)


def refused(log: Path, since: float = _BEGAN) -> bool:
    """Whether the command with this log refused its input, `since` (in seconds since the epoch) this process began."""
    try:
        return mark_of(log).stat().st_mtime >= since
    except OSError:
        return False


def only_where_they_may_help() -> None:
    """Make Snakemake, in this process, not repeat jobs that refused their input, nor groups with such a job.

    Called from the Snakefile. The number of attempts is a property of the rule, and nothing but this property of the job
    can make it depend on how the job failed.
    """
    from snakemake.jobs import GroupJob, Job

    job_class: Any = Job
    group_class: Any = GroupJob
    job_class.restart_times = property(lambda job: 0 if _hopeless(job) else job.rule.restart_times)
    group_class.restart_times = property(
        lambda group: 0 if any(map(_hopeless, group.jobs)) else max(job.restart_times for job in group.jobs)
    )


def _hopeless(job: Any) -> bool:  # noqa: ANN401
    return any(refused(Path(str(log))) for log in job.log)
