"""`--profile slurm` against a real Slurm: what is submitted, and what happens when nodes and jobs go away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Project, new_project
from tests.labs import LabUnavailableError
from tests.labs.slurm_lab import SlurmLab

__all__ = ["new_project"]  # a fixture


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture
def cluster_project(new_project: Callable[[str], Project], root: Path) -> Callable[[str], Project]:
    def new(name: str) -> Project:
        project = new_project(name)
        shutil.copytree(root / "slurm", project.root / "slurm")
        return project

    return new


# -- what is submitted, without any Slurm ----------------------------------------------------------------------------------


def submitted(project: Project, *arguments: str) -> list[str]:
    """The command lines of `sbatch`, which here only notes them; then Snakemake is stopped."""
    tools = project.root / "tools"
    tools.mkdir()
    asked = tools / "asked"
    answers = {
        "sbatch": f'echo "$@" >> {asked}; echo 1',
        "sinfo": "echo 'gpu*'",
        "scontrol": "echo MinJobAge = 300",
        "squeue": ":",
    }
    for name in ("sbatch", "squeue", "scontrol", "sinfo", "scancel", "sacct", "sacctmgr"):
        script = tools / name
        script.write_text(f"#!/bin/sh\n{answers.get(name, 'exit 1')}\n")
        script.chmod(0o755)
    project.environment["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    run = project.start("fake_knee", "--profile", "slurm", *arguments)
    try:
        until(lambda: asked.exists() or run.poll() is not None, 60)
        time.sleep(1.0)  # were there a second job, it would follow at once
    finally:
        run.kill()
        said = "".join(run.communicate())
    assert asked.exists(), said
    return asked.read_text().splitlines()


def test_a_simulated_series_asks_for_time_and_memory_and_no_gpu(cluster_project: Callable[[str], Project]) -> None:
    line, _ = submitted(cluster_project("project"), "--group-components", "series=1")
    for option in ("-t 240", "--mem 6000", "--requeue", "--ntasks=1", "--cpus-per-task=1", "--export=ALL"):
        assert option in line, line
    assert "--gpus" not in line and "--gres" not in line


def test_a_measured_series_asks_for_the_gpus_of_its_testbed_and_shares_no_job(
    cluster_project: Callable[[str], Project],
) -> None:
    project = cluster_project("project")
    project.edit(project.figure, "testbed: nothingx1", "backends: [measured]\ntestbed: h200x2")
    config = ("--config", "backend=measured", "--default-resources", "slurm_partition=gpu", "runtime=60", "mem_mb=4000")
    line, _ = submitted(project, *config)
    assert "--gpus=h200:2" in line and "-p gpu" in line, line
    assert "-t 240" in line and "--mem 6000" in line, "one series in the job"


def test_small_series_share_a_job(cluster_project: Callable[[str], Project]) -> None:
    project = cluster_project("project")
    assert len(submitted(project)) == 1, "two series, one job"


# -- against a real one ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"fivefold-slurm-{os.getpid()}")
    try:
        with SlurmLab(folder, nodes=3) as lab:
            yield lab
    except LabUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Snakemake, but for the plugin's pauses between its looks at the queue (up to three minutes).
EAGER = """
import asyncio
from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

async def a_second(self):
    await asyncio.sleep(1)

RemoteExecutor.sleep = a_second
main()
"""


class Run:
    """`snakemake fake_knee --profile slurm` as a client of the lab."""

    def __init__(self, lab: SlurmLab, project: Project, *arguments: str, sleep_s: str) -> None:
        self.lab, self.project = lab, project
        argv = [sys.executable, "-c", EAGER, "fake_knee", "--profile", "slurm", *arguments]
        self.hold = project.root / "hold"
        told = {"FAKE_LOG": str(project.log), "FAKE_SLEEP_S": sleep_s, "FAKE_HOLD": str(self.hold)}
        environment = {**os.environ, **lab.environment, **told}
        self.process = subprocess.Popen(
            lab.command(argv, project.root),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def job(self) -> tuple[str, str]:
        """The number and the node of a job that has finished a trial."""
        until(lambda: any(self.project.root.glob("results/trials/*/metrics.json")))
        told = self.lab.run(["squeue", "-h", "-t", "running", "-o", "%i %N"]).stdout.split()
        return told[0], told[1]

    def complete(self) -> str:
        """Wait for the end, which has to be a good one; what was said."""
        try:
            said = self.process.communicate(timeout=500)[0]
        finally:
            self.process.kill()
        assert self.process.returncode == 0, said
        return said


_TABLE: list[bytes] = []


@pytest.fixture
def undisturbed(cluster_project: Callable[[str], Project]) -> bytes:
    """The table as this machine makes it: once for all tests."""
    if not _TABLE:
        project = cluster_project("undisturbed")
        project.build("fake_knee")
        _TABLE.append((project.results / "table.csv").read_bytes())
    return _TABLE[0]


def ended(lab: SlurmLab, how: str) -> bool:
    """Whether a job of the lab has ended like this."""
    return f"JobState={how} " in (lab.logs / "jobs.txt").read_text()


def no_trial_lost(project: Project) -> None:
    """Every trial that was finished was finished once: at most the one that was running when its job ended ran twice."""
    ran = project.ran()
    assert len(ran) - len(set(ran)) <= 2 and len(set(ran)) == len(list(project.root.glob("results/trials/[!.]*")))


@pytest.mark.slow
def test_a_cancelled_job_and_a_drained_node(
    lab: SlurmLab, cluster_project: Callable[[str], Project], undisturbed: bytes
) -> None:
    project = cluster_project("project")
    run = Run(lab, project, sleep_s="0.15")
    job, node = run.job()
    lab.drain(node)
    lab.run(["scancel", job])
    try:
        said = run.complete()
    finally:
        lab.resume(node)
    assert "Trying to restart" in said and ended(lab, "CANCELLED")
    assert (project.results / "table.csv").read_bytes() == undisturbed
    no_trial_lost(project)


@pytest.mark.slow
def test_a_node_that_dies(lab: SlurmLab, cluster_project: Callable[[str], Project], undisturbed: bytes) -> None:
    project = cluster_project("project")
    run = Run(lab, project, sleep_s="0.15")
    job, node = run.job()
    lab.kill_node(node)
    try:
        until(lambda: state(lab, job) == "PENDING", 60)
        lab.hurry(job)
        run.complete()
    finally:
        lab.resume(node)
    assert ended(lab, "NODE_FAIL")
    assert (project.results / "table.csv").read_bytes() == undisturbed
    no_trial_lost(project)


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_goes_on_from_its_history(
    lab: SlurmLab, cluster_project: Callable[[str], Project], undisturbed: bytes
) -> None:
    project = cluster_project("project")
    run = Run(lab, project, sleep_s="0.15")
    job, _ = run.job()
    run.hold.touch()  # Slurm looks at limits every 30 s: the job must not be done before
    lab.expire(job)
    try:
        until(lambda: state(lab, job) != "RUNNING")
    finally:
        run.hold.unlink()
    said = run.complete()
    assert "Trying to restart" in said and ended(lab, "TIMEOUT")
    assert (project.results / "table.csv").read_bytes() == undisturbed
    no_trial_lost(project)


ROLES = """
    import sys, threading
    from pathlib import Path
    from harness.launch import Http, Launch, Role, Step, allocated_nodes
    serve = "import http.server as h, sys; s = h.HTTPServer(('0.0.0.0', int(sys.argv[1])), h.SimpleHTTPRequestHandler);"
    serve += "s.serve_forever()"
    ask = "import socket, sys, urllib.request as u; print(u.urlopen(sys.argv[1]).status, socket.gethostname())"
    one, two = allocated_nodes()
    server = Role("server", (sys.executable, "-c", serve, "{port.http}"), Step(one), ports=("http",), ready=Http("http", "/"))
    client = Role("client", (sys.executable, "-c", ask, "http://{server.http}/"), Step(two), needs=("server",), lasts=False)
    with Launch([server, client], Path(sys.argv[1])) as launch:
        launch.wait("client", timeout_s=60)
        print("answered", flush=True)
        if len(sys.argv) > 2:
            threading.Event().wait()
"""


def submit(lab: SlurmLab, root: Path, tmp_path: Path, *words: str) -> str:
    (tmp_path / "roles.py").write_text(textwrap.dedent(ROLES))
    roles = f"{sys.executable} {tmp_path}/roles.py {tmp_path}/out {' '.join(words)}"
    script = f"#!/bin/sh\ncd {root} && exec env PYTHONPATH={root} {roles}\n"
    (tmp_path / "job.sh").write_text(script)
    argv = ["sbatch", "--parsable", "-N2", "--ntasks=2", f"--output={tmp_path}/job.log", str(tmp_path / "job.sh")]
    return lab.run(argv).stdout.strip()


def state(lab: SlurmLab, job: str) -> str:
    return lab.run(["squeue", "-h", "--states=all", "-j", job, "-o", "%T"]).stdout.strip()


def left(lab: SlurmLab) -> list[str]:
    lines = [line for node in lab.nodes for line in lab.on(node, ["ps", "-e", "-o", "args"]).stdout.splitlines()]
    return [line for line in lines if "http.server" in line]


@pytest.mark.slow
def test_roles_on_two_nodes_of_one_allocation(lab: SlurmLab, root: Path, tmp_path: Path) -> None:
    job = submit(lab, root, tmp_path)
    until(lambda: state(lab, job) not in ("PENDING", "RUNNING", "COMPLETING"), 60)
    assert state(lab, job) == "COMPLETED", (tmp_path / "job.log").read_text()
    status, node = (tmp_path / "out" / "client.log").read_text().split()
    assert status == "200" and node in lab.nodes
    assert not left(lab)


@pytest.mark.slow
def test_a_cancelled_allocation_ends_its_roles_on_all_nodes(lab: SlurmLab, root: Path, tmp_path: Path) -> None:
    job = submit(lab, root, tmp_path, "stay")
    until(lambda: (tmp_path / "job.log").exists() and "answered" in (tmp_path / "job.log").read_text(), 60)
    assert left(lab)
    lab.run(["scancel", job])
    until(lambda: not left(lab), 15)
