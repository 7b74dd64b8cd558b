"""`python -m benchmarks.host_facts`: what provisioning finds out about a machine, on a bare Python."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# the answers of a real driver (580, CUDA 13.0), shortened
SMI = """#!/bin/sh
case "$*" in
*query-gpu=name,memory*) echo "NVIDIA H200, 143771, 580.65.06, 1980, 3201";;
*) echo "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: 13.0     |";;
esac
"""


def host_facts(root: Path, tmp_path: Path, *words: str, smi: str | None = SMI) -> tuple[int, Any]:
    tools = tmp_path / "tools"
    tools.mkdir()
    if smi:
        (tools / "nvidia-smi").write_text(smi)
        (tools / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    argv = [sys.executable, "-S", "-m", "benchmarks.host_facts", *words, "--out", str(tmp_path / "a" / "facts.json")]
    done = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert not done.stderr, done.stderr
    assert done.stdout == (tmp_path / "a" / "facts.json").read_text()
    return done.returncode, json.loads(done.stdout)


def test_a_machine_with_a_gpu_by_a_bare_python(root: Path, tmp_path: Path) -> None:
    status, told = host_facts(root, tmp_path, "--gpus", "h200x1")
    gpu = {"name": "NVIDIA H200", "memory_mib": 143771.0, "driver": "580.65.06", "sm_mhz": 1980.0, "memory_mhz": 3201.0}
    assert told["facts"]["gpus"] == [gpu] and told["facts"]["cuda"] == "13.0"
    assert told["problems"] == [] and told["summary"].startswith("1 x NVIDIA H200, ")
    assert status == int(bool(told["differs"]))
    assert told["facts"]["free_gib"] == pytest.approx(told["beside"]["free_gib"], rel=0.05)


def test_gpus_that_are_not_there_are_a_problem(root: Path, tmp_path: Path) -> None:
    status, told = host_facts(root, tmp_path, "--gpus", "h200x2", "a100x1")
    assert status == 1 and [line.partition(" (")[0] for line in told["problems"]] == ["1 of 2 x h200", "0 of 1 x a100"]


def test_what_does_not_agree_is_named() -> None:
    from harness.provision import facts

    differences = importlib.import_module("benchmarks.host_facts").differences
    answer = facts.parse("hostname=a\ncpus=2\ngpu=NVIDIA H200, 143771, 580, 1980, 3201\nend=yes\n", 0.0, 0.0)
    beside = {"hostname": "a", "cpus": 4, "driver": "580", "torch_gpus": ["NVIDIA H200"], "torch_memory_mib": [143156.0]}
    assert list(differences(answer.facts, beside)) == ["cpus: 2, and asked otherwise 4"]
    assert list(differences(answer.facts, {"gpus": []})) == ["gpus: ['NVIDIA H200'], and asked otherwise []"]
