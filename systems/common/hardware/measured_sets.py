"""The published tables that efficiencies are fitted on, and who borrows from whom where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from systems.common.hardware.datasheet import gpu
from systems.common.hardware.layer_profile import read_layer_profile
from systems.common.hardware.observations import (
    Bench,
    Observation,
    all_reduce_observations,
    kernel_observations,
    layer_observations,
    linear_observations,
)
from systems.common.hardware.tables import read_all_reduce, read_kernel_tables, read_linear_table
from systems.common.models import model


@dataclass(frozen=True, slots=True)
class MeasuredSet:
    """The points of one GPU, the files they come from (relative to the mirror), and the unknowns they can tell."""

    gpu: str
    files: tuple[str, ...]
    observations: tuple[Observation, ...]
    unknowns: tuple[str, ...]


GEMM = ("gemm_compute", "gemm_memory", "gemm_launch_s")
ELEMENTWISE = ("elementwise", "launch_s")
LINEAR = GEMM + ELEMENTWISE
ATTENTION = ("prefill_attention", "decode_attention", "attention_launch_s", "attention_block_s")
RING = ("all_reduce", "all_reduce_latency_s")
LAYER = ("gemm_compute", "gemm_memory", "decode_attention", *RING)

# Where a GPU takes what no table of its own tells: by unknown, the GPU to borrow from. NVLink rings from the A100, PCIe
# rings from the T4; attention from the RTX 4090, the one GPU with a table of it. Element-wise kernels of the RTX 4090 run
# out of its 72 MiB L2, so cards with a small L2 take theirs from the A100.
_ATTENTION = dict.fromkeys(ATTENTION, "rtx4090")
_NVLINK, _PCIE = dict.fromkeys(RING, "a100-80"), dict.fromkeys(RING, "t4")
_GA102 = dict.fromkeys(GEMM, "rtx4090") | dict.fromkeys(ELEMENTWISE, "a100-80") | _ATTENTION
_LAYER_REST = _ATTENTION | dict.fromkeys((*ELEMENTWISE, "gemm_launch_s"), "a100-80")
BORROWED: Mapping[str, Mapping[str, str]] = {
    "rtx4090": _PCIE,
    "rtx3090": _GA102 | _NVLINK,
    "a6000": _GA102 | _PCIE,
    "a100-80": _ATTENTION,
    "a100-40": dict.fromkeys((*LINEAR, *RING), "a100-80") | _ATTENTION,
    "h100": _ATTENTION | _NVLINK,
    "h200": dict.fromkeys(LINEAR, "h100") | _ATTENTION | _NVLINK,
    "t4": _LAYER_REST,
    "v100-16": _LAYER_REST,
    "v100-32": _LAYER_REST | dict.fromkeys(LAYER, "v100-16"),
}


def measured_sets(mirror: Path) -> list[MeasuredSet]:
    """All published tables under `mirror` that a fit can use.

    Raises InputError when one is missing or unusable.
    """
    return [
        _rtx4090(mirror),
        *(_linear(mirror, *row) for row in _LINEAR_TABLES),
        *(_layers(mirror, *row) for row in _LAYER_TABLES),
    ]


_LINEAR_TABLES = (
    ("a100-80", "llama-3.1-8b", "vidur_profiles/a100_Meta-Llama-3-8B_mlp.csv", "vidur_profiles/a100_dgx_all_reduce.csv"),
    ("h100", "llama-2-7b", "vidur_profiles/h100_Llama-2-7b_mlp.csv", None),
)
_LAYER_TABLES = (
    ("t4", "spotserve/profile/T4-4x", {"opt-6.7b": "megatron_6.7B_profile.json", "gpt-20b": "megatron_h6144_profile.json"}),
    ("v100-16", "spotserve/profile/V100-4x", {"opt-6.7b": "6.7B.json", "gpt-20b": "20B.json"}),
)


def _rtx4090(mirror: Path) -> MeasuredSet:
    folder = "rtx4090_llama31_8b"
    tables = read_kernel_tables(mirror / folder)
    points = kernel_observations(tables, Bench(model("llama-3.1-8b"), gpu("rtx4090")))
    files = tuple(f"{folder}/profile_{name}.csv" for name in ("dense", "per_sequence", "attention"))
    return MeasuredSet("rtx4090", files, tuple(points), LINEAR + ATTENTION)


def _linear(mirror: Path, name: str, shape: str, file: str, ring: str | None) -> MeasuredSet:
    points: list[Observation] = []
    for tp in (1, 2, 4, 8):
        bench = Bench(model(shape), gpu(name), tp)
        points += linear_observations(read_linear_table(mirror / file, tp, bench.model), bench)
        if ring and tp > 1:
            points += all_reduce_observations(read_all_reduce(mirror / ring, tp), bench)
    return MeasuredSet(name, (file, *([ring] if ring else [])), tuple(points), LINEAR + (RING if ring else ()))


def _layers(mirror: Path, name: str, folder: str, shapes: Mapping[str, str]) -> MeasuredSet:
    points: list[Observation] = []
    for shape, file in shapes.items():
        bench = Bench(model(shape).with_dtype("fp32"), gpu(name), tp=4)
        points += layer_observations(read_layer_profile(mirror / folder / file), bench)
    return MeasuredSet(name, tuple(f"{folder}/{file}" for file in shapes.values()), tuple(points), LAYER)
