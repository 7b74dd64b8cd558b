"""The doctor: what counts as missing, what as optional, and that it works where nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import checks, doctor
from harness.checks import Finding, Level, Pin, Place
from systems.registry import InputError

LOCK = """\
# made by a tool
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:00
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:01
pyreadline3==3.5.6 ; sys_platform == 'win32' \\
    --hash=sha256:02
tqdm==4.70.1
"""


def levels(*findings: Finding) -> list[str]:
    return [str(finding.level) for finding in findings]


def test_pins_are_read_with_their_markers() -> None:
    assert checks.pins(LOCK) == [
        Pin("numpy", "2.4.6", "python_full_version < '3.12'"),
        Pin("numpy", "2.5.5", "python_full_version >= '3.12'"),
        Pin("pyreadline3", "3.5.6", "sys_platform == 'win32'"),
        Pin("tqdm", "4.70.1"),
    ]
    assert [pin.name for pin in checks.pins(LOCK) if pin.applies()] == ["numpy", "tqdm"]


def test_packages_that_are_absent_are_missing_and_others_are_named() -> None:
    wanted = [Pin("a", "1"), Pin("b", "2")]
    (fine,) = checks.check_packages(wanted, {"a": "1", "b": "2"}.get)
    assert (fine.level, fine.found) == (Level.OK, "2 of 2 as in requirements.lock")
    (other,) = checks.check_packages(wanted, {"a": "1", "b": "3"}.get)
    assert other.level is Level.OPTIONAL and "b 3 (lock: 2)" in other.found
    absent, _other = checks.check_packages(wanted, {"b": "3"}.get)
    assert absent.level is Level.MISSING and absent.found == "not installed: a" and "make" in absent.mend


def test_python_is_judged_by_its_version() -> None:
    assert levels(*map(checks.check_python, [(3, 10), (3, 11), (3, 13), (3, 99)])) == ["missing", "ok", "ok", "optional"]


def test_torch_is_required_for_the_measured_backend_only() -> None:
    found = [checks.check_torch(version, backend) for version in ("2.13.0", None) for backend in ("simulated", "measured")]
    assert levels(*found) == ["ok", "ok", "optional", "missing"]


def test_gpus_are_counted_by_name() -> None:
    assert checks.check_gpus([]).level is Level.OPTIONAL
    two = checks.check_gpus([{"name": "NVIDIA H200", "driver": "580.1"}] * 2)
    assert (two.level, two.found) == (Level.OK, "2 x NVIDIA H200, driver 580.1")


def test_a_commit_should_be_clean() -> None:
    states = [{"commit": c, "dirty": d} for c, d in (("a" * 40, False), ("a" * 40, True), ("unknown", "unknown"))]
    assert levels(*map(checks.check_commit, states)) == ["ok", "optional", "optional"]


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    assert checks.check_writable(tmp_path / "new" / "results").level is Level.OK
    assert not (tmp_path / "new").exists() and not list(tmp_path.iterdir())
    assert checks.check_writable(Path("/proc/none")).level is Level.MISSING
    assert "GiB" in checks.check_disk(tmp_path / "new").found


def test_a_program_that_hangs_or_fails_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in (("docker", "exit 1"), ("ssh", "echo OpenSSH_9 >&2")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    docker, slurm, ssh = checks.check_tools()
    assert levels(docker, slurm, ssh) == ["optional", "optional", "ok"]
    assert (docker.found, slurm.found, ssh.found) == ("no answer", "not here", "OpenSSH_9")


def test_datasets_that_a_figure_needs_are_checked_by_their_bytes(root: Path, mirror: Path, tmp_path: Path) -> None:
    figures, needed = checks.check_figures(root)
    assert levels(*figures) == ["ok"] and "sharegpt_lengths" in needed
    place = Place(root, tmp_path, tmp_path, mirror=mirror)
    found = {finding.what: finding for finding in checks.check_datasets(place, frozenset({"sharegpt_lengths"}))}
    assert found["sharegpt_lengths"].found == "in the mirror, checksum right"


def test_a_damaged_dataset_is_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.datasets import load_registry

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in load_registry().entry("sharegpt_lengths").parts():
        (tmp_path / part.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part.path).write_text("wrong")
    place = Place(root, tmp_path, tmp_path, mirror=tmp_path)
    found = {finding.what: finding for finding in checks.check_datasets(place, frozenset({"sharegpt_lengths"}))}
    assert found["sharegpt_lengths"].level is Level.MISSING and "sha256" in found["sharegpt_lengths"].found


@pytest.mark.parametrize(
    ("where", "offline", "level"),
    [
        ("cache", True, Level.OK),
        ("download or stand-in", False, Level.OK),
        ("download or stand-in", True, Level.OPTIONAL),
        ("download", True, Level.MISSING),
        ("ask or stand-in", False, Level.OPTIONAL),
        ("ask", False, Level.MISSING),
        ("nowhere", False, Level.MISSING),
    ],
)
def test_where_a_dataset_is_decides_how_bad_it_is(where: str, offline: bool, level: Level) -> None:
    assert checks.check_dataset("d", where, offline).level is level


def test_a_figure_file_that_is_wrong_is_missing_and_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "figures" / "spotserve").mkdir(parents=True)
    (tmp_path / "figures" / "spotserve" / "x.yaml").write_text("titel: x\n")
    (bad, none), needed = checks.check_figures(tmp_path)
    assert bad.level is Level.MISSING and "titel" in bad.found and none.found == "0 usable" and not needed


def test_a_finding_says_all_that_an_error_says() -> None:
    finding = checks.from_error("hosts", InputError("f.yaml", "key", 1, "mend it"))
    assert (finding.level, finding.found) == (Level.MISSING, "f.yaml: key: 1: mend it")


def test_the_table_is_aligned_and_sums_up() -> None:
    lines = doctor.table([Finding(Level.OK, "a", "x"), Finding(Level.MISSING, "longer", "y", "mend")]).splitlines()
    assert lines == ["ok        a       x", "missing   longer  y: mend", "1 missing: see above"]
    assert doctor.table([Finding(Level.OPTIONAL, "a", "x")]).splitlines()[-1] == "everything that is required is here"


def run(root: Path, *arguments: str, python: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [*python, "-m", "harness.doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_a_configuration_or_inventory_that_is_wrong_is_missing(root: Path, tmp_path: Path) -> None:
    config, hosts = tmp_path / "config.yaml", tmp_path / "hosts.yaml"
    config.write_text("bakend: simulated\n")
    hosts.write_text("hosts: [{name: a}]\n")
    done = run(root, "--config", str(config), "--inventory", str(hosts))
    assert done.returncode == 1, done.stderr
    assert "did you mean backend?" in done.stdout and "hosts.0.address" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 missing: see above"


def test_it_works_without_a_single_package(root: Path) -> None:
    done = run(root, python=(sys.executable, "-S"))
    assert done.returncode == 1 and done.stderr == ""
    assert "missing   packages" in done.stdout and "snakemake" in done.stdout
    assert "cannot be checked: No module named" in done.stdout
