"""The version of a part of the code: a hash of its bytes, so that a result knows what made it without any git.

A change to Python or data files counts, a change to documentation (`.md`) does not.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXECUTING = "systems/common/torch_engine"
"""Code that only measured trials run: a change of it must not rerun the simulated ones."""
CODE = frozenset({".py", ".yaml", ".yml", ".json", ".csv", ".toml", ".cu", ".cuh", ".cpp", ".c", ".h"})


def calibrations() -> list[str]:
    """The folders of what was measured on GPUs for the simulator, relative to the root."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("reference/*/calibrated"))


def system_version(system: str) -> str:
    """The version of all code and built-in data (stand-ins, calibrations) that decide what a trial of `system` gives.

    Measured trials depend on `executing_version` besides.
    """
    return code_version("systems/common", f"systems/{system}", "datasets/registry.yaml", *calibrations())


def executing_version(backend: str) -> list[str]:
    """The version of the code that runs models, for the `measured` backend; nothing for the others."""
    return [_executing()] if backend == "measured" else []


@cache
def _executing() -> str:
    return _version((ROOT / EXECUTING,))


@cache
def code_version(*parts: str) -> str:
    """SHA-256 over the paths and bytes of all code in `parts`, files or folders relative to the root; without `EXECUTING`."""
    return _version(tuple(ROOT / part for part in parts), without=ROOT / EXECUTING)


def _version(parts: tuple[Path, ...], without: Path | None = None) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for path in _code_files(part, without):
            data = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()


def _code_files(path: Path, without: Path | None = None) -> list[Path]:
    if path.is_file():
        return [path]
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if name != "__pycache__" and Path(folder, name) != without]
        found += [Path(folder, name) for name in files if Path(name).suffix in CODE]
    return sorted(found)
