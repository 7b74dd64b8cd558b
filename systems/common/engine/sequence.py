"""One request inside the engine."""

from __future__ import annotations

import math

from systems.common.core import Request, RequestRecord, Status


class Sequence:
    """A request with its progress. Mutable, and owned by one engine.

    While it prefills, `prefilled` of `prompt_tokens` tokens are in the KV cache. While it decodes, its progress is not
    stored here at all: it follows from the decode clock (see `decoding`).
    """

    __slots__ = (
        "arrival_s",
        "end_reason",
        "finish_clock",
        "finish_s",
        "first_token_s",
        "generated",
        "index",
        "join_clock",
        "output_tokens",
        "preemptions",
        "prefilled",
        "prompt_tokens",
        "request",
        "scheduled_s",
        "spans",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.index = request.index
        self.arrival_s = request.arrival_s
        self.prompt_tokens = request.input_tokens
        self.output_tokens = request.output_tokens
        self.prefilled = 0
        self.generated = 0
        """Output tokens produced before the sequence last joined the decoding ones."""
        self.join_clock = -1
        self.finish_clock = -1
        self.scheduled_s = math.nan
        self.first_token_s = math.nan
        self.finish_s = math.nan
        self.preemptions = 0
        self.end_reason = "length"
        """Why it ended, once it has: `length`; `stop` (token or string); `abort`."""
        self.spans: list[tuple[float, int, int]] = []
        """Per stay among the decoding: time of the token that prefill gave, clock at entry, clock at leaving."""

    def record(self, token_s: tuple[float, ...] = ()) -> RequestRecord:
        """What happened to the request so far; `CUT` when it has not finished."""
        status = Status.CUT if math.isnan(self.finish_s) else Status.FINISHED
        return RequestRecord(
            self.request, self.scheduled_s, self.first_token_s, self.finish_s, self.preemptions, status, token_s
        )
