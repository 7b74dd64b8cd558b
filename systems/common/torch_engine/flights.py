# mypy: disable-error-code="no-untyped-call"
"""Steps on their way: launched, not yet known to have ended.

Launches run one step ahead of the GPU, so tokens come back late: a step's tokens are copied to pinned memory behind it, an
event says when they are there, and `settle` hands them out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.engine.sequence import Sequence

LAUNCH_AHEAD_S = 0.002
"""How long before a step ends the next one is launched, when launches are put off."""
ON_TIME_S = 5e-5
"""A step that the host has waited for at least so long was bound by the GPU."""


@dataclass(slots=True)
class Flight:
    """One step: the sequences that get a token from it, the tokens when they come, and the event that says so.

    `places` says which of the tokens are theirs, where not the first ones. `rows`: how many decode, 0 where prompts run beside.
    """

    sequences: list[Sequence]
    tokens: Tensor
    event: torch.cuda.Event | None
    places: list[int] | None
    rows: int


class Flights:
    """All steps on their way, and when those before them ended.

    Attributes:
        ended_s: when each step ended, on `clock`.
        waited_s: what the host spent waiting for it.
        decode_rows: its sequences, 0 for a step with prompts.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.ended_s: list[float] = []
        self.waited_s: list[float] = []
        self.decode_rows: list[int] = []
        self._flying: deque[Flight] = deque()
        self._periods: dict[int, deque[float]] = {}

    def launch(self, sequences: list[Sequence], tokens: Tensor, places: list[int] | None = None, rows: int = 0) -> None:
        """Note a step that has just been put on the stream."""
        if tokens.device.type != "cuda":
            self._flying.append(Flight(sequences, tokens.clone(), None, places, rows))
            return
        host = torch.empty(len(tokens), dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._flying.append(Flight(sequences, host, event, places, rows))

    def settle(self, keep: int) -> Iterator[tuple[list[Sequence], list[int]]]:
        """Wait until at most `keep` steps are on their way; the sequences and tokens of each of the others, as it ends."""
        while len(self._flying) > keep:
            flight = self._flying.popleft()
            began = self.clock()
            if flight.event is not None:
                flight.event.synchronize()
            self._note(flight, began)
            tokens = flight.tokens.tolist()
            yield flight.sequences, tokens if flight.places is None else [tokens[place] for place in flight.places]

    def _note(self, flight: Flight, began: float) -> None:
        self.ended_s.append(self.clock())
        self.waited_s.append(self.ended_s[-1] - began)
        self.decode_rows.append(flight.rows)
        # a step that had ended before the host came for it was launched late: its period is the host's, and putting the next
        # launch off by that would make it later still, without end
        on_time = flight.event is not None and self.waited_s[-1] > ON_TIME_S
        if flight.rows and len(self.ended_s) > 1 and on_time:
            recent = self._periods.setdefault(_alike(flight.rows), deque(maxlen=8))
            recent.append(self.ended_s[-1] - self.ended_s[-2])

    def spare_s(self) -> float:
        """Seconds that the next launch can be put off without the GPU running dry: a request that arrives meanwhile joins it.

        Known only while a decode step is on its way whose like ran lately; else 0.
        """
        if len(self._flying) != 1 or not (rows := self._flying[0].rows):
            return 0.0
        if not (recent := self._periods.get(_alike(rows))):
            return 0.0
        return self.ended_s[-1] + min(recent) - LAUNCH_AHEAD_S - self.clock()


def _alike(rows: int) -> int:
    """Decode steps of about as many rows take about as long."""
    return -(-rows // 16)
