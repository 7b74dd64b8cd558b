# mypy: disable-error-code="no-untyped-call, no-any-return"
"""What ranks say to each other on the device: sums and gathers inside a stage, hidden states and tokens between stages.

All are launched on the current stream (NCCL) or block (gloo). Without other ranks every one of them does nothing.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name since torch 2.13, and before."""


class Links:
    """One rank's links.

    Attributes:
        tp, tp_rank: ranks of its stage, and which of them it is.
        stages, stage: the same of the pipeline.
    """

    def __init__(self, tp: int = 1, tp_rank: int = 0, stages: int = 1, stage: int = 0, group: Any = None) -> None:  # noqa: ANN401
        self.tp, self.tp_rank, self.stages, self.stage = tp, tp_rank, stages, stage
        self._group = group

    @property
    def first(self) -> bool:
        """Whether its stage embeds tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether its stage gives logits."""
        return self.stage == self.stages - 1

    # ---- inside a stage

    def reduce(self, x: Tensor) -> Tensor:
        """Sum of all tensor-parallel ranks' `x`, in place."""
        if self.tp == 1:
            return x
        dist.all_reduce(x, group=self._group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All tensor-parallel ranks' `x`; [tp, *x.shape]."""
        if self.tp == 1:
            return x[None]
        out = torch.empty(self.tp * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
        _gather(out, x.contiguous(), group=self._group)
        return out.view(self.tp, *x.shape)

    def from_first(self, x: Tensor) -> Tensor:
        """`x` of tensor-parallel rank 0, in place."""
        if self.tp > 1:
            dist.broadcast(x, self.stage * self.tp, group=self._group)
        return x

    # ---- between stages: ranks of the same tensor-parallel number

    def _peer(self, stage: int) -> int:
        return stage * self.tp + self.tp_rank

    def send_on(self, x: Tensor) -> None:
        """Give `x` to the next stage."""
        dist.send(x.contiguous(), self._peer(self.stage + 1))

    def receive(self, x: Tensor) -> Tensor:
        """Fill `x` with what the stage before sends on."""
        dist.recv(x, self._peer(self.stage - 1))
        return x

    def send_back(self, x: Tensor) -> None:
        """Give `x` from the last stage to the first."""
        dist.send(x.contiguous(), self._peer(0))

    def receive_back(self, x: Tensor) -> Tensor:
        """Fill `x` with what the last stage sends back."""
        dist.recv(x, self._peer(self.stages - 1))
        return x


def leave(patience_s: float = 10.0) -> None:
    """End this process's links, if it has any; NCCL may wait for a graph or a rank, so not longer than `patience_s`."""
    if not (dist.is_available() and dist.is_initialized()):
        return

    def destroy() -> None:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    thread = threading.Thread(target=destroy, daemon=True)
    thread.start()
    thread.join(patience_s)


def break_off() -> None:
    """Make NCCL kernels that wait for a rank return, from another thread than the one that waits. Does not wait."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
        if abort is not None:
            threading.Thread(target=abort, daemon=True).start()
