"""What a run consists of: its clock and bounds, one exchange per request, and all of them as a measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from systems.common.core import Request, RequestRecord, Status
from systems.common.load.answer import Answer


class RunClock:
    """Seconds since the run's start, on this machine's monotonic clock."""

    def __init__(self) -> None:
        self.zero_s = time.monotonic()

    def start(self) -> None:
        """The run starts now."""
        self.zero_s = time.monotonic()

    def __call__(self) -> float:
        """Now."""
        return time.monotonic() - self.zero_s


@dataclass(slots=True)
class Exchange:
    """One request on its way, and what became of it. Times are on the run's clock; NaN: never.

    Attributes:
        request: as planned.
        planned_s: when it should be sent: its arrival (open loop), or when its place became free (closed loop).
        sent_s: when the client began to send it.
        error: the kind of failure (docs/load.md lists them), empty without one; message: what was said about it.
    """

    request: Request
    planned_s: float
    sent_s: float = math.nan
    answer: Answer = field(default_factory=Answer)
    status: Status = Status.CUT
    error: str = ""
    message: str = ""

    @property
    def sent(self) -> bool:
        """Whether it went out."""
        return not math.isnan(self.sent_s)

    def record(self) -> RequestRecord:
        """In the form that the engine and the simulator use; lengths as the server counted them, where it did."""
        done = self.status is Status.FINISHED
        answer, asked = self.answer, self.request
        counted = Request(
            index=asked.index,
            arrival_s=self.planned_s,
            input_tokens=answer.prompt_tokens or asked.input_tokens,
            output_tokens=answer.output_tokens if done else asked.output_tokens,
            adapter=asked.adapter,
        )
        return RequestRecord(
            request=counted,
            scheduled_s=math.nan,  # a client does not see that
            first_token_s=answer.first_token_s,
            finish_s=answer.last_token_s if done else math.nan,
            status=self.status,
            token_s=tuple(answer.token_s),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """How a run is bounded.

    Attributes:
        concurrency: requests at once, in a closed loop; None: open loop.
        stop_sending_s: a closed loop sends nothing after this time.
        grace_s: what is under way so long after the last was sent is cut off.
        timeout_s: a request that takes longer, from its sending, has failed.
    """

    concurrency: int | None = None
    stop_sending_s: float = math.inf
    grace_s: float = math.inf
    timeout_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a run gave.

    Attributes:
        exchanges: those that were sent, in order of sending.
        unsent: how many were not.
        loop_lag_s: how late the event loop woke up, every 20 ms.
        wall_s, cpu_s: how long the run took, and how much processor time this client needed.
        closed: whether it was a closed loop.
        interrupted: whether a signal ended it.
    """

    exchanges: Sequence[Exchange]
    unsent: int
    loop_lag_s: Sequence[float]
    wall_s: float
    cpu_s: float
    closed: bool
    interrupted: bool
