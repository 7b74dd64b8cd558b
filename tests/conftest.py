"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The folder of real data files: `FIVEFOLD_MIRROR`, else `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("FIVEFOLD_MIRROR", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data mirror at {folder}: set FIVEFOLD_MIRROR")
    return folder


def pytest_xdist_auto_num_workers() -> int:
    """Two workers for each core under `-n auto`: tests against real servers spend more time waiting than computing."""
    return 2 * (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
