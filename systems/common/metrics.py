"""What a run achieved: latency percentiles, SLO attainment, goodput (definitions: docs/vocabulary.md).

Contents:

* `Records`: what happened to every request of a run, one numpy array per column.
* `percentile`: one value of a sample by a named rule; `PERCENTILE_RULE` is the one that every figure uses.
* `summarise`: the flat dictionary of metrics that a trial reports.

Nothing here loops over requests, so 10^5 of them take milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from systems.common.core import Request, RequestRecord, Slo, Status

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
CodeArray = npt.NDArray[np.int8]
BoolArray = npt.NDArray[np.bool_]

STATUSES: tuple[Status, ...] = (Status.FINISHED, Status.FAILED, Status.CUT)
"""Meaning of the codes in `Records.status`: the position here is the code, so 0 is finished."""

FINISHED, FAILED, CUT = range(3)

PERCENTILE_RULE = "linear"
"""The rule of every reported percentile: linear interpolation between order statistics, as numpy and vLLM's client do."""

PERCENTILES: tuple[float, ...] = (50, 90, 99)


def _no_floats() -> FloatArray:
    return np.empty(0)


def _no_ints() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Records:
    """What happened to the requests of one run: entry i of every array belongs to request i.

    Times are seconds on the clock of the run; those that never came are NaN. `status` holds codes of `STATUSES`.
    `token_s` is all output-token times of all requests, request after request, and `token_ends[i]` is where request
    i's stop; both are empty where the run did not record them. `adapters` is empty where no request names one.
    """

    arrival_s: FloatArray
    scheduled_s: FloatArray
    first_token_s: FloatArray
    finish_s: FloatArray
    input_tokens: IntArray
    output_tokens: IntArray
    preemptions: IntArray
    status: CodeArray
    token_s: FloatArray = field(default_factory=_no_floats)
    token_ends: IntArray = field(default_factory=_no_ints)
    adapters: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        assert all(len(getattr(self, name)) == count for name in _COLUMNS), "columns of different lengths"
        assert len(self.token_ends) in (0, count) and len(self.adapters) in (0, count), "columns of different lengths"
        assert len(self.token_s) == (int(self.token_ends[-1]) if len(self.token_ends) else 0), "token times without owner"

    def __len__(self) -> int:
        return len(self.arrival_s)

    @classmethod
    def from_records(cls, records: Sequence[RequestRecord]) -> Records:
        """The columns of `records`. Their requests' indices are not kept: position is the index."""
        token_counts = [len(r.token_s) for r in records]
        adapters = tuple(r.request.adapter for r in records)
        return cls(
            arrival_s=np.array([r.request.arrival_s for r in records], dtype=np.float64),
            scheduled_s=np.array([r.scheduled_s for r in records], dtype=np.float64),
            first_token_s=np.array([r.first_token_s for r in records], dtype=np.float64),
            finish_s=np.array([r.finish_s for r in records], dtype=np.float64),
            input_tokens=np.array([r.request.input_tokens for r in records], dtype=np.int64),
            output_tokens=np.array([r.request.output_tokens for r in records], dtype=np.int64),
            preemptions=np.array([r.preemptions for r in records], dtype=np.int64),
            status=np.array([STATUSES.index(r.status) for r in records], dtype=np.int8),
            token_s=np.array([t for r in records for t in r.token_s], dtype=np.float64),
            token_ends=np.cumsum(token_counts, dtype=np.int64) if any(token_counts) else _no_ints(),
            adapters=adapters if any(adapters) else (),
        )

    def record(self, i: int) -> RequestRecord:
        """Request i's record as an object."""
        request = Request(
            index=i,
            arrival_s=float(self.arrival_s[i]),
            input_tokens=int(self.input_tokens[i]),
            output_tokens=int(self.output_tokens[i]),
            adapter=self.adapters[i] if self.adapters else None,
        )
        tokens: tuple[float, ...] = ()
        if len(self.token_ends):
            start = int(self.token_ends[i - 1]) if i else 0
            tokens = tuple(self.token_s[start : int(self.token_ends[i])].tolist())
        return RequestRecord(
            request=request,
            scheduled_s=float(self.scheduled_s[i]),
            first_token_s=float(self.first_token_s[i]),
            finish_s=float(self.finish_s[i]),
            preemptions=int(self.preemptions[i]),
            status=STATUSES[self.status[i]],
            token_s=tokens,
        )

    def select(self, mask: BoolArray) -> Records:
        """The requests where `mask` is true, in order."""
        counts = np.diff(self.token_ends, prepend=0)
        return Records(
            **{name: getattr(self, name)[mask] for name in _COLUMNS},
            token_s=self.token_s[np.repeat(mask, counts)] if len(self.token_ends) else self.token_s,
            token_ends=np.cumsum(counts[mask]) if len(self.token_ends) else self.token_ends,
            adapters=tuple(a for a, keep in zip(self.adapters, mask.tolist(), strict=True) if keep) if self.adapters else (),
        )

    def columns(self) -> dict[str, list[int | float | str | None]]:
        """One list per column, for a parquet file: everything but the token times, with statuses as words."""
        table: dict[str, list[int | float | str | None]] = {name: getattr(self, name).tolist() for name in _COLUMNS}
        table["status"] = [STATUSES[code].value for code in self.status.tolist()]
        if self.adapters:
            table["adapter"] = list(self.adapters)
        return table

    @property
    def ttft_s(self) -> FloatArray:
        """Time to first token of each request: arrival to first token, queueing included."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> FloatArray:
        """Time per output token after the first, (E2E - TTFT) / (output tokens - 1); NaN for one token."""
        gaps = self.output_tokens - 1
        undefined = np.full(len(self), math.nan)
        np.divide(self.finish_s - self.first_token_s, gaps, out=undefined, where=gaps > 0)
        return undefined

    @property
    def e2e_s(self) -> FloatArray:
        """End-to-end latency of each request: arrival to last token."""
        return self.finish_s - self.arrival_s

    @property
    def queue_s(self) -> FloatArray:
        """Arrival to the first time that the request was scheduled."""
        return self.scheduled_s - self.arrival_s

    @property
    def itl_s(self) -> FloatArray:
        """Inter-token latencies of all requests together: every gap between two output tokens of one request."""
        if not len(self.token_ends):
            return _no_floats()
        gaps = np.diff(self.token_s)
        inside = np.ones(len(gaps), dtype=bool)
        borders = self.token_ends[(self.token_ends > 0) & (self.token_ends < len(self.token_s))]
        inside[borders - 1] = False  # from one request's last token to the next request's first is no gap
        return gaps[inside]

    def good(self, slo: Slo) -> BoolArray:
        """Which requests finished and met every limit of `slo`; the same verdicts as `Slo.is_good`."""
        with np.errstate(invalid="ignore"):
            within = (self.ttft_s <= slo.ttft_s) & ~(self.tpot_s > slo.tpot_s) & (self.e2e_s <= slo.e2e_s)
        good: BoolArray = within & (self.status == FINISHED)
        return good


_COLUMNS = tuple(f.name for f in fields(Records) if f.name not in ("token_s", "token_ends", "adapters"))


def percentile(values: FloatArray | Sequence[float], percent: float, rule: str = PERCENTILE_RULE) -> float:
    """The `percent`-th percentile of the values that are not NaN; NaN when there are none.

    Rules, on the n values in rising order:

    * `linear`: interpolate at position (n - 1) * percent / 100, counted from 0 (numpy's default, Hyndman-Fan 7);
    * `nearest-rank`: the value at rank ceil(n * percent / 100), counted from 1: always one of the values;
    * `artifact`: the value at int(n * percent / 100), counted from 0, as SpotServe's and Sirius' scripts do. That
      index is past the end for 100 %, where the last value is taken.
    """
    assert 0 <= percent <= 100, percent
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    ordered = ordered[: len(ordered) - int(np.isnan(ordered).sum())]  # sort puts NaN last
    return _at(ordered, percent, rule)


def _at(ordered: FloatArray, percent: float, rule: str) -> float:
    count = len(ordered)
    if not count:
        return math.nan
    if rule == "linear":
        position = (count - 1) * percent / 100
        low = min(math.floor(position), count - 1)
        high = min(low + 1, count - 1)
        return float(ordered[low] + (ordered[high] - ordered[low]) * (position - low))
    if rule == "nearest-rank":
        return float(ordered[max(math.ceil(count * percent / 100), 1) - 1])
    if rule == "artifact":
        return float(ordered[min(int(count * percent / 100), count - 1)])
    raise AssertionError(f"no percentile rule {rule!r}")


def distribution(
    name: str, values: FloatArray, percentiles: Sequence[float] = PERCENTILES, rule: str = PERCENTILE_RULE
) -> dict[str, float]:
    """Mean and percentiles of the `values` that are not NaN, as `{name}_mean_s`, `{name}_p50_s`, ...; NaN if there are none."""
    known = np.sort(values[~np.isnan(values)])
    table = {f"{name}_mean_s": float(known.mean()) if len(known) else math.nan}
    return table | {f"{name}_p{percent:g}_s": _at(known, percent, rule) for percent in percentiles}


def summarise(
    records: Records,
    slo: Slo | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    *,
    schedule_lag_s: FloatArray | None = None,
    percentiles: Sequence[float] = PERCENTILES,
    rule: str = PERCENTILE_RULE,
) -> dict[str, float]:
    """The metrics of a run, by the definitions of docs/vocabulary.md.

    Only requests that arrived in [`start_s`, `end_s`) count, and rates are per second of that window; without
    `end_s` it lasts until the last finish. Latencies are those of finished requests. Without `slo` every finished
    request is good. `schedule_lag_s` is how late the client sent each request.

    Returns:
        `requests`, `finished`, `failed`, `cut`, `preemptions`; `ttft_*_s`, `tpot_*_s`, `e2e_*_s`, `queue_*_s` and,
        where token times were recorded, `itl_*_s` (mean, p50, p90, p99); `attainment` (0..1), `goodput_rps`,
        `requests_per_s`, `output_tokens_per_s`, `duration_s`; `schedule_lag_p50_s` and `_p99_s` where it was given.
        A number that no request defines is NaN.
    """
    last_s = _last_event_s(records) if end_s is None else end_s
    inside = (records.arrival_s >= start_s) & ((records.arrival_s < last_s) if end_s is not None else True)
    counted = records if bool(np.all(inside)) else records.select(inside)
    finished = counted.select(counted.status == FINISHED)
    failed = int((counted.status == FAILED).sum())
    good = int(counted.good(slo or Slo()).sum())
    attempted = len(finished) + failed  # requests cut off by the end of the run say nothing either way
    duration_s = last_s - start_s
    table: dict[str, float] = {
        "requests": len(counted),
        "finished": len(finished),
        "failed": failed,
        "cut": len(counted) - attempted,
        "preemptions": int(counted.preemptions.sum()),
        "attainment": good / attempted if attempted else math.nan,
        "goodput_rps": _per_second(good, duration_s),
        "requests_per_s": _per_second(len(finished), duration_s),
        "output_tokens_per_s": _per_second(int(finished.output_tokens.sum()), duration_s),
        "duration_s": duration_s,
    }
    latencies: Mapping[str, FloatArray] = {
        "ttft": finished.ttft_s,
        "tpot": finished.tpot_s,
        "e2e": finished.e2e_s,
        "queue": finished.queue_s,
    }
    for name, values in latencies.items():
        table |= distribution(name, values, percentiles, rule)
    if len(records.token_ends):
        table |= distribution("itl", finished.itl_s, percentiles, rule)
    if schedule_lag_s is not None:
        table |= {f"schedule_lag_p{percent}_s": percentile(schedule_lag_s, percent, rule) for percent in (50, 99)}
    return table


def _last_event_s(records: Records) -> float:
    """When the last thing happened; NaN when nothing did."""
    events = np.concatenate((records.arrival_s, records.finish_s))
    events = events[np.isfinite(events)]
    return float(events.max()) if len(events) else math.nan


def _per_second(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else math.nan
