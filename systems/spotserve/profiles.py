"""The offline profiler's result: measured times of one transformer layer, as SpotServe's artifact ships them.

One JSON file per model and node type (`elastic-switch/profile/<node>/<model>.json` in the artifact). Times there are
milliseconds; here everything is seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systems.common.errors import InputError

_MEND = "use a profile of SpotServe's artifact as it was published"


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds that one layer takes: `prefill_s` for 512 input tokens per sequence, `decode_s` for one token per sequence."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one node type.

    `layer_times[M, b]` is one layer under tensor parallelism of degree M with micro-batch b; `embedding_s[b]` the
    embedding for batch b; `stage_prefill_s` and `stage_decode_s` cross one boundary between pipeline stages.
    `padded_layers` is the count that pipeline stages divide. `correction` is the profiler's factor k on the whole.
    """

    name: str
    layers: int
    padded_layers: int
    max_tensor: int
    correction: float
    stage_prefill_s: float
    stage_decode_s: float
    embedding_s: Mapping[int, float]
    layer_times: Mapping[tuple[int, int], LayerTimes]

    @property
    def tensor_degrees(self) -> tuple[int, ...]:
        """Degrees of tensor parallelism that were measured and that the model allows, rising."""
        return tuple(sorted({tensor for tensor, _ in self.layer_times if tensor <= self.max_tensor}))

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that were measured, rising."""
        return tuple(sorted(self.embedding_s))


def read_profile(path: Path) -> Profile:
    """Read one profile.

    Raises:
        InputError: the file is missing, is not JSON, or lacks a number or has one that is not above 0.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, "file", str(error), _MEND) from error
    if not isinstance(raw, dict):
        raise InputError(path, "file", raw, _MEND)
    layers = _count(path, raw, "layer_num")
    layer_times = _layer_times(path, raw)
    return Profile(
        name=str(raw.get("name", path.stem)),
        layers=layers,
        # the V100 profiles and the small T4 ones leave these two out: nothing is padded, every measured degree is allowed
        padded_layers=_count(path, raw, "padded_layer_num", layers),
        max_tensor=_count(path, raw, "max_tp", max(tensor for tensor, _ in layer_times)),
        correction=_number(path, "final_fix_factor", raw.get("final_fix_factor")),
        stage_prefill_s=_number(path, "pp_init_comm", raw.get("pp_init_comm")) / 1000,
        stage_decode_s=_number(path, "pp_incr_comm", raw.get("pp_incr_comm")) / 1000,
        embedding_s=_embedding(path, raw.get("embed")),
        layer_times=layer_times,
    )


def _layer_times(path: Path, raw: Mapping[str, Any]) -> dict[tuple[int, int], LayerTimes]:
    """The tables `tp-M` / `bsz-b` / `init`, `incr`."""
    times: dict[tuple[int, int], LayerTimes] = {}
    for degree, batches in _numbered(path, "", raw, "tp-").items():
        for batch, cell in _numbered(path, f"tp-{degree}.", batches, "bsz-").items():
            key = f"tp-{degree}.bsz-{batch}"
            if not isinstance(cell, dict):
                raise InputError(path, key, cell, _MEND)
            prefill, decode = (_number(path, f"{key}.{name}", cell.get(name)) / 1000 for name in ("init", "incr"))
            times[degree, batch] = LayerTimes(prefill, decode)
    return times


def _numbered(path: Path, where: str, table: object, prefix: str) -> dict[int, Any]:
    """The entries `<prefix>N` of `table`, by N."""
    found = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        number = key.removeprefix(prefix)
        if number != key:
            if not number.isdecimal() or int(number) < 1:
                raise InputError(path, f"{where}{key}", key, f"write {prefix} and a whole number above 0")
            found[int(number)] = value
    if not found:
        raise InputError(path, f"{where}{prefix}N", None, _MEND)
    return found


def _embedding(path: Path, values: object) -> dict[int, float]:
    """`embed` lists batch 1, 2, 4, ..."""
    if not isinstance(values, list) or not values:
        raise InputError(path, "embed", values, "list the milliseconds for batch 1, 2, 4, ...")
    return {2**place: _number(path, f"embed[{place}]", value) / 1000 for place, value in enumerate(values)}


def _count(path: Path, raw: Mapping[str, Any], key: str, otherwise: int | None = None) -> int:
    value = raw.get(key, otherwise)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(path, key, value, "write a whole number above 0")
    return value


def _number(path: Path, key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise InputError(path, key, value, "write a finite number above 0")
    return float(value)
