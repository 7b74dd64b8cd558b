"""How far a simulation is from a measurement of the same workload: signed relative errors, as rows. Pure.

    for row in rows(compare(simulated, measured)):
        print(row["metric"], row["statistic"], f"{100 * row['error']:+.1f} %")

An error is (simulated - measured) / measured: positive where the simulator is pessimistic about a latency. Statistics are
those of docs/vocabulary.md, over finished requests; a run whose requests did not all finish on both sides compares different
samples, so the counts are rows as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from systems.common.core import RequestRecord
from systems.common.metrics import Records, summarise

LATENCIES = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p99")
RATES = ("requests_per_s", "output_tokens_per_s")

AIMS: Mapping[tuple[str, str], float] = {
    **{(latency, statistic): 0.02 for latency in ("tpot", "e2e") for statistic in STATISTICS},
    ("ttft", "p50"): 0.05,
}
"""The largest error, as a fraction, that the project aims at on held-out workloads; those without are only told."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One statistic of one metric, simulated and measured, in `unit`.

    Attributes:
        metric: `ttft`, `tpot`, `e2e`, `requests_per_s`, `output_tokens_per_s` or `finished`.
        statistic: `mean`, `p50`, `p90`, `p99`; `rate` or `count` for the others.
    """

    metric: str
    statistic: str
    unit: str
    simulated: float
    measured: float

    @property
    def error(self) -> float:
        """(simulated - measured) / measured; NaN when one is undefined or the measured one is 0."""
        return (self.simulated - self.measured) / self.measured if self.measured else math.nan

    @property
    def aim(self) -> float | None:
        """The largest |error| that is aimed at, if any."""
        return AIMS.get((self.metric, self.statistic))

    @property
    def met(self) -> bool | None:
        """Whether |error| is within the aim; None without an aim. An undefined error is not."""
        return None if self.aim is None else abs(self.error) <= self.aim


def compare(
    simulated: Records | Sequence[RequestRecord], measured: Records | Sequence[RequestRecord]
) -> tuple[Difference, ...]:
    """All differences of two runs of one workload: latencies first, then throughput, then how many finished."""
    ours, theirs = (summarise(_columns(run)) for run in (simulated, measured))
    found = [
        Difference(latency, statistic, "s", ours[f"{latency}_{statistic}_s"], theirs[f"{latency}_{statistic}_s"])
        for latency in LATENCIES
        for statistic in STATISTICS
    ]
    found += [Difference(rate, "rate", "1/s", ours[rate], theirs[rate]) for rate in RATES]
    return (*found, Difference("finished", "count", "1", ours["finished"], theirs["finished"]))


def rows(differences: Iterable[Difference]) -> list[dict[str, str | float | bool | None]]:
    """One dictionary per difference, for a table: its fields, `error`, `aim` and `met`."""
    return [
        {
            "metric": one.metric,
            "statistic": one.statistic,
            "unit": one.unit,
            "simulated": one.simulated,
            "measured": one.measured,
            "error": one.error,
            "aim": one.aim,
            "met": one.met,
        }
        for one in differences
    ]


def _columns(run: Records | Sequence[RequestRecord]) -> Records:
    return run if isinstance(run, Records) else Records.from_records(run)
