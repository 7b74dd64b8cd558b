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
