"""Which share of a datasheet's peaks each class of operator reaches.

Contents:

* `Efficiencies`: the shares, and the fixed times that no datasheet states.
* `rounded_max`: how two bounds combine near the corner of the roofline.
* `default_efficiencies`: what `costs` uses unless told otherwise, from `efficiencies.yaml`, which `fit` generates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import yaml

from systems.common.hardware.datasheet import Gpu

FILE = Path(__file__).with_name("efficiencies.yaml")


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """The reached share of each peak, by class of operator, and the fixed times that no datasheet states.

    A share above 1 is possible for `elementwise` and `decode_attention`: data that stay in L2 beat the memory's
    bandwidth. `gemm_launch_s` is added to every matrix product, `attention_launch_s` to attention (two or three kernels),
    `launch_s` to every other kernel, `all_reduce_latency_s` to every all-reduce. `attention_block_s` is the least time that
    a thread block of decode attention holds an SM. `knee` is the exponent k of (compute^k + memory^k)^(1/k), which
    rounds the corner of the roofline where both bounds are near each other; infinite is the plain maximum.
    `source` says where the numbers come from and is shown in figure footers.
    """

    gemm_compute: float = 1.0
    gemm_memory: float = 1.0
    prefill_attention: float = 1.0
    decode_attention: float = 1.0
    elementwise: float = 1.0
    all_reduce: float = 1.0
    knee: float = inf
    launch_s: float = 3e-6
    gemm_launch_s: float = 3e-6
    attention_launch_s: float = 3e-6
    attention_block_s: float = 0.0
    all_reduce_latency_s: float = 10e-6
    source: str = "datasheet"

    def __post_init__(self) -> None:
        shares = (self.gemm_compute, self.gemm_memory, self.prefill_attention, self.decode_attention)
        assert min(*shares, self.elementwise, self.all_reduce) > 0, self
        fixed = (self.launch_s, self.gemm_launch_s, self.attention_launch_s, self.attention_block_s, self.all_reduce_latency_s)
        assert min(fixed) >= 0 and self.knee >= 1, self

    @classmethod
    def of_datasheet(cls, gpu: Gpu) -> Efficiencies:
        """The bare datasheet: every peak is reached."""
        return cls(launch_s=gpu.launch_s, gemm_launch_s=gpu.launch_s, attention_launch_s=gpu.launch_s)


def rounded_max(compute_s: float, memory_s: float, knee: float) -> float:
    """The larger of two bounds, and up to 2^(1 / knee) of it where they are equal."""
    larger, smaller = max(compute_s, memory_s), min(compute_s, memory_s)
    return larger * (1 + (smaller / larger) ** knee) ** (1 / knee) if knee < inf and smaller else larger


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(FILE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return content


def default_efficiencies(gpu: Gpu) -> Efficiencies:
    """The fitted efficiencies of `gpu`; of the bare datasheet if it was left out of the fit."""
    row = _content()["gpus"].get(gpu.name)
    if row is None:
        return Efficiencies.of_datasheet(gpu)
    return Efficiencies(**row["values"], source=_origin(row["from"]))


def _origin(origins: dict[str, str]) -> str:
    """E.g. `efficiencies of a100-80, attention of rtx4090`: where matrix products come from, then what comes from elsewhere."""
    main = origins["gemm_compute"]
    text = f"efficiencies of {main}"
    for label, key in (("attention", "prefill_attention"), ("element-wise", "elementwise"), ("all-reduce", "all_reduce")):
        if origins[key] != main:
            text += f", {label} of {origins[key]}"
    return text
