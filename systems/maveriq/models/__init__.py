"""What the search knows of a model by configuration alone: unsupported configurations and accuracy, as data (2.7)."""

from __future__ import annotations

from systems.maveriq.models.support import AccuracyTable, Support, load_support

__all__ = ["AccuracyTable", "Support", "load_support"]
