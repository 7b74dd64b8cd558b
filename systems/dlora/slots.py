"""Adapter slots on a GPU: who is resident, who makes room (sheet, 2.4). Bookkeeping only; an engine does the copies."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from systems.common.errors import InputError


class Slots:
    """The adapters that lie in GPU memory, at most `capacity`.

    Attributes:
        resident: adapters in their slots, in order of their last use, the longest unused first.
        merged: the adapter that is merged into the weights now; its slot is pinned, as unmerging needs its matrices.
    """

    __slots__ = ("capacity", "merged", "resident")

    def __init__(self, capacity: int, resident: Collection[int] = ()) -> None:
        """Raises InputError for a capacity below 1, or more adapters than slots."""
        if capacity < 1:
            raise InputError("dlora", "slots", capacity, "give at least one slot")
        if len(set(resident)) > capacity:
            raise InputError("dlora", "adapters", len(set(resident)), f"there are {capacity} slots: host fewer, or add slots")
        self.capacity = capacity
        self.resident: dict[int, None] = dict.fromkeys(resident)
        self.merged: int | None = None

    def take(self, wanted: Collection[int], outstanding: Mapping[int, int]) -> list[int]:
        """Make `wanted` resident; the adapters that must be copied in, in order.

        Room is made by the adapter with the fewest outstanding requests that is neither wanted nor merged, among equals the one
        unused for longest.

        Raises:
            InputError: more adapters are wanted than there are slots (besides the pinned one).
        """
        resident = self.resident
        if resident.keys() >= set(wanted):
            for adapter in wanted:
                del resident[adapter]
                resident[adapter] = None
            return []
        needed = set(wanted)
        if self.merged is not None:
            needed.add(self.merged)
        if len(needed) > self.capacity:
            raise InputError("dlora", "adapters in a batch", len(needed), f"there are {self.capacity} slots")
        loads = [adapter for adapter in dict.fromkeys(wanted) if adapter not in self.resident]
        for _ in range(len(self.resident) + len(loads) - self.capacity):
            victims = [adapter for adapter in self.resident if adapter not in needed]
            del self.resident[min(victims, key=lambda adapter: outstanding.get(adapter, 0))]
        for adapter in wanted:
            self.resident.pop(adapter, None)
            self.resident[adapter] = None
        return loads

    def drop(self, adapter: int) -> None:
        """Give up an adapter's slot.

        Raises:
            InputError: it is merged now, so its matrices are still needed.
        """
        if adapter == self.merged:
            raise InputError("dlora", "adapter", adapter, "it is merged: unmerge before it is removed")
        self.resident.pop(adapter, None)
