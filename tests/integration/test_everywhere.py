"""The same figure on this machine, over SSH, in containers and on a cluster: the same bytes in its table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.copies import copy_project
from tests.labs import LabUnavailableError
from tests.labs.docker_lab import DockerLab
from tests.labs.lab import Lab
from tests.labs.slurm_lab import SlurmLab
from tests.labs.ssh_lab import SshLab

pytestmark = pytest.mark.slow

RUN = Path("results", "paper-simulated-smoke", "llmstation", "fig8a")


@pytest.fixture(scope="module")
def new_copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def new(name: str) -> Path:
        copy = copy_project(root, tmp_path_factory.mktemp(name, numbered=True))
        shutil.copytree(root / "slurm", copy / "slurm")
        return copy

    return new


def snakemake(copy: Path, *arguments: str, lab: Lab | None = None, **more: str) -> str:
    argv = [sys.executable, "-m", "snakemake", "llmstation_fig8a", *arguments]
    command = lab.command(argv, copy) if lab else argv
    environment = {**os.environ, **(lab.environment if lab else {}), **more}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


SMOKE = ("--config", "scale=smoke", "offline=true")


@pytest.fixture(scope="module")
def here(new_copy: Callable[[str], Path]) -> Path:
    """The figure made on this machine."""
    copy = new_copy("here")
    snakemake(copy, *SMOKE)
    return copy


@pytest.fixture(scope="module")
def ssh_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshLab]:
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"fivefold-everywhere-{os.getpid()}")
    try:
        with SshLab(folder, hosts=4) as lab:
            for host in lab.hosts:
                (host.root / "checkout").mkdir()
                (host.root / "checkout" / ".venv").symlink_to(sys.prefix)  # what `provision` would have made
            yield lab
    except LabUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def same_results(one: Path, other: Path) -> None:
    for name in ("table.csv", "claims.json"):
        assert (one / RUN / name).read_bytes() == (other / RUN / name).read_bytes()
    names = [sorted(path.name for path in (copy / "results" / "trials").iterdir()) for copy in (one, other)]
    assert names[0] == names[1]


def test_over_ssh(here: Path, new_copy: Callable[[str], Path], ssh_lab: SshLab) -> None:
    copy = new_copy("ssh")
    ssh_lab.inventory(copy / "hosts" / "lab.yaml")
    config = (*SMOKE, "inventory=hosts/lab.yaml", "--cores", "4")
    snakemake(copy, *config, lab=ssh_lab)
    same_results(here, copy)
    hosts = {path.read_text() for path in copy.glob("results/trials/*/provenance.json")}
    ran_on = {node for text in hosts for node in ssh_lab.nodes if f'"host": "{node}"' in text}
    assert len(ran_on) >= 2, "the series of one run spread over the hosts"
    for host in ssh_lab.hosts:
        assert not list(host.root.glob("jobs/*")), "a job that is done leaves nothing but code and data"
    before = (copy / RUN / "table.csv").stat().st_mtime_ns
    assert "Nothing to be done" in snakemake(copy, *config, lab=ssh_lab)
    assert "Nothing to be done" in snakemake(copy, *SMOKE), "where a job ran does not decide whether it runs again"
    assert (copy / RUN / "table.csv").stat().st_mtime_ns == before


def test_a_host_that_dies_is_replaced_and_nothing_it_finished_is_run_again(
    here: Path, new_copy: Callable[[str], Path], ssh_lab: SshLab
) -> None:
    copy = new_copy("dying")
    ssh_lab.inventory(copy / "hosts" / "lab.yaml")
    inventory = yaml.safe_load((copy / "hosts" / "lab.yaml").read_text())
    inventory["hosts"] = inventory["hosts"][:2]
    (copy / "hosts" / "lab.yaml").write_text(yaml.safe_dump(inventory))
    argv = [sys.executable, "-m", "snakemake", "llmstation_fig8a", *SMOKE, "inventory=hosts/lab.yaml", "--cores", "2"]
    command = ssh_lab.command(argv, copy)
    environment = {**os.environ, **ssh_lab.environment}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    try:
        for line in run.stdout:
            if "probes, best" in line:  # the first trials are done
                break
        ssh_lab.kill("node02")
        said = run.communicate(timeout=300)[0]
    finally:
        run.kill()
        ssh_lab.boot("node02")
    assert run.returncode == 0, said
    same_results(here, copy)


def test_on_a_cluster(here: Path, new_copy: Callable[[str], Path]) -> None:
    copy = new_copy("slurm")
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"fivefold-cluster-{os.getpid()}")
    try:
        with SlurmLab(folder, nodes=2) as lab:
            snakemake(copy, "--profile", "slurm", *SMOKE, lab=lab)
    except LabUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    same_results(here, copy)


PACKAGES = (
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


def image(lab: DockerLab, folder: Path) -> str:
    """An image with what a series needs: the lab's own Python, and the packages of the environment that the tests run in."""
    (folder / "packages").mkdir(parents=True)
    site = Path(sysconfig.get_paths()["platlib"])
    for name in PACKAGES:
        if (site / name).is_dir():
            shutil.copytree(site / name, folder / "packages" / name, ignore=shutil.ignore_patterns("__pycache__", "tests"))
        elif (site / name).exists():
            shutil.copy(site / name, folder / "packages")
    lines = [f"FROM {lab.base_image()}", "COPY packages /usr/local/lib/python3.11/dist-packages"]
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
    lab.run(["docker", "build", "-q", "-t", "fivefold-test/series:1", str(folder)], timeout_s=300)
    return "fivefold-test/series:1"


def test_in_a_container(here: Path, new_copy: Callable[[str], Path], tmp_path: Path) -> None:
    copy = new_copy("container")
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"fivefold-boxed-{os.getpid()}")
    try:
        with DockerLab(folder) as lab:
            runner = {"kind": "container", "image": image(lab, tmp_path / "context")}
            boxed = {"name": "boxed", "local": True, "runner": runner, "work_dir": str(tmp_path / "boxed")}
            (copy / "hosts" / "boxed.yaml").write_text(yaml.safe_dump({"hosts": [boxed]}))
            snakemake(copy, *SMOKE, "inventory=hosts/boxed.yaml", lab=lab)
            assert not lab.run(["docker", "ps", "-aq"]).stdout.strip(), "no container is left"
    except LabUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    same_results(here, copy)
