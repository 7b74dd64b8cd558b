"""Warm processes: a job runs as if it had been started alone, and ends with its client, with Snakemake, and by signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from harness.warm import start
from harness.warm.__main__ import SOCKET

MODULE = """
import json, os, signal, sys, time
from pathlib import Path

def ended(number, frame):
    Path("ended").write_text(signal.Signals(number).name)
    raise SystemExit(128 + number)

if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "tell":
        ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("harness", "systems"))
        said = {"argv": rest, "folder": os.getcwd(), "parent": os.getppid(), "ours": ours, "typed": sys.stdin.read(),
                "colour": os.environ.get("COLOUR"), "command": sys.orig_argv, "warm": "pyarrow" in sys.modules}
        print(json.dumps(said))
        print("to stderr", file=sys.stderr)
        raise SystemExit(int(rest[0]))
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(0.5)
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGINT, ended)
    Path("began").write_text(str(os.getpid()))
    time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    (tmp_path / "job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    return tmp_path


@pytest.fixture
def warm(folder: Path) -> Iterator[psutil.Process]:
    with start.server():
        yield psutil.Process(server_pid())


def server_pid() -> int:
    found = [child.pid for child in psutil.Process().children() if "harness.warm.server" in child.cmdline()]
    assert len(found) == 1
    return found[0]


def client(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness.warm", "python", "-m", "job", *arguments]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, **{**streams, **options})  # type: ignore[call-overload,no-any-return]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60  # only keeps a broken test from hanging
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def begun(folder: Path) -> psutil.Process:
    until(lambda: (folder / "began").exists() and (folder / "began").read_text())
    return psutil.Process(int((folder / "began").read_text()))


def gone(process: psutil.Process) -> None:
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_a_job_has_its_clients_files_folder_environment_and_status(warm: psutil.Process, folder: Path) -> None:
    elsewhere = folder / "else where"
    elsewhere.mkdir()
    (elsewhere / "job.py").write_text(MODULE)
    done = client("tell", "7", "two words", cwd=elsewhere, env={**os.environ, "COLOUR": "blue"})
    out, err = done.communicate("typed", timeout=60)
    told = json.loads(out)
    assert done.returncode == 7 and err == "to stderr\n"
    assert told["argv"] == ["7", "two words"] and told["typed"] == "typed"
    assert told["folder"] == str(elsewhere) and told["colour"] == "blue"
    assert told["command"] == ["python", "-m", "job", "tell", "7", "two words"]
    assert told["parent"] == warm.pid and told["warm"]
    assert set(told["ours"]) <= {"harness", "harness.warm", "harness.warm.server"}, "our code is imported by each job itself"


def test_many_jobs_at_once(warm: psutil.Process) -> None:
    clients = [client("tell", str(number)) for number in range(8)]
    told = [each.communicate(str(number), timeout=60)[0] for number, each in enumerate(clients)]
    assert [each.returncode for each in clients] == list(range(8))
    assert [json.loads(said)["typed"] for said in told] == list(map(str, range(8)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_client_reaches_the_job(warm: psutil.Process, folder: Path, number: signal.Signals) -> None:
    one = client("wait", start_new_session=True)  # so that SIGINT does not reach the job by itself
    begun(folder)
    one.send_signal(number)
    one.communicate(timeout=60)
    assert one.returncode == 128 + number
    assert (folder / "ended").read_text() == number.name


def test_a_client_ends_by_the_signal_that_ended_its_job(warm: psutil.Process) -> None:
    one = client("die")
    one.communicate(timeout=60)
    assert one.returncode == -signal.SIGKILL
    assert client("tell", "0").communicate("", timeout=60)[0], "the server goes on"


def test_a_job_ends_with_its_client(warm: psutil.Process, folder: Path) -> None:
    one = client("wait")
    job = begun(folder)
    one.kill()
    one.communicate()
    gone(job)
    assert (folder / "ended").read_text() == "SIGTERM"
    assert client("tell", "0").communicate("", timeout=60)[0], "the server goes on"


def test_jobs_and_server_end_with_snakemake_which_waits_for_them(folder: Path) -> None:
    with start.server():
        server = psutil.Process(server_pid())
        one = client("wait")
        job = begun(folder)
    assert not server.is_running() and not job.is_running()
    one.communicate(timeout=60)
    assert one.returncode == 128 + signal.SIGTERM
    assert (folder / "ended").read_text() == "SIGTERM"
    assert not os.environ.get(SOCKET) and not os.environ.get(start.PREFIX)


KILLED = """
import os, subprocess, sys, time
from pathlib import Path
from harness.warm import start
with start.server():
    Path("socket").write_text(os.environ["FIVEFOLD_WARM"])
    subprocess.Popen([sys.executable, "-m", "harness.warm", "python", "-m", "job", "wait"])
    time.sleep(300)
"""


def test_jobs_and_server_end_when_snakemake_is_killed(folder: Path) -> None:
    snakemake = subprocess.Popen([sys.executable, "-c", KILLED])
    job = begun(folder)
    server = job.parent()
    assert server and "harness.warm.server" in server.cmdline()
    snakemake.kill()
    snakemake.wait()
    gone(job)
    gone(server)
    assert (folder / "ended").read_text() == "SIGTERM"
    assert not Path((folder / "socket").read_text()).parent.exists(), "nothing is left of it"


def test_a_client_whose_server_is_killed_says_so_and_ends_its_job(warm: psutil.Process, folder: Path) -> None:
    one = client("wait")
    job = begun(folder)
    warm.kill()
    _, err = one.communicate(timeout=60)
    assert one.returncode == 1 and err == "-m job: the process that started it was killed\n"
    gone(job)


def test_without_a_server_a_command_runs_in_the_clients_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOCKET, str(folder / "nobody"))
    one = client("tell", "3")
    out, _ = one.communicate("", timeout=60)
    assert one.returncode == 3
    assert json.loads(out)["parent"] == os.getpid() and not json.loads(out)["warm"]


def test_a_request_that_is_nonsense_harms_nobody(warm: psutil.Process) -> None:
    import socket

    for sent in (b"", b"x", b"\0" * 7 + b"\5notjs"):
        with socket.socket(socket.AF_UNIX) as bad:
            bad.connect(os.environ[SOCKET])
            bad.sendall(sent)
    assert client("tell", "0").communicate("", timeout=60)[0]


def executed(backend: str = "simulated", *, dry: bool = False, conda: bool = False, main: bool = True) -> bool:
    """Whether there was a server while a Snakemake like this executed."""
    seen: list[bool] = []
    workflow = SimpleNamespace(
        is_main_process=main,
        deployment_settings=SimpleNamespace(deployment_method={"conda"} if conda else set()),
        execute=lambda **_: seen.append(os.environ[start.PREFIX] == start.CLIENT),
    )
    start.keep(workflow, backend)
    workflow.execute(executor_plugin=SimpleNamespace(common_settings=SimpleNamespace(dryrun_exec=dry)))
    return seen == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
def test_who_has_a_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(start.COLD, raising=False)
    monkeypatch.setenv(start.PREFIX, "")
    assert executed() and executed("recorded")
    assert not executed("measured") and not executed(dry=True) and not executed(conda=True) and not executed(main=False)
    monkeypatch.setenv(start.COLD, "1")
    assert not executed()


def test_where_jobs_go_to_hosts_only_local_ones_are_warm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(start.DISPATCH, "python -m harness.dispatch --")
    with start.server():
        assert os.environ[start.DISPATCH] == "python -m harness.dispatch --"
        assert os.environ[start.PREFIX] == start.CLIENT
