# mypy: disable-error-code="no-untyped-call, no-any-return"
"""All adapters in pinned host memory, copied into the GPU's slots layer by layer on a stream of their own.

No synchronisation but events: a copy begins when the last step that read its slot has ended, and whoever reads the slot waits
for the event of the layer it needs (an eager step, layer by layer, in `SlotBank.before`) or for all of them (`wait`: a CUDA
graph cannot wait in its middle for a copy that it was not captured with).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from systems.common.torch_engine.lora import Adapter
from systems.dlora.lora_engine.adapters import HostAdapter, packed
from systems.dlora.lora_engine.bank import SlotBank
from systems.dlora.lora_engine.slots import Load, Residents


class AdapterStore:
    """See the module.

    Attributes:
        residents: who is in which slot, and who uses what.
        host: every known adapter.
        loads: copies begun so far. arriving: slot by slot, the events (one per layer) of a copy that may not have ended.
        on_load: called with each slot that is about to be overwritten.
    """

    def __init__(self, bank: SlotBank) -> None:
        self.bank, self.residents = bank, Residents(bank.capacity)
        self.host: dict[str, HostAdapter] = {}
        self.loads = 0
        self.arriving: dict[int, list[Any]] = {}
        self.on_load: Callable[[int], None] = lambda _: None
        self._gpu = bank.of_slot.is_cuda
        self._stream = torch.cuda.Stream() if self._gpu else None
        self._last_use: dict[int, Any] = {}

    def add(self, name: str, adapter: Adapter | HostAdapter) -> None:
        """Take an adapter into host memory. Raises InputError for a name in use, or one that the bank cannot hold."""
        if isinstance(adapter, Adapter):
            adapter = packed(self.bank.shape, adapter, self.bank.rank, self.bank.sites, self._gpu)
        self.residents.add(name)
        self.host[name] = adapter

    def forget(self, name: str) -> None:
        """Let go of the host's copy of an adapter that `residents` no longer knows."""
        assert name not in self.residents.outstanding, name
        del self.host[name]
        self.bank.index.pop(name, None)

    def fetch(self, needed: Sequence[str]) -> list[Load]:
        """Make `needed` resident: copies are launched, not awaited. What was launched. Raises as `Residents.place`."""
        loads = self.residents.place(needed)
        for load in loads:
            self._copy(load)
        self.loads += len(loads)
        return loads

    def coming(self, slots: Iterable[int]) -> list[list[Any]]:
        """The events, layer by layer, of those copies into `slots` that have not ended."""
        for slot in [slot for slot, events in self.arriving.items() if events[-1].query()]:
            del self.arriving[slot]
        return [self.arriving[slot] for slot in slots if slot in self.arriving]

    @staticmethod
    def wait(copies: list[list[Any]]) -> None:
        """Have the current stream wait until `copies` are whole."""
        for events in copies:
            torch.cuda.current_stream().wait_event(events[-1])

    def used(self, slots: Iterable[int]) -> None:
        """The work launched so far on the current stream reads `slots`: none is overwritten before it has ended."""
        if self._gpu:
            event = torch.cuda.Event()
            event.record()
            self._last_use.update(dict.fromkeys(slots, event))

    def _copy(self, load: Load) -> None:
        bank, adapter = self.bank, self.host[load.adapter]
        if load.evicted is not None:
            bank.index.pop(load.evicted, None)
        self.on_load(load.slot)
        bank.index[load.adapter] = load.slot
        layers = range(bank.shape.layers)
        if self._stream is None:
            for layer in layers:
                bank.copy_layer(load.slot, adapter, layer)
            return
        if (event := self._last_use.pop(load.slot, None)) is not None:
            self._stream.wait_event(event)
        events = []
        with torch.cuda.stream(self._stream):
            for layer in layers:
                bank.copy_layer(load.slot, adapter, layer)
                events.append(torch.cuda.Event())
                events[-1].record()
        self.arriving[load.slot] = events
