"""A copy of the project to run commands in, so that nothing is written into the checkout and runs do not meet."""

from __future__ import annotations

import shutil
from pathlib import Path

PARTS = (
    *("Snakefile", "workflows", "profiles", "config", "hosts", "harness", "figures", "datasets", "systems", "docs"),
    *("pyproject.toml", "requirements.lock"),
)


def copy_project(root: Path, to: Path) -> Path:
    for part in PARTS:
        if (root / part).is_dir():
            shutil.copytree(root / part, to / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / part, to / part)
    return to
