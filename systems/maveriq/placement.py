"""Fragmentation-aware layer placement (2.8): how many layers each pipeline stage gets, and on which GPUs.

The GPUs with most free memory are taken; TP of them in a row form a stage. Layers are dealt one by one, round and round, to
every stage that still has room on all of its GPUs: water filling. Stages come out balanced unless one is full; then its
share flows to the roomier ones. A single request visits stages one after the other, so only the sum of their times counts
and an uneven map costs nothing.

`place` computes in closed form what dealing one by one gives; `tests/unit/test_maveriq_placement.py` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU as the controller sees it. `busy` is the share of the last two minutes in which it computed, 0 to 1."""

    index: int
    total_gib: float
    used_gib: float
    busy: float = 0.0

    def free_gib(self, buffer: float = 0.0) -> float:
        """What may still be allocated when a share `buffer` of the GPU is kept free."""
        return self.total_gib * (1 - buffer) - self.used_gib


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes. `gpus[i * tp + r]` is rank r of stage i and gets `gib[i * tp + r]`; `pp_map[i]` counts layers."""

    pp_map: tuple[int, ...]
    gpus: tuple[int, ...]
    gib: tuple[float, ...]

    @property
    def total_gib(self) -> float:
        """All of it."""
        return sum(self.gib)


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Why a configuration can't be placed."""

    reason: str


def most_free_first(gpus: Sequence[GpuState], buffer: float = 0.0) -> list[GpuState]:
    """The GPUs in the order in which stages take them; among equals the lower index first."""
    return sorted(gpus, key=lambda gpu: (-gpu.free_gib(buffer), gpu.index))


def place(
    layers: int, per_layer_gib: float, tp: int, pp: int, gpus: Sequence[GpuState], buffer: float = 0.0
) -> Placement | NoRoom:
    """Layers and GPUs of one configuration, or why there is no room.

    Args:
        layers: decoder layers of the model, dealt over the stages.
        per_layer_gib: memory that each rank of a stage pays for each of its layers (everything is smeared over layers).
        tp: GPUs of a stage.
        pp: stages.
        gpus: all GPUs of the node, in any order.
        buffer: share of each GPU that stays free.
    """
    assert layers >= 1 and per_layer_gib > 0 and tp >= 1 and pp >= 1, (layers, per_layer_gib, tp, pp)
    return place_on(layers, per_layer_gib, tp, pp, most_free_first(gpus, buffer), buffer)


def place_on(
    layers: int, per_layer_gib: float, tp: int, pp: int, order: Sequence[GpuState], buffer: float = 0.0
) -> Placement | NoRoom:
    """`place` for GPUs that are in order already: a search asks a hundred times for one state of the node."""
    if tp * pp > len(order):
        return NoRoom(f"it takes {tp * pp} GPUs and there are {len(order)}")
    if layers < pp:
        return NoRoom(f"{pp} stages are more than its {layers} layers")
    taken = order[: tp * pp]
    rooms = [min(capacity(gpu, per_layer_gib, layers, buffer) for gpu in taken[i * tp : i * tp + tp]) for i in range(pp)]
    counts = fill(layers, rooms)
    if sum(counts) < layers:
        return NoRoom(f"the {tp * pp} freest GPUs have room for {sum(counts)} of {layers} layers of {per_layer_gib:.3f} GiB")
    if 0 in counts:
        return NoRoom(f"stage {counts.index(0)} has no room for a layer of {per_layer_gib:.3f} GiB")
    gib = tuple(count * per_layer_gib for count in counts for _ in range(tp))
    return Placement(tuple(counts), tuple(gpu.index for gpu in taken), gib)


def capacity(gpu: GpuState, per_layer_gib: float, layers: int, buffer: float = 0.0) -> int:
    """Of `layers` those that fit on one GPU: the most for which used + layers x per_layer does not exceed the limit."""
    limit, used = gpu.total_gib * (1 - buffer), gpu.used_gib
    guess = math.floor(min(layers, max(0.0, (limit - used) / per_layer_gib)))
    while guess and used + guess * per_layer_gib > limit:  # rounding of the division
        guess -= 1
    while guess < layers and used + (guess + 1) * per_layer_gib <= limit:
        guess += 1
    return guess


def fill(layers: int, rooms: Sequence[int]) -> list[int]:
    """Deal `layers` round and round to bins of the given `rooms`; fewer are dealt when all are full.

    All bins rise together to a level, the full ones staying behind; what is left of a round goes to the first that have room.
    """
    left, level = layers, 0
    open_bins = sorted(rooms)
    while open_bins and left >= len(open_bins):
        step = min(left // len(open_bins), open_bins[0] - level)
        level += step
        left -= step * len(open_bins)
        while open_bins and open_bins[0] == level:
            open_bins.pop(0)
    counts = [min(room, level) for room in rooms]
    for place_, room in enumerate(rooms):
        if left and room > level:
            counts[place_] += 1
            left -= 1
    return counts
