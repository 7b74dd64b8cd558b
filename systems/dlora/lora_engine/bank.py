# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Adapters on the device, by slot, and three ways to apply a batch whose requests use different ones.

* `einsum`: the artifact's (sheet, 2.3): products with every resident adapter, masked by who uses it. Its cost grows with the
  adapters resident.
* `bmm`: each token's own matrices gathered, then batched products (BGMV-like).
* `grouped`: kernels that read the matrices of the adapters in the batch where they lie (SGMV-like); on a GPU only.

Slot 0 is no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine import lora
from systems.common.torch_engine.attention import Chunks
from systems.common.torch_engine.kernels import triton_guard
from systems.common.torch_engine.lora import MODULES, Adapter, AdapterBank
from systems.dlora.lora_engine.adapters import HostAdapter

SITES = tuple(MODULES)
"""dLoRA adapts every product of a layer (sheet, 2.2)."""


class SlotBank(AdapterBank):
    """Room for `capacity` adapters of up to `rank` in slots 1 to `capacity`.

    Attributes:
        awaited: per adapter that the coming step needs and that still arrives, an event per layer, for which it waits.
    """

    def __init__(
        self, shape: ModelShape, capacity: int, rank: int, slots: int, sites: tuple[str, ...] = SITES,
        device: torch.device | str = "cpu", backend: str = "auto", beside: bool = True,
    ) -> None:  # fmt: skip
        """`slots`: sequences that run at once. `beside`: the grouped kernels' first half on a stream beside the product.

        Raises:
            InputError: there is no back end of that name, or it needs a GPU.
        """
        on_gpu = torch.device(device).type == "cuda"
        name = ("grouped" if on_gpu else "bmm") if backend == "auto" else backend
        if name not in BACKENDS:
            raise InputError("lora engine", "backend", backend, f"use auto or one of {', '.join(BACKENDS)}")
        if name == "grouped" and not triton_guard.AVAILABLE:
            raise InputError("lora engine", "backend", backend, "its kernels need Triton: use bmm or einsum here")
        base = "triton" if name == "grouped" else "bmm"
        super().__init__(shape, capacity, rank, slots, sites, device, base, beside)
        self.backend, self.awaited = name, list[list[Any]]()
        self._call = BACKENDS[name]
        self.turned: dict[str, Tensor] = {}
        """For `einsum`, as in the artifact: B as [layers, slots, rank, outputs]."""
        if name == "einsum":
            self.turned = {site: self.b[site].transpose(2, 3).contiguous() for site in sites}

    # ---- filling

    def copy_layer(self, slot: int, adapter: HostAdapter, layer: int) -> None:
        """Copy one layer of `adapter` into `slot` on the current stream."""
        for site in self.sites:
            self.a[site][layer, slot].copy_(adapter.a[site][layer], non_blocking=True)
            self.b[site][layer, slot].copy_(adapter.b[site][layer], non_blocking=True)
            if self.turned:
                self.turned[site][layer, slot].copy_(self.b[site][layer, slot].T)

    def _copy(self, place: int, adapter: Adapter, known: Mapping[str, tuple[str, int]]) -> None:
        super()._copy(place, adapter, known)
        for site, turned in self.turned.items():
            turned[:, place] = self.b[site][:, place].transpose(1, 2)

    # ---- applying

    def before(self, x: Tensor, layer: int, site: str, slots: Tensor, chunks: Chunks | None) -> None:
        """Wait, too, for adapters that are still arriving in this layer."""
        if self.awaited and site == self.sites[0]:
            for events in self.awaited:
                torch.cuda.current_stream().wait_event(events[layer])
        super().before(x, layer, site, slots, chunks)

    def add(self, y: Tensor, x: Tensor, layer: int, site: str, slots: Tensor, chunks: Chunks | None) -> None:
        """See `AdapterBank`."""
        if self._call is None:
            super().add(y, x, layer, site, slots, chunks)
        elif site in self.sites:
            self._call(self, y, x, layer, site, slots, chunks)


def _einsum(bank: SlotBank, y: Tensor, x: Tensor, layer: int, site: str, slots: Tensor, chunks: Chunks | None) -> None:
    mine = bank.of_slot[slots if chunks is None else torch.cat([slots, chunks.slots.long()])]
    a, b, ends = bank.a[site][layer], bank.turned[site][layer], bank.ends[site]
    places = torch.arange(len(a), device=x.device)
    mask = ((mine[:, None] == places) & (places > 0)).to(x.dtype)
    low = torch.einsum("ti,spi->tsp", x, a) * mask[:, :, None]
    low = low.unflatten(2, (len(ends), -1))
    for part, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        y[:, begin:end] += torch.einsum("tsr,sro->to", low[:, :, part], b[:, :, begin:end])


def _bmm(bank: SlotBank, y: Tensor, x: Tensor, layer: int, site: str, slots: Tensor, chunks: Chunks | None) -> None:
    lora.BACKENDS["bmm"](y, x, bank.a[site][layer], bank.b[site][layer], bank.ends[site], bank.of_slot, slots, chunks)


BACKENDS: Mapping[str, Callable[..., None] | None] = {"einsum": _einsum, "bmm": _bmm, "grouped": None}
"""`grouped` is `AdapterBank`'s own."""
