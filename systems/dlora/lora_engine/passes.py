# mypy: disable-error-code="no-untyped-call, no-any-return"
"""One pass over a model's matrices: adapters out of them and into them. `switching` decides which passes are made."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from systems.common.errors import InputError
from systems.common.torch_engine.graphs import Graphs
from systems.common.torch_engine.kernels import triton_guard
from systems.common.torch_engine.kernels.merge_lora import MergeTiling, addresses, merge_lora
from systems.common.torch_engine.lora import matrices
from systems.common.torch_engine.weights import Weights
from systems.dlora.lora_engine.bank import SlotBank


class Passes:
    """One pass over all matrices: target = source + B[put] A[put] - B[take] A[take].

    `how`: `kernel` (Triton, one read and one write), `addmm` (cuBLAS, a product per part), `plain` (float32 on any device);
    `auto`: `kernel` on a GPU. On a GPU a pass by `kernel` is one CUDA graph, whose slots are read on the device.
    """

    def __init__(self, bank: SlotBank, how: str = "auto", tiling: MergeTiling | None = None, graphs: bool = True) -> None:
        on_gpu = bank.of_slot.device.type == "cuda"
        self.how = ("kernel" if on_gpu and triton_guard.AVAILABLE else "plain") if how == "auto" else how
        if self.how not in ("kernel", "addmm", "plain"):
            raise InputError("lora engine", "merge", how, "use auto, kernel, addmm or plain")
        self.bank, self.tiling = bank, tiling
        self.which = torch.zeros(2, dtype=torch.int64, device=bank.of_slot.device)
        self._addresses: dict[tuple[int, int], dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._graphs: Graphs[None] | None = Graphs() if on_gpu and graphs and self.how == "kernel" else None

    def run(self, source: Weights, target: Weights, take: int, put: int) -> None:
        """Launch one pass on the current stream."""
        if self._graphs is not None:
            if id(target) not in self._graphs:
                self.which.zero_()  # the run before the capture must add nothing
                self._graphs.capture(id(target), lambda: self._kernels(source, target))
            self._tell(take, put)
            self._graphs.run(id(target))
        elif self.how == "kernel":
            self._tell(take, put)
            self._kernels(source, target)
        else:
            for i, site in self._places():
                self._torch(i, site, source, target, take, put)

    def _tell(self, take: int, put: int) -> None:
        told = torch.tensor([take, put])
        self.which.copy_(told.pin_memory() if self.which.is_cuda else told, non_blocking=True)

    def _places(self) -> Iterator[tuple[int, str]]:
        return ((i, site) for i in range(self.bank.shape.layers) for site in self.bank.sites)

    def _kernels(self, source: Weights, target: Weights) -> None:
        bank, key = self.bank, (id(source), id(target))
        if key not in self._addresses:  # before any capture: its run before makes them
            self._addresses[key] = {
                site: tuple(addresses([matrices(layer)[site].weight for layer in w.layers]) for w in (source, target))  # type: ignore[misc]
                for site in bank.sites
            }
        for site, (old, new) in self._addresses[key].items():
            merge_lora(old, new, bank.a[site], bank.b[site], bank.ends[site], self.which, self.tiling)

    def _torch(self, layer: int, site: str, source: Weights, target: Weights, take: int, put: int) -> None:
        bank = self.bank
        old, new = (matrices(w.layers[layer])[site].weight for w in (source, target))
        a, b = bank.a[site][layer].unflatten(1, (len(bank.ends[site]), -1)), bank.b[site][layer]
        signed = [(slot, sign) for slot, sign in ((put, 1), (take, -1)) if slot]
        for part, (begin, end) in enumerate(zip((0, *bank.ends[site]), bank.ends[site], strict=False)):
            rows = slice(begin, end)
            if not signed:
                if old is not new:
                    new[rows].copy_(old[rows])
            elif self.how == "addmm":
                left = torch.cat([sign * b[slot, rows] for slot, sign in signed], 1)
                right = torch.cat([a[slot, part] for slot, _ in signed])
                torch.addmm(old[rows], left, right, out=new[rows])
            else:
                wide = old[rows].float()
                for slot, sign in signed:
                    wide = wide + sign * (b[slot, rows].float() @ a[slot, part].float())
                new[rows].copy_(wide)
