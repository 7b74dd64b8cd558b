"""What datasets/registry.yaml says about a dataset, as far as a workload needs it: its reader and its stand-in.

The registry is the harness' (harness/datasets.py validates, finds and downloads); here it is only data beside the code,
so that a trial can be run, and a dataset's stand-in made, with nothing but a dataset's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from systems.common.errors import InputError
from systems.common.workloads.readers import READERS, Recorded

REGISTRY = Path(__file__).resolve().parents[3] / "datasets" / "registry.yaml"


@dataclass(frozen=True, slots=True)
class Entry:
    """How to read a dataset (None: not a workload) and the statistics of its stand-in (None: it has none)."""

    reader: str | None
    stand_in: Mapping[str, object] | None


@lru_cache(maxsize=4)
def catalogue(registry: Path = REGISTRY) -> Mapping[str, Entry]:
    """All datasets of the registry, by name."""
    with registry.open("rb") as file:
        content = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {name: Entry(spec.get("reader"), spec.get("stand_in")) for name, spec in content["datasets"].items()}


def entry(name: str) -> Entry:
    """The registry's entry for dataset `name`.

    Raises InputError when there is none.
    """
    known = catalogue()
    if name not in known:
        raise InputError(REGISTRY.name, "dataset", name, f"use one of {', '.join(sorted(known))}")
    return known[name]


def read(name: str, path: Path) -> Recorded:
    """Dataset `name` from its file. Kept in memory until the file changes: a series job runs many trials on one dataset.

    Raises InputError when the dataset is no workload, or its file is unusable.
    """
    reader = entry(name).reader
    if reader not in READERS:
        raise InputError("workload", "dataset", name, "it holds no requests: choose a dataset with a reader")
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(
            path, "dataset", name, f"can't be read ({error.strerror}): run the target that fetches it again"
        ) from error
    return _cached(reader, path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _cached(reader: str, path: Path, _mtime_ns: int, _size: int) -> Recorded:
    return READERS[reader](path)
