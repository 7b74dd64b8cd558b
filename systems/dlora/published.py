"""Figures 5 and 7: one from our roofline beside the artifact's measurement, the other from the published bins themselves."""

from __future__ import annotations

import numpy as np

from systems.common.core import Outcome, Trial
from systems.common.errors import InputError
from systems.common.hardware.datasheet import parse_testbed

HIDDEN, RANK = 4096, 16
HOST_S = 15e-6
"""Per launch with a synchronising host timer: what the artifact's Figure 5 measures is mostly this (assumed: 10 to 20 us)."""

MAF1_BINS = (
    22393367, 21641281, 21573936, 23176613, 22984431, 21865895, 23320405, 23827224, 23408914, 24716225, 25232988, 24366564,
    25773226, 26223282, 25100046, 25830887, 26303945, 25738532, 26774854, 27562823, 27762701, 28807107, 27917526, 28031197,
    28151995, 27389326, 27437482, 27518676, 27735201, 26366534, 25873224, 25518521, 24196215, 23750900, 23163648, 22347688,
    23771284, 23018611, 22493566, 23251497, 23352203, 22741044, 22985199, 23920679, 22965866, 24390574, 25323156, 24760245,
    26161934, 25989222, 25058056, 25702255, 25861176, 25230603, 27832225, 27504941, 27506851, 27722020, 28363879, 27065490,
    27524638, 27218030, 26680600, 28034336, 27386871, 26224501, 26715591, 26126796, 26167024, 26106752, 24963086, 24406747,
    25075262, 24401578, 24042614, 24500710, 23975459, 22520302, 23211194, 23772373, 23019648, 24310455, 24221563, 24210930,
    24837915, 26019378, 24854536, 25707579, 25719848, 25269949, 26345475, 26582030, 27043340, 27897192, 27274327, 27057975,
    26643453, 26940454, 27216522, 31641034, 27539133, 26564400, 27285896, 26241260, 25443125, 25985918, 25230817, 24193637,
)  # fmt: skip
"""Invocations of all functions in 108 bins of 40 minutes, days 1 to 3 of Azure Functions 2019 (Shahrad et al., ATC '20,
CC-BY-4.0), as the dLoRA artifact's ae_scripts/figure7.ipynb prints them (Apache-2.0)."""
BINS_A_DAY = 36


def load_profile(trial: Trial) -> Outcome:
    """Bin `bin` (0 to 35) of day `day` (1 to 3): invocations over their maximum; its day's correlation with the next.

    Raises InputError for a bin or day that is not there.
    """
    place, day = _within(trial, "bin", 0, BINS_A_DAY - 1), _within(trial, "day", 1, 3)
    days = np.array(MAF1_BINS, dtype=np.float64).reshape(3, BINS_A_DAY)
    other = day % 3
    found = {
        "relative_load": float(days[day - 1, place] / days.max()),
        "correlation_next_day": float(np.corrcoef(days[day - 1], days[other])[0, 1]),
        "minimum": float(days.min() / days.max()),
    }
    return Outcome(found, notes=("published values of Azure Functions 2019: nothing is simulated",))


def branch_cost(trial: Trial) -> Outcome:
    """`product` (base or lora) of `batch` rows in fp32: microseconds by datasheet, plus the host's time.

    Raises InputError for another product.
    """
    batch, product = _within(trial, "batch", 1, 1 << 20), trial.parameters.get("product")
    shapes = {"base": ((HIDDEN, HIDDEN),), "lora": ((HIDDEN, RANK), (RANK, HIDDEN))}
    if product not in shapes:
        raise InputError("dlora", "product", product, "use base or lora")
    gpu = parse_testbed(trial.hardware).gpu
    seconds = HOST_S
    for inner, outer in shapes[str(product)]:
        moved = 4 * (inner * outer + batch * (inner + outer))
        seconds += max(2 * batch * inner * outer / gpu.flops["fp32"], moved / (0.8 * gpu.bandwidth)) + gpu.launch_s
    note = f"datasheet {gpu.name} at 80 % of its bandwidth, {1e6 * HOST_S:.0f} us of host time (assumed)"
    return Outcome({"product_us": 1e6 * seconds}, notes=(note,))


def _within(trial: Trial, key: str, least: int, most: int) -> int:
    value = trial.parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError("dlora", key, value, f"give a whole number from {least} to {most}")
    return value
