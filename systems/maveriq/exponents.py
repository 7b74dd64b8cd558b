"""The authors' fitted exponents, from `data/exponents.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from systems.maveriq.configuration import Precision
from systems.maveriq.law import Exponents

_FILE = Path(__file__).parent / "data" / "exponents.yaml"
METHODS = ("fingerprint", "full_model")


@cache
def published_exponents(method: str = "fingerprint") -> Mapping[Precision, Exponents]:
    """The exponents per (dtype, int8_kv) that the authors fitted by `method`, one of `METHODS`."""
    assert method in METHODS, method
    rows = yaml.safe_load(_FILE.read_text(encoding="utf-8"))[method]
    return {(row["dtype"], row["int8_kv"]): Exponents(row["alpha"], row["beta"], row["gamma"], row["delta"]) for row in rows}
