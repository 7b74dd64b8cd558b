"""The vocabulary that all five systems share (design.md, section 9).

Contents:

* `Request`: what a client asks for, before anything has happened to it.
* `RequestRecord`: what happened to one request; its TTFT, TPOT, ITL and E2E.
* `Slo`: latency limits, and `SLO_PRESETS`, the MLPerf ones by name.
* `Trial`: everything that determines one run of one system under one workload.
* `Outcome`: what a trial gives back.

Units are in the names: `_s` seconds, `_rps` requests per second, `_bytes` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

Scalar = str | int | float | bool | None
Parameters = Mapping[str, "Scalar | Sequence[Scalar] | Mapping[str, Scalar]"]


class Status(StrEnum):
    """How a request ended. Only `FINISHED` can be good; `CUT` requests are left out of attainment."""

    FINISHED = "finished"
    FAILED = "failed"
    CUT = "cut"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the client sends it. `output_tokens` is forced: generation stops there, not at EOS."""

    index: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    adapter: str | None = None

    def __post_init__(self) -> None:
        assert self.input_tokens >= 1 and self.output_tokens >= 1, self
        assert math.isfinite(self.arrival_s) and self.arrival_s >= 0, self


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What happened to one request, on the clock of the run (seconds since its start).

    Times that never came are NaN. `token_s` holds the time of every output token where the run recorded them.
    """

    request: Request
    scheduled_s: float
    first_token_s: float
    finish_s: float
    preemptions: int = 0
    status: Status = Status.FINISHED
    token_s: tuple[float, ...] = ()

    @property
    def ttft_s(self) -> float:
        """Time to first token: arrival to first token, queueing included."""
        return self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first: (E2E - TTFT) / (output tokens - 1); NaN for one token."""
        gaps = self.request.output_tokens - 1
        return (self.finish_s - self.first_token_s) / gaps if gaps else math.nan

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Inter-token latencies: the list of gaps between consecutive output tokens."""
        return tuple(b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def e2e_s(self) -> float:
        """End-to-end latency: arrival to last token."""
        return self.finish_s - self.request.arrival_s


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency limits for one request, seconds; a limit that is absent is infinite.

    `percentile` is the share of requests, in percent, that a run must keep within each limit (99 for P99).
    """

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    e2e_s: float = math.inf
    percentile: float = 99.0

    def __post_init__(self) -> None:
        assert min(self.ttft_s, self.tpot_s, self.e2e_s) > 0, self
        assert 0 < self.percentile <= 100, self

    def is_good(self, record: RequestRecord) -> bool:
        """Whether `record` finished and met every limit. A TPOT that is undefined (one token) is met."""
        return (
            record.status is Status.FINISHED
            and record.ttft_s <= self.ttft_s
            and not record.tpot_s > self.tpot_s
            and record.e2e_s <= self.e2e_s
        )


SLO_PRESETS: Mapping[str, Slo] = {
    # MLPerf Inference, server scenario, P99 limits (docs/vocabulary.md gives the source)
    "mlperf-llama2-70b": Slo(ttft_s=2.0, tpot_s=0.2),
    "mlperf-llama2-70b-interactive": Slo(ttft_s=0.45, tpot_s=0.04),
    "mlperf-llama3.1-8b": Slo(ttft_s=2.0, tpot_s=0.1),
    "mlperf-llama3.1-8b-interactive": Slo(ttft_s=0.5, tpot_s=0.03),
    "mlperf-llama3.1-405b": Slo(ttft_s=6.0, tpot_s=0.175),
    "mlperf-llama3.1-405b-interactive": Slo(ttft_s=4.5, tpot_s=0.08),
    "mlperf-mixtral-8x7b": Slo(ttft_s=2.0, tpot_s=0.2),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """Everything that determines one run of one system under one workload.

    `parameters` holds the figure's constants, its factor levels and the knobs under search, merged. `hardware` is
    the name of a testbed such as `rtx3090x2` (GPU model, `x`, how many). `datasets` maps a dataset's name to its
    verified file, or to None where its synthetic stand-in must be used.
    """

    system: str
    experiment: str
    parameters: Parameters
    hardware: str
    backend: str = "simulated"
    seed: int = 0
    datasets: Mapping[str, Path | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial gives back.

    `metrics` is flat: numbers and short strings by name, units in the names. `requests` is one column per name,
    all of one length, with a row per request; empty where the experiment has no requests. `notes` are short
    statements that a figure's footer must show (which hardware model was used, which dataset was a stand-in).
    """

    metrics: Mapping[str, Scalar]
    requests: Mapping[str, Sequence[Scalar]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
