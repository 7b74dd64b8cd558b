"""How long one operator takes on a GPU: datasheets, rooflines, and tables that somebody measured.

`costs` is the factory: it picks the source and gives back an `OperatorCosts`.
"""

from __future__ import annotations

from pathlib import Path

from systems.common.errors import InputError
from systems.common.hardware.calibrated import CalibratedCosts, read_calibration
from systems.common.hardware.cost import Affine, Chunk, OperatorCosts
from systems.common.hardware.datasheet import GPUS, Gpu, Testbed, gpu, parse_testbed
from systems.common.hardware.efficiencies import Efficiencies, default_efficiencies
from systems.common.hardware.roofline import RooflineCosts
from systems.common.hardware.table_costs import PublishedLinearCosts, TableCosts
from systems.common.hardware.tables import read_all_reduce, read_kernel_tables, read_linear_table
from systems.common.models import ModelShape, model

__all__ = [
    "GPUS", "Affine", "CalibratedCosts", "Chunk", "Efficiencies", "Gpu", "OperatorCosts", "PublishedLinearCosts",
    "RooflineCosts", "TableCosts", "Testbed", "costs", "default_efficiencies", "gpu", "parse_testbed",
]  # fmt: skip

SOURCES = ("roofline", "published", "calibrated")


def costs(
    shape: ModelShape | str,
    testbed: Testbed | str,
    tp: int = 1,
    source: str = "roofline",
    operators: Path | None = None,
    dtype: str | None = None,
    all_reduce: Path | None = None,
) -> OperatorCosts:
    """The cost model of `shape` on one of `tp` GPUs of `testbed`.

    Args:
        shape: a model shape, or its name in `MODELS`.
        testbed: GPUs, or a name such as `rtx3090x2`.
        tp: tensor-parallel degree, at most the testbed's number of GPUs.
        source: `roofline`; `published` or `calibrated` for tables in `operators`.
        operators: a folder that `snakemake calibrate` wrote, a folder of kernel times or a CSV of linear operators
            (docs/hardware.md); implies their source.
        dtype: number format instead of the shape's own.
        all_reduce: a CSV of all-reduces measured among `tp` GPUs of this kind, as `calibrate.all_reduce` writes it.

    Raises:
        InputError: unknown names, more GPUs asked than there are, `published` without tables, an unusable table.
    """
    shape = model(shape) if isinstance(shape, str) else shape
    testbed = parse_testbed(testbed) if isinstance(testbed, str) else testbed
    shape = shape.with_dtype(dtype) if dtype else shape
    if source not in SOURCES:
        raise InputError("hardware", "source", source, f"use one of {', '.join(SOURCES)}")
    if not 1 <= tp <= testbed.count:
        raise InputError("hardware", "tp", tp, f"use 1 to {testbed.count}, the GPUs of {testbed.name}")
    testbed.gpu.dtype(shape.dtype)  # refuses a format that the GPU cannot compute in
    ring = read_all_reduce(all_reduce, tp) if all_reduce is not None and tp > 1 else None
    roofline = RooflineCosts(shape, testbed.gpu, tp, default_efficiencies(testbed.gpu), ring)
    if operators is not None:
        return _tables(operators, roofline)
    if source != "roofline":
        raise InputError(
            "hardware", "operators", None, "give a folder or CSV of operator tables; docs/hardware.md describes them"
        )
    return roofline


def _tables(operators: Path, rest: RooflineCosts) -> OperatorCosts:
    """Costs from a calibration, a folder of kernel times, or a CSV of linear operators."""
    if (operators / "layer.csv").is_file():
        return CalibratedCosts(read_calibration(operators), rest)
    if operators.suffix == ".csv":
        return PublishedLinearCosts(read_linear_table(operators, rest.tp, rest.model), rest)
    tables = read_kernel_tables(operators, rest.tp)
    tables.meta.check(rest.model, rest.gpu.name, GPUS)
    return TableCosts(tables, rest)
