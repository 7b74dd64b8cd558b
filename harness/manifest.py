"""A dataset as a job sees it: the manifest that `python -m harness.datasets` has written for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from systems.registry import InputError


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `harness.datasets` found; without a file (`path` None) the synthetic stand-in takes its place."""

    name: str
    path: Path | None
    sha256: str | None
    source: str


def read_manifests(paths: Iterable[Path]) -> dict[str, Manifest]:
    """The manifests in these files, by the name of the dataset.

    Raises:
        InputError: a manifest is unreadable, or the file that it names is gone.
    """
    return {found.name: found for found in map(_read, paths)}


def _read(path: Path) -> Manifest:
    try:
        told = json.loads(path.read_bytes())
        found = Manifest(told["name"], Path(told["path"]) if told["path"] else None, told["sha256"], told["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(path, "manifest", str(error), "delete this file: the next run writes it again") from error
    if found.path and not found.path.exists():
        raise InputError(path, "path", str(found.path), "the dataset is gone: delete this manifest and run again")
    return found
