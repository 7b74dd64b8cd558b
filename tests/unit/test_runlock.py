"""Locks: one holder, gone with its process, and Snakemake's own stale locks removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.runlock import RUN_LOCK, SNAKEMAKE_LOCKS, Held, guard, take, waiting_for

HOLDER = """
import sys
from pathlib import Path
from harness.runlock import take
lock = take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(root: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock `lock` in tmp_path until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")],
        cwd=root,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream
        stream.close()


def test_a_lock_has_one_holder_who_is_named(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(Held, match=f"process {holder.pid} on"):
        take(tmp_path / "lock")


def test_a_killed_holder_holds_nothing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with take(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on")


def test_waiting_says_once_for_whom_and_then_holds(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        assert holder.stdin
        holder.stdin.close()  # only now does the holder end

    with waiting_for(tmp_path / "lock", say), pytest.raises(Held, match=f"process {os.getpid()} on"):
        take(tmp_path / "lock")
    assert len(said) == 1 and f"process {holder.pid} on" in said[0]
    take(tmp_path / "lock").close()


def workflow(*, main: bool = True, lock: bool = True) -> SimpleNamespace:
    ran: list[object] = []
    return SimpleNamespace(
        is_main_process=main,
        execution_settings=SimpleNamespace(lock=lock),
        execute=lambda **arguments: ran.append(arguments),
        ran=ran,
    )


def plugin(*, dry: bool = False) -> SimpleNamespace:
    return SimpleNamespace(common_settings=SimpleNamespace(dryrun_exec=dry))


def test_a_run_removes_stale_locks_of_snakemake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SNAKEMAKE_LOCKS.mkdir(parents=True)
    (SNAKEMAKE_LOCKS / "0.input.lock").write_text("x")
    run = workflow()
    guard(run)
    run.execute(executor_plugin=plugin())
    assert len(run.ran) == 1 and not SNAKEMAKE_LOCKS.exists()


def test_only_a_run_is_refused_beside_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SNAKEMAKE_LOCKS.mkdir(parents=True)
    with take(RUN_LOCK):
        refused = workflow()
        guard(refused)
        with pytest.raises(SystemExit) as caught:
            refused.execute(executor_plugin=plugin())
        assert "is running Snakemake here" in str(caught.value) and "\n" not in str(caught.value)
        assert not refused.ran and SNAKEMAKE_LOCKS.exists()
        for beside, dry in ((workflow(), True), (workflow(main=False), False), (workflow(lock=False), False)):
            guard(beside)
            beside.execute(executor_plugin=plugin(dry=dry))
            assert len(beside.ran) == 1 and SNAKEMAKE_LOCKS.exists()


def test_the_guard_fits_this_snakemake() -> None:
    """What `guard` relies on, so that a new Snakemake without it fails here and not in a user's run."""
    import inspect

    from snakemake.api import Workflow
    from snakemake.settings.types import ExecutionSettings

    assert "executor_plugin" in inspect.signature(Workflow.execute).parameters
    assert isinstance(Workflow.is_main_process, property)
    assert ExecutionSettings().lock is True
