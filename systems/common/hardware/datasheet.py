"""What the makers' datasheets say about each GPU, and the testbeds that the papers built of them.

FLOP/s are dense (no structured sparsity) and without boost over the sheet's own clock. Where a card's Tensor Cores
run at half rate with fp32 accumulation (consumer Ampere and Ada), the table holds that half rate, because every LLM
engine accumulates in fp32. Link bandwidths are per direction: half of the "total" or "bidirectional" figure that sheets print.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from systems.common.errors import InputError
from systems.common.models import close_names

GB = 1e9
GIB = 2**30
TERA = 1e12
PCIE3_X16, PCIE4_X16, PCIE5_X16 = 15.75 * GB, 31.5 * GB, 63.0 * GB  # PCI-SIG: 128b/130b coding, per direction


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU model.

    `flops` is peak FLOP/s (operations/s for int8) by number format; a format that the hardware lacks is absent.
    `bandwidth` is device memory in bytes/s, `memory_bytes` its size before the driver takes its one or two percent.
    `nvlink` and `pcie` are bytes/s per direction; `nvlink_gpus` is how many GPUs NVLink joins in the papers' testbeds
    (1: none), beyond which traffic goes over PCIe. `nic` is the testbed's network in bytes/s, 0 where no paper uses one.
    `launch_s` is the shortest time that a kernel occupies the GPU; no sheet states it, 2 to 5 us is what profilers show.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory_bytes: int
    sms: int
    l2_bytes: int
    pcie: float
    source: str
    nvlink: float = 0.0
    nvlink_gpus: int = 1
    nic: float = 0.0
    launch_s: float = 3e-6

    def link(self, gpus: int) -> float:
        """Bytes/s per direction between neighbours in a ring of `gpus`: its slowest hop."""
        return self.nvlink if self.nvlink and gpus <= self.nvlink_gpus else self.pcie

    def dtype(self, wanted: str) -> str:
        """The format that this GPU computes `wanted` in: fp16 for bf16 on GPUs older than Ampere, tf32 as fp32 there.

        Raises InputError when there is no substitute.
        """
        substitute = {"bf16": "fp16", "tf32": "fp32"}.get(wanted, wanted)
        for name in (wanted, substitute):
            if name in self.flops:
                return name
        raise InputError(f"hardware {self.name}", "dtype", wanted, f"it computes in {', '.join(self.flops)}")


def _flops(**tera: float) -> Mapping[str, float]:
    return {dtype: value * TERA for dtype, value in tera.items()}


_AMPERE_A100 = _flops(fp32=19.5, tf32=156, fp16=312, bf16=312, int8=624)
_HOPPER_SXM = _flops(fp32=66.9, tf32=494.7, fp16=989.4, bf16=989.4, int8=1978.9, fp8=1978.9)

_ROWS = (
    Gpu(
        "t4", _flops(fp32=8.1, fp16=65, int8=130), 320 * GB, 16 * GIB, 40, 4 * 2**20, PCIE3_X16,
        "NVIDIA T4 datasheet; Turing whitepaper WP-09183-001 app. B; NIC: SpotServe 6.1, g4dn.12xlarge 50 Gbit/s",
        nic=50 / 8 * GB, launch_s=5e-6,
    ),
    Gpu(
        "v100-16", _flops(fp32=15.7, fp16=125), 900 * GB, 16 * GIB, 80, 6 * 2**20, PCIE3_X16,
        "NVIDIA V100 datasheet (SXM2); NVLink among 4: Sirius 6", nvlink=150 * GB, nvlink_gpus=8, launch_s=4e-6,
    ),
    Gpu(
        "v100-32", _flops(fp32=15.7, fp16=125), 900 * GB, 32 * GIB, 80, 6 * 2**20, PCIE3_X16,
        "NVIDIA V100 datasheet (SXM2)", nvlink=150 * GB, nvlink_gpus=8, launch_s=4e-6,
    ),
    Gpu(
        "a100-40", _AMPERE_A100, 1555 * GB, 40 * GIB, 108, 40 * 2**20, PCIE4_X16,
        "NVIDIA A100 datasheet (40 GB SXM4); Ampere whitepaper table 1", nvlink=300 * GB, nvlink_gpus=8,
    ),
    Gpu(
        "a100-80", _AMPERE_A100, 2039 * GB, 80 * GIB, 108, 40 * 2**20, PCIE4_X16,
        "NVIDIA A100 datasheet (80 GB SXM4)", nvlink=300 * GB, nvlink_gpus=8,
    ),
    Gpu(
        "rtx3090", _flops(fp32=35.6, tf32=35.6, fp16=71, bf16=71, int8=284), 936 * GB, 24 * GIB, 82, 6 * 2**20, PCIE4_X16,
        "NVIDIA GA102 whitepaper V2 table 9 (fp32 accumulate); NVLink bridge joins two: LLMStation table 1",
        nvlink=56.25 * GB, nvlink_gpus=2,
    ),
    Gpu(
        "rtx4090", _flops(fp32=82.6, tf32=82.6, fp16=165.2, bf16=165.2, int8=660.6, fp8=330.3), 1008 * GB, 24 * GIB, 128,
        72 * 2**20, PCIE4_X16, "NVIDIA Ada GPU architecture whitepaper V2 table 2 (fp32 accumulate)", launch_s=2.5e-6,
    ),
    Gpu(
        "a6000", _flops(fp32=38.7, tf32=77.4, fp16=154.8, bf16=154.8, int8=309.7), 768 * GB, 48 * GIB, 84, 6 * 2**20, PCIE4_X16,
        "NVIDIA GA102 whitepaper V2 app. A (RTX A6000); no bridges in MaverIQ's machines",
    ),
    Gpu(
        "h100", _HOPPER_SXM, 3350 * GB, 80 * GIB, 132, 50 * 2**20, PCIE5_X16,
        "NVIDIA H100 datasheet (SXM5) and Hopper whitepaper table 2", nvlink=450 * GB, nvlink_gpus=8, launch_s=2.5e-6,
    ),
    Gpu(
        "h200", _HOPPER_SXM, 4800 * GB, 141 * GIB, 132, 50 * 2**20, PCIE5_X16,
        "NVIDIA H200 datasheet (SXM)", nvlink=450 * GB, nvlink_gpus=8, launch_s=2.5e-6,
    ),
)  # fmt: skip
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _ROWS}
ALIASES: Mapping[str, str] = {"v100": "v100-16", "a100": "a100-80"}


@dataclass(frozen=True, slots=True)
class Testbed:
    """`count` GPUs of one model in one machine."""

    gpu: Gpu
    count: int

    __test__ = False  # pytest takes classes named Test* for tests

    @property
    def name(self) -> str:
        """As `parse_testbed` reads it: `rtx3090x2`."""
        return f"{self.gpu.name}x{self.count}"


def gpu(name: str, where: str = "hardware") -> Gpu:
    """The GPU called `name`.

    Raises InputError, blaming `where`, with the closest names when there is none.
    """
    known = {**GPUS, **{alias: GPUS[target] for alias, target in ALIASES.items()}}
    if name in known:
        return known[name]
    raise InputError(where, "hardware", name, f"use one of {', '.join(close_names(name, known))}, with x2 for two of them")


def parse_testbed(text: str, where: str = "hardware") -> Testbed:
    """Read `rtx3090x2` as two RTX 3090, `h100` as one H100.

    Raises InputError, blaming `where`, for an unknown GPU (with the closest names) or a count below 1.
    """
    match = re.fullmatch(r"([a-z0-9-]*?\d)(?:x(\d{1,4}))?", str(text).strip().lower())
    if match is None:
        return Testbed(gpu(str(text), where), 1)
    count = int(match[2] or 1)
    if count < 1:
        raise InputError(where, "hardware", text, "use at least one GPU, such as rtx3090x1")
    return Testbed(gpu(match[1], where), count)
