# mypy: disable-error-code="no-untyped-call"
"""Adapters of decoding rows by the row kernels, the first half on a stream beside the layer's own product."""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels import row_lora


class DecodingRows:
    """What the row kernels need from step to step, at addresses that CUDA graphs can keep."""

    def __init__(self, slots: int, parts: int, rank: int, device: torch.device | str, beside: bool = True) -> None:
        """For up to `slots` rows, and sites of up to `parts` joined matrices. `beside`: use a second stream, on a GPU."""
        self._at = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._low = torch.zeros((slots + 1) * row_lora.SPLITS * parts * rank, dtype=torch.float32, device=device)
        self._rank = rank
        self._side = torch.cuda.Stream() if beside and torch.device(device).type == "cuda" else None
        self._begin: torch.cuda.Event | None = None

    def enter(self, of_slot: Tensor, slots: Tensor) -> None:
        """A step of the sequences in `slots` begins: look their adapters up, once for all layers."""
        if len(slots):
            torch.index_select(of_slot, 0, slots, out=self._at[: len(slots)])

    def mark(self) -> None:
        """The rows' inputs are there: from here on the first half may run."""
        if self._side is not None:
            self._begin = torch.cuda.current_stream().record_event()

    def add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, ends: tuple[int, ...], beside: bool) -> None:
        """Add to `y` in place; `beside`: there was a `mark`, and the layer's product has been launched since.

        Launched before that product, the first half would take the SMs first and hold it up: a step of 16 rows took 8 %
        longer.
        """
        rows, at = len(x), self._at[: len(x)]
        size = torch.Size((rows, row_lora.SPLITS, len(ends), self._rank))
        low = self._low[: size.numel()].view(size)
        if beside and self._side is not None and self._begin is not None:
            self._side.wait_event(self._begin)
            with torch.cuda.stream(self._side):
                row_lora.shrink(x, a, low, at)
            torch.cuda.current_stream().wait_stream(self._side)
        else:
            row_lora.shrink(x, a, low, at)
        row_lora.expand(y, low, b, ends, at)
