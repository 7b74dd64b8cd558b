"""A copy of the project in which a fake system stands for the real ones, and real `snakemake` commands in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FAKES = Path(__file__).resolve().parent.parent / "fakes"
COPIED = (
    "Snakefile",
    "workflows",
    "profiles",
    "config",
    "harness",
    "figures",
    "datasets",
    "hosts",
    "systems/__init__.py",
    "systems/registry.py",
)


@dataclass
class Project:
    """The copy: `root` is its folder, `environment` goes over ours in its commands."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def figure(self) -> Path:
        return self.root / "figures" / "fake" / "knee.yaml"

    @property
    def results(self) -> Path:
        return self.root / "results" / "paper-simulated" / "fake" / "knee"

    @property
    def log(self) -> Path:
        return self.root / "ran.log"

    def ran(self) -> list[str]:
        """What the fake system has run, in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "FAKE_LOG": str(self.log), **self.environment}
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def build(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """As `snakemake`, for what must go well."""
        done = self.snakemake(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def edit(self, path: Path | str, old: str, new: str) -> None:
        file = self.root / path
        text = file.read_text()
        assert old in text, (path, old)
        file.write_text(text.replace(old, new, 1))

    def outputs(self) -> Mapping[str, bytes]:
        """The bytes of what a user looks at."""
        return {name: (self.results / name).read_bytes() for name in ("table.csv", "knee.pdf", "search.pdf", "claims.json")}


@pytest.fixture
def new_project(root: Path, tmp_path: Path) -> Callable[[str], Project]:
    def new(name: str) -> Project:
        copy = tmp_path / name
        for part in COPIED:
            (copy / part).parent.mkdir(parents=True, exist_ok=True)
            if (root / part).is_dir():
                shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(root / part, copy / part)
        for module in ("__init__", "core", "errors"):
            (copy / "systems" / "common").mkdir(exist_ok=True)
            shutil.copy(root / "systems" / "common" / f"{module}.py", copy / "systems" / "common")
        for figure in (copy / "figures").glob("*/*.yaml"):
            figure.unlink()
        shutil.copytree(FAKES / "fake", copy / "systems" / "fake", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "figures" / "fake").mkdir()
        shutil.copy(FAKES / "knee.yaml", copy / "figures" / "fake")
        project = Project(copy)
        project.edit("systems/registry.py", '    "sirius"', '    "fake": "A fake (nowhere)",\n    "sirius"')
        project.edit("config/config.yaml", "offline: false", "offline: true")
        return project

    return new


@pytest.fixture
def project(new_project: Callable[[str], Project]) -> Project:
    return new_project("project")
