"""Which adapter is in which slot of the GPU, and who must go: pure decisions, no device.

All M adapters are in host memory, N of them in the GPU's slots (sheet, 2.4). One that a batch needs takes a free slot, else
that of the resident adapter with the fewest outstanding requests, of these the one used longest ago; never that of an
adapter in the same batch, and never a pinned one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from systems.common.errors import InputError


@dataclass(frozen=True, slots=True)
class Load:
    """Copy `adapter` into `slot`, over `evicted` (None: the slot was free)."""

    adapter: str
    slot: int
    evicted: str | None


class Residents:
    """Adapters known, their outstanding requests, and slots 1 to `capacity`.

    Attributes:
        slot_of: slot of each resident adapter, in order of their last use, the longest unused first.
        outstanding: requests of each known adapter that wait or run.
    """

    def __init__(self, capacity: int) -> None:
        """Raises InputError for a capacity below 1."""
        if capacity < 1:
            raise InputError("lora engine", "capacity", capacity, "give a whole number of slots of at least 1")
        self.capacity = capacity
        self.slot_of: dict[str, int] = {}
        self.outstanding: dict[str, int] = {}
        self._free = list(range(capacity, 0, -1))
        self._pinned: set[str] = set()
        self._leaving: set[str] = set()

    # ---- who there is

    def add(self, adapter: str) -> None:
        """Make an adapter known. Raises InputError when there is one of that name (one that is leaving too)."""
        if adapter in self.outstanding:
            raise InputError("lora engine", "adapter", adapter, "there is one of this name: remove it first")
        self.outstanding[adapter] = 0

    def remove(self, adapter: str, wait: bool = False) -> bool:
        """Forget an adapter; whether it is gone. With `wait` one in use goes with its last request, and takes no new ones.

        Raises:
            InputError: unknown, or in use and not `wait`.
        """
        self._known(adapter)
        if count := self.outstanding[adapter]:
            if not wait:
                raise InputError(
                    "lora engine", "adapter", adapter, f"{count} requests use it: let them end, or remove it with wait"
                )
            self._leaving.add(adapter)
            return False
        if adapter in self._pinned:
            self._leaving.add(adapter)
            return False
        self._drop(adapter)
        return True

    def begin(self, adapter: str) -> None:
        """A request of `adapter` came. Raises InputError when it is unknown or leaving."""
        self._known(adapter)
        if adapter in self._leaving:
            raise InputError("lora engine", "adapter", adapter, "is being removed: use another one")
        self.outstanding[adapter] += 1

    def end(self, adapter: str) -> bool:
        """A request of `adapter` ended; whether the adapter left with it."""
        assert self.outstanding[adapter] > 0, adapter
        self.outstanding[adapter] -= 1
        return self._go_if_last(adapter)

    # ---- who is where

    def fitting(self, wanted: Iterable[str]) -> list[str]:
        """The first distinct adapters of `wanted`, in order, that slots can hold at once; the others must wait."""
        found: list[str] = []
        for adapter in dict.fromkeys(wanted):
            if not self._room([*found, adapter]):
                break
            found.append(adapter)
        return found

    def place(self, needed: Sequence[str]) -> list[Load]:
        """Make every adapter of a batch resident; what must be copied where.

        Raises:
            InputError: one is unknown, or there are more than slots (use `fitting` first).
        """
        needed = list(dict.fromkeys(needed))
        for adapter in needed:
            self._known(adapter)
        if not self._room(needed):
            mend = f"{self.capacity} slots, {len(self._pinned)} of them pinned: let some wait, or raise the capacity"
            raise InputError("lora engine", "adapters of a batch", len(needed), mend)
        loads = [self._load(adapter, needed) for adapter in needed if adapter not in self.slot_of]
        for adapter in needed:
            self.slot_of[adapter] = self.slot_of.pop(adapter)
        return loads

    def pin(self, adapter: str) -> None:
        """Keep a resident adapter where it is (it is merged, or being merged)."""
        assert adapter in self.slot_of, adapter
        self._pinned.add(adapter)

    def unpin(self, adapter: str) -> bool:
        """Let it go again; whether it left, as its removal was waiting for this."""
        self._pinned.discard(adapter)
        return self._go_if_last(adapter)

    def _room(self, needed: Sequence[str]) -> bool:
        return len(set(needed) | self._pinned) <= self.capacity

    def _load(self, adapter: str, needed: Sequence[str]) -> Load:
        if self._free:
            slot, evicted = self._free.pop(), None
        else:
            candidates = [a for a in self.slot_of if a not in needed and a not in self._pinned]
            evicted = min(candidates, key=lambda a: self.outstanding[a])
            slot = self.slot_of.pop(evicted)
        self.slot_of[adapter] = slot
        return Load(adapter, slot, evicted)

    def _known(self, adapter: str) -> None:
        if adapter not in self.outstanding:
            raise InputError(
                "lora engine", "adapter", adapter, f"use one of {', '.join(self.outstanding) or 'none: none is loaded'}"
            )

    def _go_if_last(self, adapter: str) -> bool:
        going = adapter in self._leaving and not self.outstanding[adapter] and adapter not in self._pinned
        if going:
            self._drop(adapter)
        return going

    def _drop(self, adapter: str) -> None:
        self._leaving.discard(adapter)
        del self.outstanding[adapter]
        if (slot := self.slot_of.pop(adapter, None)) is not None:
            self._free.append(slot)
