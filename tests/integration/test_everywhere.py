"""The same figure on this machine, over SSH, in containers and on a cluster: the same bytes in its table."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.copies import copy_project
from tests.labs import base_image, processes
from tests.labs.engine import Engine
from tests.labs.fixtures import running, skipping
from tests.labs.lab import Lab
from tests.labs.slurm_lab import SlurmLab
from tests.labs.ssh_lab import SshLab

pytestmark = pytest.mark.slow

FIGURE = "llmstation_fig8a"
RUN = Path("results", "paper-simulated-smoke", "llmstation", "fig8a")


@contextlib.contextmanager
def once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that all workers of pytest share, and whether what belongs in it is to be made: by one, as others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done").exists()
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
        yield folder, not done
        folder.with_suffix(".done").touch()


KEPT = ("llmstation/fig8a", "llmstation/modes", "spotserve/table1", "maveriq/quantisation", "dlora/fig7")
"""The figures that `all` means here: each costs jobs on both sides, and one of a kind shows the same as ten."""


@pytest.fixture(scope="session")
def pristine(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it was when the first of these tests began: the same for all, should somebody edit it meanwhile."""
    with once(tmp_path_factory, "pristine") as (folder, absent):
        if absent:
            folder.mkdir()
            copy_project(root, folder)
            shutil.copytree(root / "slurm", folder / "slurm")
            for path in (folder / "figures").glob("*/*.yaml"):
                if str(path.relative_to(folder / "figures").with_suffix("")) not in KEPT:
                    path.unlink()
    return folder


@pytest.fixture(scope="module")
def new_copy(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(pristine, tmp_path_factory.mktemp(name, numbered=True), dirs_exist_ok=True))


def command(target: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", target, *arguments]


def snakemake(copy: Path, target: str, *arguments: str, lab: Lab | None = None, more: Mapping[str, str] | None = None) -> str:
    argv = command(target, *arguments)
    environment = {**os.environ, **(lab.environment if lab else {}), **(more or {})}
    done = subprocess.run(
        lab.command(argv, copy) if lab else argv,
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def smoke(mirror: Path) -> tuple[str, ...]:
    return ("--config", "scale=smoke", "offline=true", f"dataset_mirror={mirror}")


@pytest.fixture(scope="session")
def here(pristine: Path, tmp_path_factory: pytest.TempPathFactory, smoke: tuple[str, ...]) -> Path:
    """All figures made on this machine."""
    with once(tmp_path_factory, "here") as (folder, absent):
        if absent:
            shutil.copytree(pristine, folder)
            snakemake(folder, "all", *smoke)
    return folder


def short_folder(name: str) -> Path:
    """A folder whose name is short enough for the sockets of a lab."""
    return Path(os.environ.get("TMPDIR", "/tmp"), f"fivefold-{name}-{os.getpid()}")


@pytest.fixture(scope="module")
def ssh_lab(root: Path, mirror: Path, pristine: Path) -> Iterator[SshLab]:
    """Hosts that see neither this checkout, nor its copies, nor the datasets: what they use was sent to them."""
    folder = short_folder("everywhere")
    hide = [str(root), str(mirror), str(pristine.parent)]
    try:
        with running(SshLab(folder, hosts=4, hide=hide, keep=[sys.prefix])) as lab:
            for host in lab.hosts:
                (host.root / "checkout").mkdir()
                (host.root / "checkout" / ".venv").symlink_to(sys.prefix)  # what `provision` would have made
                (host.root / ".fivefold.json").write_text("{}")
            yield lab
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def same_results(one: Path, other: Path, run: Path = RUN) -> None:
    """The tables and verdicts of a figure are the same, and nothing was tried for it but what was tried for `one`."""
    for name in ("table.csv", "claims.json"):
        assert (one / run / name).exists() == (other / run / name).exists()
        if (one / run / name).exists():
            assert (one / run / name).read_bytes() == (other / run / name).read_bytes()
    assert trials_of(one / run) == trials_of(other / run)
    assert run != RUN or trials_of(one / run)


def trials_of(run: Path) -> set[str]:
    """The trials that a figure came from, all of them there."""
    histories = [path.read_text().splitlines() for path in run.glob("series/*.history.jsonl")]
    names = {json.loads(line)["trial"] for history in histories for line in history}
    assert all((run.parents[2] / "trials" / name / "metrics.json").exists() for name in names)
    return names


def test_over_ssh(
    here: Path,
    new_copy: Callable[[str], Path],
    ssh_lab: SshLab,
    smoke: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = new_copy("ssh")
    secret = "-".join(["hush", "hush", str(os.getpid())])
    monkeypatch.setenv("SECRET_OF_TEST", secret)
    ssh_lab.inventory(copy / "hosts" / "lab.yaml", environment={"MY_TOKEN": "env:SECRET_OF_TEST"})
    config = (*smoke, "inventory=hosts/lab.yaml", "--cores", "4")
    where = ["--inventory", str(copy / "hosts" / "lab.yaml"), "--results", str(copy / "results")]
    ssh_lab.python(["-m", "harness.provision", *where, "--until", "facts"])
    dag = snakemake(copy, FIGURE, *config, "--dag", lab=ssh_lab)
    said = snakemake(copy, FIGURE, *config, lab=ssh_lab)
    same_results(here, copy)
    places = [copy, ssh_lab.logs, *(host.root for host in ssh_lab.hosts)]
    kept = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert secret not in dag + said and not [path for path in kept if secret.encode() in path.read_bytes()]
    told = [json.loads(path.read_text()) for path in copy.glob("results/trials/*/provenance.json")]
    assert len({origin["host"] for origin in told}) >= 2, "the series of one run spread over the hosts"
    for origin in told:
        facts = json.loads((copy / "results" / "hosts" / f"{origin['host']}.json").read_text())
        assert origin["facts"] == facts and facts["hostname"] == origin["host"]
    for host in ssh_lab.hosts:
        assert not list(host.root.glob("jobs/*")), "a job that is done leaves nothing but code and data"
    before = (copy / RUN / "table.csv").stat().st_mtime_ns
    assert "Nothing to be done" in snakemake(copy, FIGURE, *config, lab=ssh_lab)
    assert "Nothing to be done" in snakemake(copy, FIGURE, *smoke), "where a job ran does not decide whether it runs again"
    assert (copy / RUN / "table.csv").stat().st_mtime_ns == before


def test_hosts_that_die_or_fill_their_disks_are_replaced_and_nothing_they_finished_is_run_again(
    here: Path, new_copy: Callable[[str], Path], ssh_lab: SshLab, smoke: tuple[str, ...]
) -> None:
    copy = new_copy("dying")
    ssh_lab.inventory(copy / "hosts" / "lab.yaml")
    inventory = yaml.safe_load((copy / "hosts" / "lab.yaml").read_text())
    inventory["hosts"] = inventory["hosts"][:3]
    (copy / "hosts" / "lab.yaml").write_text(yaml.safe_dump(inventory))
    argv = ssh_lab.command(command(FIGURE, *smoke, "inventory=hosts/lab.yaml", "--cores", "3"), copy)
    environment = {**os.environ, **ssh_lab.environment}
    run = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    try:
        for line in run.stdout:
            if "probes, best" in line:  # the first trials are done
                break
        ssh_lab.kill("node02")
        ssh_lab.fill_disk("node01")
        said = run.communicate(timeout=300)[0]
    finally:
        run.kill()
        ssh_lab.free_disk("node01")
        ssh_lab.boot("node02")
    assert run.returncode == 0, said
    assert "on node02: " in said and "what it had finished is kept" in said
    same_results(here, copy)


@pytest.fixture
def slurm_lab() -> Iterator[SlurmLab]:
    folder = short_folder("cluster")
    try:
        with running(SlurmLab(folder, nodes=2)) as lab:
            yield lab
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_all_of_it_on_a_cluster(
    here: Path, new_copy: Callable[[str], Path], slurm_lab: SlurmLab, smoke: tuple[str, ...]
) -> None:
    """`snakemake all --profile slurm`. A job costs two more starts of Snakemake, so here a handful of jobs has to do."""
    copy = new_copy("slurm")
    series = len(list(here.glob("results/*/*/*/series/*.parquet")))
    together = max(4, math.ceil(series / 4))
    said = snakemake(copy, "all", "--profile", "slurm", *smoke, "--group-components", f"series={together}", lab=slurm_lab)
    tables = sorted(path.parent.relative_to(here) for path in here.glob("results/*/*/*/table.csv"))
    assert tables == sorted(path.parent.relative_to(copy) for path in copy.glob("results/*/*/*/table.csv"))
    for run in tables:
        same_results(here, copy, run)
    jobs = (slurm_lab.logs / "jobs.txt").read_text().splitlines()
    assert len(jobs) == math.ceil(series / together) and all("JobState=COMPLETED " in job for job in jobs), said
    hosts = {json.loads(path.read_text())["host"] for path in copy.glob("results/trials/*/provenance.json")}
    assert hosts <= set(slurm_lab.nodes), "no trial ran beside Slurm"


PACKAGES: tuple[str, ...] = (
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "typing_extensions.py",
    "yaml",
    "_yaml",
    "tqdm",
)
PACKAGES += ("numpy", "numpy.libs", "pyarrow", "pyarrow.libs")


def image(docker: Callable[..., str], folder: Path) -> str:
    """An image with what a series needs: the lab's own Python, and the packages of the environment that the tests run in."""
    (folder / "packages").mkdir(parents=True)
    site = Path(sysconfig.get_paths()["platlib"])
    for name in PACKAGES:
        if (site / name).is_dir():
            shutil.copytree(site / name, folder / "packages" / name, ignore=shutil.ignore_patterns("__pycache__", "tests"))
        elif (site / name).exists():
            shutil.copy(site / name, folder / "packages")
    changes = [f"--change=ENV {name}={value}" for name, value in base_image.ENVIRONMENT.items()]
    docker("import", *changes, str(base_image.cached()), base_image.NAME)
    lines = [f"FROM {base_image.NAME}", "COPY packages /usr/local/lib/python3.11/dist-packages"]
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
    docker("build", "-q", "-t", "fivefold-test/series:1", str(folder))
    return "fivefold-test/series:1"


class Boxes:
    """A host of an SSH lab with a Docker Engine of its own, which has an image for series."""

    def __init__(self, lab: SshLab, engine: Engine, folder: Path) -> None:
        self.lab, self.engine = lab, engine
        self.environment = {"DOCKER_HOST": f"unix://{engine.socket}", "DOCKER_CONFIG": str(folder), "DOCKER_BUILDKIT": "0"}
        self.image = image(self.docker, folder / "context")

    def docker(self, *words: str) -> str:
        environment = {**os.environ, **self.environment}
        return processes.run(["docker", *words], environment=environment, timeout_s=300).stdout

    def inventory(self, path: Path, **host: object) -> str:
        """Write an inventory of one host, in whose containers jobs run; its path for `--config`."""
        runner = {"kind": "container", "image": self.image}
        path.write_text(yaml.safe_dump({"hosts": [{"name": "boxed", "runner": runner, **host}]}))
        return f"inventory={path}"

    def far(self) -> dict[str, object]:
        """What an inventory says of the host."""
        host = self.lab.hosts[0]
        reached = {"address": host.address, "user": host.user, "key_file": str(host.key_file), "host_key": host.host_key}
        return {**reached, "work_dir": str(host.work_dir)}

    def left(self) -> list[str]:
        """Containers, running or not, and processes of jobs on the host."""
        found = self.lab.on("node01", ["ps", "-e", "-o", "args"]).stdout.splitlines()
        return self.docker("ps", "-aq").split() + [line for line in found if "harness.series" in line]


@pytest.fixture(scope="module")
def boxes(root: Path, mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    folder = short_folder("boxes")
    try:
        with running(SshLab(folder, hosts=1, hide=[str(root), str(mirror)])) as lab:
            with skipping():
                made = Boxes(lab, lab.start_engine("node01"), tmp_path_factory.mktemp("boxes"))
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ran_in_the_image(copy: Path, boxes: Boxes) -> None:
    """The trials say in which image they ran."""
    identity = boxes.docker("image", "inspect", "--format", "{{.Id}}", boxes.image).strip()
    told = {json.loads(path.read_text())["image"] for path in copy.glob("results/trials/*/provenance.json")}
    assert told == {f"{boxes.image}@{identity}"}


def test_in_a_container(
    here: Path, new_copy: Callable[[str], Path], boxes: Boxes, tmp_path: Path, smoke: tuple[str, ...]
) -> None:
    copy = new_copy("container")
    inventory = boxes.inventory(copy / "hosts" / "boxed.yaml", local=True, work_dir=str(tmp_path / "boxed"))
    snakemake(copy, FIGURE, *smoke, inventory, more=boxes.environment)
    assert not boxes.left()
    same_results(here, copy)
    ran_in_the_image(copy, boxes)


def test_in_a_container_on_a_host_over_ssh_also_when_the_controller_is_killed_meanwhile(
    here: Path, new_copy: Callable[[str], Path], boxes: Boxes, smoke: tuple[str, ...]
) -> None:
    copy = new_copy("far-container")
    inventory = boxes.inventory(copy / "hosts" / "boxed.yaml", **boxes.far())
    config = (*smoke, inventory)
    assert "image fivefold-test/series:1 is there" in snakemake(copy, "provision", "--config", inventory, lab=boxes.lab)
    argv = boxes.lab.command(command(FIGURE, *config), copy)
    run = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: list(copy.glob("results/trials/[!.]*/metrics.json")) and boxes.docker("ps", "-q"), 60)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    until(lambda: not boxes.left(), 15)
    finished = {path: path.stat().st_mtime_ns for path in copy.glob("results/trials/[!.]*/metrics.json")}
    snakemake(copy, FIGURE, *config, lab=boxes.lab)
    assert not boxes.left() and not list(boxes.lab.hosts[0].root.glob("jobs/*"))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what had come back was not run again"
    same_results(here, copy)
    ran_in_the_image(copy, boxes)
    facts = json.loads((copy / "results" / "hosts" / "boxed.json").read_text())
    assert facts["engines"] == ["docker"] and facts["hostname"] == "node01"


def test_an_image_that_the_host_lacks_is_said_in_one_line(
    new_copy: Callable[[str], Path], boxes: Boxes, smoke: tuple[str, ...]
) -> None:
    copy = new_copy("no-image")
    inventory = boxes.inventory(copy / "hosts" / "boxed.yaml", **boxes.far())
    path = copy / "hosts" / "boxed.yaml"
    path.write_text(path.read_text().replace(boxes.image, "127.0.0.1:9/nonesuch:1"))
    argv = boxes.lab.command(command("provision", "--config", inventory), copy)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "nonesuch" in line]
    assert len(lines) == 1 and lines[0].startswith("boxed  FAILED: image 127.0.0.1:9/nonesuch:1 cannot be had")
    argv = boxes.lab.command(command(FIGURE, *smoke, inventory, "--cores", "1"), copy)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    last = next(line for line in done.stderr.splitlines() if "none could finish" in line)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "exit status 125: Error response from daemon: " in last and "connection refused" in last, last
    assert not boxes.left()


def until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
