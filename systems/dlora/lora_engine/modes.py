# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Which adapters there are, and which of them is in the weights: what the runner does between batches.

Merged batches find one adapter in the weights, unmerged ones pristine weights and their adapters in slots. Here adapters come
and go, are brought in ahead, and the weights change hands; nothing here knows a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from systems.common.torch_engine.lora import Adapter
from systems.dlora.lora_engine.adapters import HostAdapter, check
from systems.dlora.lora_engine.bank import SlotBank
from systems.dlora.lora_engine.store import AdapterStore
from systems.dlora.lora_engine.switching import Copy, MergedWeights


class Modes:
    """See the module.

    Attributes:
        store: the adapters. scheme: how weights take them in.
        merged: the adapter that merged batches find in the weights now, or None.
        switches: changes of the weights so far (merges, unmerges in place, a -> b).
    """

    def __init__(self, bank: SlotBank, scheme: MergedWeights) -> None:
        self.bank, self.scheme, self.store = bank, scheme, AdapterStore(bank)
        self.store.on_load = scheme.forget
        self.merged: str | None = None
        self.switches = 0
        self._merging: Any = None
        self._aside = torch.cuda.Stream() if bank.of_slot.is_cuda else None

    # ---- adapters

    def add(self, name: str, adapter: Adapter | HostAdapter) -> None:
        """Take an adapter in. Raises InputError for one that does not fit, or a name in use."""
        if isinstance(adapter, Adapter):
            check(adapter, self.bank.shape, f"adapter {name}", most=self.bank.rank)
        self.store.add(name, adapter)

    def remove(self, name: str, wait: bool = False) -> bool:
        """Let an adapter go; whether it is gone already. One in use is refused, or (`wait`) goes with its last request."""
        gone = self.store.residents.remove(name, wait)
        if not gone and self.merged == name and not self.store.residents.outstanding[name]:
            self._unmerge()  # which unpins it, and so ends its removal
            return name not in self.store.host
        if gone:
            self._left(name)
        return gone

    def prefetch(self, names: Sequence[str]) -> None:
        """Begin copying adapters that coming batches need (as many of the first as fit), beside what runs."""
        residents = self.store.residents
        self.store.fetch(residents.fitting(name for name in names if name in residents.outstanding))

    # ---- what the weights hold

    @torch.inference_mode()
    def prepare_merged(self, name: str, ahead: bool = False) -> None:
        """Have the weights of merged batches hold `name`. With `ahead`: on a side stream, while unmerged batches go on.

        `ahead` is for the copying scheme; in place the weights are in use, and the call merges at once. From then on no step
        can be merged with another adapter; unmerged ones go on.
        """
        if name == self.merged:
            if not ahead:
                self._await_merge()
            return
        self._await_merge()
        aside = ahead and self._aside is not None and isinstance(self.scheme, Copy)
        if not self.store.residents.fitting([name]):
            self._unmerge()  # in place with a single slot, which the merged adapter holds
        self.store.fetch([name])
        previous, slot = self.merged, self.store.residents.slot_of[name]
        self.store.residents.pin(name)
        stream = self._aside if aside else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.store.wait(self.store.coming([slot]))
            self.scheme.merge(slot)
            self.store.used([slot, *self._held_slots(previous)])
            if stream is not None:
                self._merging = torch.cuda.Event()
                self._merging.record()
        self.merged, self.switches = name, self.switches + 1
        if isinstance(self.scheme, Copy):
            self._unpin(name)  # a copy needs its matrices only while it is made, and `used` sees to that
        elif previous is not None:
            self._unpin(previous)

    def merge_done(self) -> bool:
        """Whether a merge begun `ahead` has ended."""
        return self._merging is None or bool(self._merging.query())

    def _await_merge(self) -> None:
        if self._merging is not None:
            torch.cuda.current_stream().wait_event(self._merging)
            self._merging = None

    @torch.inference_mode()
    def prepare_unmerged(self, needed: Sequence[str] = ()) -> None:
        """Have the weights of unmerged batches pristine and `needed` on their way. Raises InputError for too many."""
        if not isinstance(self.scheme, Copy):
            self._unmerge()
        self.store.fetch(needed)

    def _unmerge(self) -> None:
        """Take what is merged out of the weights (the copying scheme: forget it)."""
        name, self.merged = self.merged, None
        self._await_merge()
        self.scheme.unmerge()
        self.store.used(self._held_slots(name))
        if name is not None and not isinstance(self.scheme, Copy):
            self.switches += 1
            self._unpin(name)

    def _held_slots(self, name: str | None) -> list[int]:
        """Where the adapter that is being taken out lies: the pass reads it."""
        slot = self.store.residents.slot_of.get(name) if name is not None else None
        return [slot] if slot is not None else []

    def _unpin(self, name: str) -> None:
        if self.store.residents.unpin(name):
            self._left(name)

    def _left(self, name: str) -> None:
        """An adapter is gone; another one of its name would be another one."""
        if self.merged == name:
            self.merged = None
        self.store.forget(name)
