"""How far the host may launch ahead of the GPU: a suspension takes hold only after what is launched already (sheet 2.3)."""

from __future__ import annotations

from collections import deque

import torch


class RunAhead:
    """Bounds tasklets in flight by CUDA events on the stream that runs them. On a CPU nothing is ever in flight.

    Call `launched` after each tasklet, on the tasklet's stream; `admit` before the next one, or poll `full` where the caller
    has better things to do than wait.
    """

    def __init__(self, limit: int, device: torch.device | str) -> None:
        assert limit >= 1, limit
        self.limit = limit
        self._cuda = torch.device(device).type == "cuda"
        self._spare: list[torch.cuda.Event] = []
        self._flying: deque[torch.cuda.Event] = deque()

    def launched(self) -> None:
        """Note that a tasklet was put on the current stream."""
        if self._cuda:
            event = self._spare.pop() if self._spare else torch.cuda.Event()
            event.record()
            self._flying.append(event)

    @property
    def in_flight(self) -> int:
        """Tasklets launched and not finished. Does not wait."""
        while self._flying and self._flying[0].query():
            self._spare.append(self._flying.popleft())
        return len(self._flying)

    @property
    def full(self) -> bool:
        """Whether `limit` tasklets are in flight."""
        return self.in_flight >= self.limit

    def admit(self) -> None:
        """Wait until fewer than `limit` tasklets are in flight."""
        self._wait(self.limit - 1)

    def drain(self) -> None:
        """Wait for all of them."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while self.in_flight > most:
            self._flying[0].synchronize()
