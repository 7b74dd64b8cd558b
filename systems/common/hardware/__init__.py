"""How long one operator takes on a GPU: datasheets, rooflines, and tables that somebody measured.

`costs` is the factory: it picks the source and gives back an `OperatorCosts`.
"""

from __future__ import annotations

from pathlib import Path

from systems.common.errors import InputError
from systems.common.hardware.cost import Affine, Chunk, OperatorCosts
from systems.common.hardware.datasheet import GPUS, Gpu, Testbed, gpu, parse_testbed
from systems.common.hardware.roofline import Efficiencies, RooflineCosts
from systems.common.models import ModelShape, model

__all__ = [
    "GPUS", "Affine", "Chunk", "Efficiencies", "Gpu", "OperatorCosts", "RooflineCosts", "Testbed", "costs", "gpu", "parse_testbed",
]  # fmt: skip

SOURCES = ("roofline", "published")


def costs(
    shape: ModelShape | str,
    testbed: Testbed | str,
    tp: int = 1,
    source: str = "roofline",
    operators: Path | None = None,
    dtype: str | None = None,
) -> OperatorCosts:
    """The cost model of `shape` on one of `tp` GPUs of `testbed`.

    Args:
        shape: a model shape, or its name in `MODELS`.
        testbed: GPUs, or a name such as `rtx3090x2`.
        tp: tensor-parallel degree, at most the testbed's number of GPUs.
        source: `roofline`, or `published` for a folder of tables (`operators`).
        operators: a folder of operator tables (docs/hardware.md); needed by, and implies, `published`.
        dtype: number format instead of the shape's own.

    Raises:
        InputError: unknown names, more GPUs asked than there are, an unusable table.
    """
    shape = model(shape) if isinstance(shape, str) else shape
    testbed = parse_testbed(testbed) if isinstance(testbed, str) else testbed
    shape = shape.with_dtype(dtype) if dtype else shape
    if source not in SOURCES:
        raise InputError("hardware", "source", source, f"use one of {', '.join(SOURCES)}")
    if not 1 <= tp <= testbed.count:
        raise InputError("hardware", "tp", tp, f"use 1 to {testbed.count}, the GPUs of {testbed.name}")
    testbed.gpu.dtype(shape.dtype)
    return RooflineCosts(shape, testbed.gpu, tp, Efficiencies(launch_s=testbed.gpu.launch_s))
