# mypy: disable-error-code="no-untyped-call"
"""Copies: inside the GPU, and between host and GPU, pinned or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from systems.common.calibrate.clock import Clock


@dataclass(frozen=True, slots=True)
class CopyPoint:
    """`size_bytes` copied in `direction` (`device`, `to_device`, `to_host`; host memory `pinned` or not); seconds."""

    direction: str
    pinned: bool
    size_bytes: int
    took_s: float


def copies_s(clock: Clock, sizes_bytes: tuple[int, ...]) -> Iterator[CopyPoint]:
    """Every direction at every size; on a CPU only copies inside its memory."""
    gpu = clock.device.type == "cuda"
    for size in sizes_bytes:
        here, there = (torch.empty(size, dtype=torch.uint8, device=clock.device) for _ in range(2))
        yield CopyPoint("device", False, size, clock.call_s(partial(there.copy_, here)))
        for pinned in (True, False) if gpu else ():
            host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            yield CopyPoint("to_device", pinned, size, clock.call_s(partial(there.copy_, host, non_blocking=True)))
            yield CopyPoint("to_host", pinned, size, clock.call_s(partial(host.copy_, here, non_blocking=True)))
