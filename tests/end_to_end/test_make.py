"""`make` from outside: every target it promises, from any folder, without building a whole environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.copies import copy_project

pytestmark = pytest.mark.slow

TARGETS = ("fig8a", "spotserve_table1", "all", "claims", "doctor", "test", "lint", "torch", "clean", "help")


def make(root: Path, *arguments: str, cwd: Path | None = None) -> str:
    command = ["make", "-f", str(root / "Makefile"), *arguments]
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # `make test` runs these too
    done = subprocess.run(command, cwd=cwd or root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_would_run_in_the_checkout_whatever_the_folder(root: Path, tmp_path: Path, target: str) -> None:
    shown = make(root, "-n", target, cwd=tmp_path)
    assert shown == make(root, "-n", target)
    assert str(root) in shown
    assert not list(tmp_path.iterdir())


def test_help_names_every_target(root: Path) -> None:
    shown = make(root, "help")
    assert all(re.search(rf"^  make {target}\b", shown, re.MULTILINE) for target in TARGETS)


def test_the_environment_comes_before_the_work(root: Path) -> None:
    for target, kind, work in (
        ("fig8a", "runtime", "snakemake fig8a"),
        ("test", "test", "-m pytest"),
        ("lint", "test", "mypy"),
    ):
        shown = make(root, "-n", target)
        assert 0 < shown.index(f"environment.py {kind}") < shown.index(work)
        assert "torch" not in shown
    assert "-m snakemake all --config scale=smoke" in make(root, "-n", "all", "ARGS=--config scale=smoke")


def test_a_python_that_was_named_is_the_only_one_asked(root: Path) -> None:
    assert ".venv/bin/python" not in make(root, "-n", "environment", "PYTHON=python3.12").partition("environment.py")[0]
    assert ".venv/bin/python" in make(root, "-n", "environment").partition("environment.py")[0]


@pytest.mark.parametrize("command", ["harness.doctor", "snakemake doctor"])
def test_the_doctor_misses_nothing_where_the_tests_run(root: Path, tmp_path: Path, command: str) -> None:
    argv = [sys.executable, "-m", *command.split()]
    copy = copy_project(root, tmp_path)
    done = subprocess.run(argv, cwd=copy, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything that is required is here" in done.stdout
    assert re.search(r"^ok +Python ", done.stdout, re.MULTILINE)


def test_ci_is_a_script_that_bash_understands_and_asks_for_no_input(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text and "make test" in text and "make lint" in text
    assert 0 < int(re.findall(r"^DEADLINE=(\d+)", text, re.MULTILINE)[0]) <= 25 * 60
    assert not re.search(r"^(?!.*\bwithin \d+ ).*\b(make|apt-get) [a-z]", re.sub(r"#.*", "", text), re.MULTILINE)
