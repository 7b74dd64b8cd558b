"""Containers: images from templates, built, run with limits, ended and removed, on this machine's engine or another's.

`run` is all that launching needs; `python -m harness.containers --help` is the same for people. docs/containers.md explains.
"""

from harness.containers.runner import IMAGE_VARIABLE, digest, run
from harness.containers.specification import Limits, Mount

__all__ = ["IMAGE_VARIABLE", "Limits", "Mount", "digest", "run"]
