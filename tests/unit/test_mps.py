"""The MPS wrapper with a fake control program: it starts, refuses, dies and ends as NVIDIA's would, and never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from systems.common.errors import InputError
from systems.common.gpu import mps
from systems.common.gpu.mps import MpsDaemon, alive

FAKE = """#!{python}
import os, subprocess, sys
pipes = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in os.environ
pid_file = os.path.join(pipes, "nvidia-cuda-mps-control.pid")
if sys.argv[1:] == ["-d"]:
    {before}
    daemon = subprocess.Popen([{python!r}, "-c", "import time; time.sleep({lives})"], start_new_session=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    open(pid_file, "w").write(str(daemon.pid))
elif sys.stdin.read().startswith("quit") and not {deaf}:
    os.kill(int(open(pid_file).read()), 15)
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "nobody's"))

    def write(before: str = "pass", lives: float = 60, deaf: bool = False) -> str:
        program = tmp_path / "control"
        program.write_text(FAKE.format(python=sys.executable, before=before, lives=lives, deaf=deaf))
        program.chmod(0o755)
        return str(program)

    return write


def gone(pid: int, within_s: float = 20.0) -> bool:
    until = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_a_daemon_is_private_and_is_ended(control: Callable[..., str]) -> None:
    with MpsDaemon(control()) as daemon:
        daemon.check()
        assert alive(daemon.pid)
        told = daemon.environment(thread_percentage=40)
        assert told["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "40"
        assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in daemon.environment()
        assert Path(told["CUDA_MPS_PIPE_DIRECTORY"]).is_relative_to(daemon.folder)
    assert gone(daemon.pid)
    assert not daemon.folder.exists()


def test_a_limit_in_our_own_environment_does_not_reach_the_daemon(
    control: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "20")  # the fake refuses it
    with MpsDaemon(control()) as daemon:
        daemon.check()


def test_a_daemon_that_does_not_quit_is_killed(control: Callable[..., str]) -> None:
    with MpsDaemon(control(deaf=True)) as daemon:
        pass
    assert gone(daemon.pid)


def test_a_daemon_that_runs_already_is_not_touched(
    control: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / mps.PID_FILE).write_text(str(os.getpid()))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(folder))
    with pytest.raises(InputError, match="not ours is running: end it first"):
        MpsDaemon(control())


def test_what_the_control_program_says_is_passed_on(control: Callable[..., str]) -> None:
    with pytest.raises(InputError, match="An instance of this daemon is already running"):
        MpsDaemon(control("sys.exit('An instance of this daemon is already running')"))


def test_a_missing_program_is_named() -> None:
    with pytest.raises(InputError, match="MPS: program: 'no-such-control': not found"):
        MpsDaemon("no-such-control")


def test_a_daemon_that_dies_is_noticed(control: Callable[..., str]) -> None:
    with MpsDaemon(control()) as daemon:
        os.kill(daemon.pid, signal.SIGKILL)
        assert gone(daemon.pid)
        with pytest.raises(InputError, match="died during the run"):
            daemon.check()
    assert not daemon.folder.exists()


def test_the_daemon_ends_when_its_owner_is_killed(control: Callable[..., str], root: Path) -> None:
    code = "import sys, time\nfrom systems.common.gpu.mps import MpsDaemon\n"
    code += "d = MpsDaemon(sys.argv[1])\nprint(d.pid, d.folder, flush=True)\ntime.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code, control()], cwd=root, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(int(pid))
    until = time.monotonic() + 20
    while Path(folder).exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(folder).exists()
