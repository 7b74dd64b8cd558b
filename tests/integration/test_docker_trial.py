"""`snakemake containers` with the real images, and a series of a figure in a container: the same table as outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.copies import copy_project
from tests.integration.test_docker import containers, lab  # noqa: F401 (a fixture)
from tests.labs.docker_lab import DockerLab
from tests.labs.errors import LabUnavailableError
from tests.labs.ssh_lab import SshLab

pytestmark = pytest.mark.slow
HERE = f"3.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def project(
    root: Path,
    lab: DockerLab,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A committed copy whose site has a base image of its own and no network for builds; without the image with PyTorch."""
    if HERE != "3.11":
        pytest.skip(f"the lab's base image has Python 3.11, and wheels for it are made by that; this is {HERE}")
    folder = copy_project(root, tmp_path_factory.mktemp("project"))
    shutil.copytree(root / "containers", folder / "containers", dirs_exist_ok=True)
    for name in ("reference", "slurm"):
        shutil.copytree(root / name, folder / name, dirs_exist_ok=True)
    path = folder / "containers" / "images.yaml"
    images = yaml.safe_load(path.read_text())
    del images["images"]["engine-cpu"]
    path.write_text(yaml.safe_dump(images))
    site = {"bases": {"python": lab.base_image(), "cuda": lab.missing_image}, "packages": "wheelhouse", "network": "none"}
    (folder / "containers" / "site.yaml").write_text(yaml.safe_dump({**site, "system_packages": False}))
    snakefile = folder / "Snakefile"
    include = 'include: "workflows/containers.smk"\n'
    if include not in snakefile.read_text():
        snakefile.write_text(snakefile.read_text().replace('include: "workflows/provision.smk"\n', f"{include}\\g", 1)
                             .replace("\\g", 'include: "workflows/provision.smk"\n'))  # fmt: skip
    (folder / ".gitignore").write_text("/results/\n.snakemake/\n__pycache__/\n/containers/site.yaml\n")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)
    return folder


def python(project: Path, docker: DockerLab, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DOCKER_HOST": docker.docker_host, "PYTHONPATH": str(project)}
    return subprocess.run([sys.executable, *argv], cwd=project, env=environment, capture_output=True, text=True, timeout=400)


def test_snakemake_containers_builds_what_can_be_built(project: Path, lab: DockerLab) -> None:  # noqa: F811
    first = python(project, lab, "-m", "snakemake", "containers")
    assert first.returncode == 0, first.stderr
    lines = {line.split()[0]: line for line in first.stderr.splitlines() if line.startswith(("controller", "engine-"))}
    assert set(lines) == {"controller", "engine-cuda"}
    assert "  built  " in lines["controller"]
    assert "  not buildable here  " in lines["engine-cuda"] and "containers/site.yaml" in lines["engine-cuda"]
    second = python(project, lab, "-m", "snakemake", "containers")
    assert second.returncode == 0 and "controller    up to date" in second.stderr
    assert lines["controller"].split()[2] in second.stderr and containers(lab) == []


def test_the_controller_image_holds_a_whole_project(project: Path, lab: DockerLab) -> None:  # noqa: F811
    assert python(project, lab, "-m", "harness.containers", "build", "controller").returncode == 0
    name = python(project, lab, "-m", "harness.containers", "digest", "controller").stdout.partition("@")[0]
    done = lab.run(
        ["docker", "run", "--rm", "--network=none", name, "sh", "-c", "id -u; snakemake -n spotserve_table1 --quiet"]
    )
    assert done.stdout.startswith("10001\n"), done.stderr


@pytest.mark.parametrize(("figure", "series"), [("spotserve/table1", "spotserve"), ("llmstation/fig8a", "llmstation")])
def test_a_series_gives_the_same_table_in_a_container(
    project: Path,
    lab: DockerLab,  # noqa: F811
    mirror: Path,
    figure: str,
    series: str,
) -> None:
    assert python(project, lab, "-m", "harness.containers", "build", "controller").returncode == 0
    names = yaml.safe_load((project / "figures" / f"{figure}.yaml").read_text())["datasets"]
    manifests = [f"results/datasets/{name}.json" for name in names]
    for name, manifest in zip(names, manifests, strict=True):
        done = python(project, lab, "-m", "harness.datasets", name, "--mirror", str(mirror), "--offline", "--out", manifest)
        assert done.returncode == 0, done.stderr
    contained = [
        "-m",
        "harness.containers",
        "run",
        "--datasets",
        str(mirror),
        "--cpus",
        "2",
        "--memory",
        "4g",
        "controller",
        "--",
    ]
    for where, prefix in (("outside", []), ("inside", [*contained, "python"])):
        folder = f"results/{where}/{figure}"
        run = [
            "-m",
            "harness.series",
            "--figure",
            f"figures/{figure}.yaml",
            "--series",
            series,
            "--results",
            f"results/{where}",
        ]
        run += ["--config-json", json.dumps({"scale": "smoke"}), "--datasets", *manifests]
        done = python(project, lab, *prefix, *run, "--out", f"{folder}/{series}.parquet")
        assert done.returncode == 0, done.stderr
    tables = {}
    for where in ("outside", "inside"):
        folder = project / "results" / where / figure
        code = f"import pandas; pandas.read_parquet({str(folder / series)!r} + '.parquet').to_csv({str(folder)!r} + '/t.csv')"
        assert python(project, lab, "-c", code).returncode == 0
        tables[where] = (folder / "t.csv").read_bytes()
    assert tables["inside"] == tables["outside"] and len(tables["inside"].splitlines()) > 1
    trials = {where: sorted(path.name for path in (project / "results" / where / "trials").iterdir()) for where in tables}
    assert trials["inside"] == trials["outside"] != []
    image = python(project, lab, "-m", "harness.containers", "digest", "controller").stdout.strip()
    commit = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for trial in trials["inside"]:
        origin = json.loads((project / "results" / "inside" / "trials" / trial / "provenance.json").read_text())
        assert (origin["image"], origin["commit"]) == (image, commit)
    for path in (project / "results" / "inside").rglob("*"):
        assert path.stat().st_uid == os.getuid()
    assert containers(lab) == []


def test_the_engine_of_another_machine_over_ssh(lab: DockerLab, root: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = lab.folder / "ssh"
    try:
        with SshLab(folder, hosts=1) as hosts:
            environment = {**os.environ, "FIVEFOLD_SSH_CONFIG": str(hosts.ssh_config), "PYTHONPATH": str(root)}
            engine = f"ssh://root@node01{lab.folder}/docker.sock"
            words = [sys.executable, "-m", "harness.containers", "--engine", engine, "run", "--results", str(tmp_path / "r")]
            argv = hosts.command([*words, lab.base_image(), "--", "sh", "-c", "echo far; exit 3"])
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
            assert (done.returncode, done.stdout) == (3, "far\n"), done.stderr
            assert containers(lab) == []
            environment["FIVEFOLD_SSH_CONFIG"] = os.devnull  # so that nobody knows the host's key
            address = hosts.hosts[0].address
            words[words.index(engine)] = f"ssh://root@{address}"
            argv = hosts.command([*words, lab.base_image(), "--", "true"])
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 2 and "Host key verification failed" in done.stderr and done.stderr.count("\n") == 1
    except LabUnavailableError as reason:
        pytest.skip(str(reason))
