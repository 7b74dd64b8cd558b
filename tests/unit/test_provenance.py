"""Where a result comes from: commit, machine, versions of the code."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from harness import code_version as versions
from harness import provenance
from harness.code_version import code_version, system_version
from harness.provenance import commit, environment, of_trial


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if not shutil.which("git"):
        pytest.skip("needs git")
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "file").write_text("1")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "m"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_a_clean_and_a_changed_checkout(checkout: Path) -> None:
    clean = commit(checkout)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (checkout / "file").write_text("2")
    assert commit(checkout) == {**clean, "dirty": True}


def test_a_folder_inside_somebody_elses_checkout_has_no_commit(checkout: Path) -> None:
    (checkout / "copy").mkdir()
    assert commit(checkout / "copy") == {"commit": "unknown", "dirty": "unknown"}


def test_without_git_the_commit_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert commit(checkout) == {"commit": "unknown", "dirty": "unknown"}


def test_a_repository_without_commits_has_none(tmp_path: Path) -> None:
    if not shutil.which("git"):
        pytest.skip("needs git")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert commit(tmp_path)["commit"] == "unknown"


def test_a_trial_is_told_completely_and_as_json() -> None:
    told = of_trial({"seed": 3, "datasets": {"d": "abc"}}, {"backend": "simulated"}, 0.0, 1.5)
    assert json.loads(json.dumps(told)) == told
    assert {"commit", "dirty", "packages", "host", "cpu", "gpus", "command", "config", "seed", "datasets"} <= set(told)
    assert (told["start"], told["duration_s"], told["datasets"]) == ("1970-01-01T00:00:00.000+00:00", 1.5, {"d": "abc"})
    assert told["packages"]["numpy"] and told["python"]
    assert environment() is environment()


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1'\necho 'NVIDIA H200, 580.1'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert provenance.gpus.__wrapped__() == [{"name": "NVIDIA H200", "driver": "580.1"}] * 2
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert provenance.gpus.__wrapped__() == []


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part in ("systems/common", "systems/one", "systems/two"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "core.py").write_text(f"# {part}")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    return tmp_path


def version(system: str) -> str:
    code_version.cache_clear()
    return system_version(system)


def test_a_version_changes_with_code_and_data_of_the_system_and_of_what_is_shared(project: Path) -> None:
    before = version("one"), version("two")
    assert before[0] != before[1]
    (project / "systems" / "one" / "README.md").write_text("words")
    (project / "systems" / "one" / "__pycache__").mkdir()
    (project / "systems" / "one" / "__pycache__" / "core.py").write_text("x")
    assert (version("one"), version("two")) == before
    (project / "systems" / "one" / "table.csv").write_text("1")
    assert version("one") != before[0] and version("two") == before[1]
    (project / "systems" / "common" / "core.py").write_text("# changed")
    assert version("two") != before[1]


def test_a_version_does_not_depend_on_where_the_code_lies_but_on_how_files_are_cut(project: Path) -> None:
    before = version("one")
    (project / "systems" / "one" / "core.py").rename(project / "systems" / "one" / "heart.py")
    assert version("one") != before
    code_version.cache_clear()


def test_only_measured_trials_depend_on_the_code_that_runs_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import code_version as versions

    part = tmp_path / "systems" / "common" / "torch_engine"
    part.mkdir(parents=True)
    (part.parent / "core.py").write_text("one = 1\n")
    (part / "model.py").write_text("two = 2\n")
    monkeypatch.setattr(versions, "ROOT", tmp_path)

    def both() -> tuple[str, list[str]]:
        versions.code_version.cache_clear()
        versions._executing.cache_clear()
        return versions.code_version("systems/common"), versions.executing_version("measured")

    before = both()
    (part / "model.py").write_text("two = 3\n")
    after = both()
    versions.code_version.cache_clear()
    versions._executing.cache_clear()
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert versions.executing_version("simulated") == []
