"""Load strategies (2.9): which physical GPUs take the parts of a model, by how busy each has been.

Parts are handed out largest first, so the GPUs with room for one part have room for every later one: whatever GPU is picked,
a choice exists for the rest whenever one existed at all. A strategy therefore fails only where nothing fits, and says so; the
artifact's loop would not end there.

* `llf` (least loaded first): the least busy GPU with room.
* `packing`: the busiest GPU with room that is not busy all the time; after those, the busiest of the rest.
* `hybrid`: the busiest GPU with room that is busy less than a threshold; after those, the least busy of the rest.
* `none`: the GPUs of the placement as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from systems.maveriq.placement import GpuState, NoRoom, Placement

THRESHOLD = 0.7
"""Busy share below which `hybrid` packs; the artifact's default."""

Order = Callable[[GpuState, float], tuple[float, ...]]
"""The sort key of a GPU under a threshold: the smallest key with room is taken."""


def _llf(gpu: GpuState, _threshold: float) -> tuple[float, ...]:
    return (gpu.busy, gpu.index)


def _packing(gpu: GpuState, _threshold: float) -> tuple[float, ...]:
    return (float(gpu.busy >= 1), -gpu.busy, gpu.index)


def _hybrid(gpu: GpuState, threshold: float) -> tuple[float, ...]:
    available = gpu.busy < threshold
    return (float(not available), -gpu.busy if available else gpu.busy, gpu.index)


ORDERS: Mapping[str, Order | None] = {"llf": _llf, "packing": _packing, "hybrid": _hybrid, "none": None}
STRATEGIES = tuple(ORDERS)


def assign(
    strategy: str, placement: Placement, gpus: Sequence[GpuState], threshold: float = THRESHOLD, buffer: float = 0.0
) -> Placement | NoRoom:
    """`placement` with its GPUs chosen by `strategy` (a key of `ORDERS`), each part on a GPU of its own.

    NoRoom where some part fits on no GPU that is left; never where the placement itself fits.
    """
    order = ORDERS[strategy]
    if order is None:
        return placement
    left = sorted(gpus, key=lambda gpu: order(gpu, threshold))
    chosen = [-1] * len(placement.gib)
    for slot in sorted(range(len(chosen)), key=lambda slot: -placement.gib[slot]):
        need = placement.gib[slot]
        found = next((gpu for gpu in left if gpu.used_gib + need <= gpu.total_gib * (1 - buffer)), None)
        if found is None:
            return NoRoom(f"{strategy}: no GPU that is left has {need:.3f} GiB free")
        left.remove(found)
        chosen[slot] = found.index
    return replace(placement, gpus=tuple(chosen))
