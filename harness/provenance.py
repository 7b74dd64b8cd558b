"""Where a result comes from: the code, the machine, the packages, the inputs.

`environment` is what one process finds out once; `of_trial` adds what belongs to one trial.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from harness.code_version import ROOT

UNKNOWN = "unknown"
PACKAGES = ("numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "scipy", "snakemake", "tqdm", "torch", "transformers", "triton")


@cache
def environment() -> Mapping[str, Any]:
    """Commit, packages, host, CPU and GPUs of this process; `unknown` where the machine does not say."""
    return {
        **commit(ROOT),
        "python": platform.python_version(),
        "packages": _packages(),
        "host": platform.node() or UNKNOWN,
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "gpus": gpus(),
        "facts": json.loads(os.environ.get("FIVEFOLD_FACTS", "null")),  # what `provision` had found out about this host
        "image": os.environ.get("FIVEFOLD_IMAGE"),  # set where a trial runs in a container: its name and digest
        "command": [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]],
    }


def of_trial(spec: Mapping[str, Any], config: Mapping[str, Any], start: float, duration_s: float) -> dict[str, Any]:
    """What `provenance.json` of one trial holds; `start` is seconds since the epoch."""
    started = datetime.fromtimestamp(start, UTC).isoformat(timespec="milliseconds")
    told = {"seed": spec["seed"], "datasets": spec["datasets"], "config": dict(config)}
    return {**environment(), **told, "start": started, "duration_s": round(duration_s, 6)}


def commit(root: Path) -> dict[str, Any]:
    """The git commit of the checkout `root` and whether files differ from it; `unknown` where there is no git to ask.

    On a host to which the code was sent, what the controller said of its checkout: `FIVEFOLD_COMMIT`, with `+` if changed.
    """
    if told := os.environ.get("FIVEFOLD_COMMIT"):
        return {"commit": told.removesuffix("+"), "dirty": UNKNOWN if told == UNKNOWN else told.endswith("+")}
    found = _output(["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]).splitlines()
    if len(found) != 2 or Path(found[0]).resolve() != root.resolve():
        return {"commit": UNKNOWN, "dirty": UNKNOWN}
    status = _output(["git", "-C", str(root), "status", "--porcelain"], fallback=UNKNOWN)
    return {"commit": found[1], "dirty": UNKNOWN if status == UNKNOWN else bool(status.strip())}


@cache
def gpus() -> list[dict[str, str]]:
    """Name and driver of every NVIDIA GPU that `nvidia-smi` lists; none without it."""
    if not shutil.which("nvidia-smi"):
        return []
    lines = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [{"name": row[0], "driver": row[1]} for row in rows if len(row) == 2]


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or UNKNOWN


def _output(command: list[str], fallback: str = "") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return fallback
    return done.stdout if done.returncode == 0 else fallback
