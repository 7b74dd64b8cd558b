"""Requests to many adapters, as serverless functions are called: dLoRA's workloads from Azure Functions 2019 and 2021.

The replay is the artifact's, which has it from AlpaServe (papers' sheet of dLoRA, section 4):

1. a window of the trace, from its start, cut into intervals of an hour;
2. functions to adapters in stripes: `stride` consecutive functions to one adapter, the next ones to the next, wrapping
   round; in the order of the file or by falling popularity;
3. per interval an adapter's rate is the total rate times its share of that interval's invocations;
4. arrivals: a Gamma renewal process per adapter and interval, merged; each interval gives an equal part of the requests, so a
   window of hours is compressed into requests / rate seconds.

The artifact reseeds every adapter's generator alike in each interval, so its streams are correlated copies of one another:
`correlated=True` does that, otherwise all are independent.

| dataset | reader | stand-in |
| --- | --- | --- |
| `azure_functions_2019` (MAF1) | `per_minute` | log-normal popularity |
| `azure_functions_2021` (MAF2) | `invocations` | published calls and times of each application, split into functions |
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from systems.common.errors import InputError
from systems.common.workloads.catalogue import entry

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
INTERVAL_S = 3600


@dataclass(frozen=True, slots=True)
class FunctionTrace:
    """Invocations per function and interval; entry [f, i]. `every` says that all intervals are alike (a stand-in)."""

    counts: FloatArray
    every: bool = False

    def window(self, hours: int) -> FloatArray:
        """The first `hours` intervals.

        Raises InputError when the trace is shorter, or nothing happens in one of them.
        """
        if self.every:
            return np.repeat(self.counts[:, :1], hours, axis=1)
        if hours > self.counts.shape[1]:
            raise InputError("workload", "window_hours", hours, f"the trace holds {self.counts.shape[1]} hours")
        chosen: FloatArray = self.counts[:, :hours]
        if not (chosen.sum(axis=0) > 0).all():
            raise InputError("workload", "window_hours", hours, "one of these hours has no invocation: choose another window")
        return chosen


def stripe(counts: FloatArray, adapters: int, stride: int, by_popularity: bool) -> FloatArray:
    """Invocations per adapter and interval: functions in stripes of `stride`.

    Raises InputError for a stride or number of adapters below 1.
    """
    for key, value in (("adapters", adapters), ("map_stride", stride)):
        if value < 1:
            raise InputError("workload", key, value, "give a whole number of at least 1")
    if by_popularity:
        counts = counts[np.argsort(-counts.sum(axis=1), kind="stable")]
    owner = np.arange(len(counts)) // stride % adapters
    striped = np.zeros((adapters, counts.shape[1]))
    np.add.at(striped, owner, counts)
    return striped


def replay(
    per_adapter: FloatArray, rng: np.random.Generator, requests: int, rate_rps: float, cv: float = 1.0, correlated: bool = False
) -> tuple[FloatArray, IntArray]:
    """Arrival times (s, rising) and adapters of `requests` requests at `rate_rps` over all intervals of `per_adapter`.

    Raises InputError for an empty trace, or fewer requests than intervals.
    """
    intervals = per_adapter.shape[1]
    if requests < intervals:
        raise InputError("workload", "requests", requests, f"give at least one per interval ({intervals})")
    if not len(per_adapter) or not (per_adapter.sum(axis=0) > 0).all():
        raise InputError("workload", "trace", "empty", "no function is invoked: give a trace with invocations")
    times, chosen, start_s = [], [], 0.0
    fixed = int(rng.integers(2**31)) if correlated else None  # the same in every interval, as the artifact's seed 0 is
    for interval in range(intervals):
        count = requests * (interval + 1) // intervals - requests * interval // intervals
        shares = per_adapter[:, interval] / per_adapter[:, interval].sum()
        at, who = _interval(shares, rng, fixed, count, cv)
        times.append(start_s + at / rate_rps)
        chosen.append(who)
        start_s = float(times[-1][-1])
    return np.concatenate(times), np.concatenate(chosen)


def _interval(
    shares: FloatArray, rng: np.random.Generator, fixed: int | None, count: int, cv: float
) -> tuple[FloatArray, IntArray]:
    """The first `count` arrivals at total rate 1; with `fixed` every adapter's gaps begin alike."""
    shape = 1 / cv**2
    horizon = count + 4 * math.sqrt(count) + 8
    active = np.flatnonzero(shares > 1e-9)  # who has less will not be seen
    while True:
        times, who = [], []
        for adapter in active.tolist():
            share = float(shares[adapter])
            most = math.ceil(share * horizon + 6 * cv * math.sqrt(share * horizon) + 12 * cv * cv + 8)
            source = np.random.default_rng(fixed) if fixed is not None else rng
            at = np.cumsum(source.standard_gamma(shape, most) / shape) / share
            at = at[at <= horizon] if at[-1] > horizon else at
            times.append(at)
            who.append(np.full(len(at), adapter, dtype=np.int64))
        every, owners = np.concatenate(times), np.concatenate(who)
        if len(every) >= count:
            order = np.argsort(every, kind="stable")[:count]
            return every[order], owners[order]
        horizon *= 2


def per_minute(path: Path) -> FunctionTrace:
    """Azure Functions 2019: a row per function, columns `1` to `1440` with invocations per minute of a day, summed to hours.

    Raises InputError naming file, line, column, value and mend.
    """
    rows: list[list[float]] = []
    for line, cells, header in _rows(path, ("HashFunction", "1", "1440")):
        first = header.index("1")
        try:
            minutes = np.array(cells[first : first + 1440], dtype=np.float64)
        except ValueError:
            minutes = np.empty(0)
        if minutes.shape != (1440,) or not (np.isfinite(minutes).all() and (minutes >= 0).all()):
            raise InputError(f"{path}, line {line}", "1 to 1440", len(cells), "give 1440 counts, none negative")
        rows.append(minutes.reshape(24, 60).sum(axis=1).tolist())
    if not rows:
        raise InputError(path, "file", "no rows", "give at least one function")
    return FunctionTrace(np.array(rows))


def invocations(path: Path) -> FunctionTrace:
    """Azure Functions 2021: a row per invocation with `app`, `func`, `end_timestamp` and `duration` (s).

    A function is an (app, func) pair; functions are in order of appearance. Hours count from the earliest start.

    Raises InputError naming file, line, column, value and mend.
    """
    numbers: dict[tuple[str, str], int] = {}
    who: list[int] = []
    starts: list[float] = []
    for line, cells, header in _rows(path, ("app", "func", "end_timestamp", "duration")):
        row = dict(zip(header, cells, strict=False))
        try:
            start_s = float(row["end_timestamp"]) - float(row["duration"])
        except (ValueError, KeyError):
            start_s = math.nan
        if not math.isfinite(start_s):
            raise InputError(f"{path}, line {line}", "end_timestamp, duration", ",".join(cells), "write two finite numbers")
        who.append(numbers.setdefault((row["app"], row["func"]), len(numbers)))
        starts.append(start_s)
    if not who:
        raise InputError(path, "file", "no rows", "give at least one invocation")
    hours = ((np.array(starts) - min(starts)) // INTERVAL_S).astype(np.int64)
    counts = np.zeros((len(numbers), int(hours.max()) + 1))
    np.add.at(counts, (np.array(who), hours), 1.0)
    return FunctionTrace(counts)


def _rows(path: Path, required: Sequence[str]) -> Iterator[tuple[int, list[str], list[str]]]:
    """Line number, cells and header of each row of a CSV file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            for name in required:
                if name not in header:
                    raise InputError(path, name, f"columns: {', '.join(header)[:60]}", "add this column")
            for cells in reader:
                if cells:
                    yield reader.line_num, cells, header
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            path, "file", getattr(error, "strerror", None) or str(error), "give a readable CSV file in UTF-8"
        ) from error


def lognormal_popularity(functions: int, top_share: float, carries: float, seed: int) -> FunctionTrace:
    """`functions` whose popularity is log-normal such that the top `top_share` of them carry `carries` of all calls; shuffled.

    The quantiles are evenly spread, so only the order is random; an hour is like any other.
    """
    normal = NormalDist()
    sigma = normal.inv_cdf(carries) + normal.inv_cdf(1 - top_share)
    levels = (np.arange(functions) + 0.5) / functions
    weights = np.exp(sigma * np.array([normal.inv_cdf(level) for level in levels.tolist()]))
    return FunctionTrace(np.random.default_rng(seed).permutation(weights)[:, None], every=True)


def split_applications(
    timelines: Sequence[tuple[float, float, float]], functions_per_application: float, single_share: float, hours: int = 6
) -> FunctionTrace:
    """Applications with (calls, first, last) split into functions, for the first `hours` hours.

    Calls are spread evenly between the first and the last. By falling popularity, applications with one function
    (`single_share` of them) and with several alternate as evenly as they can; the latter have equally many, and their calls
    fall as 1 / rank. In the table they stand in order of their first call, as in a file.
    """
    several = max(2, round((functions_per_application - single_share) / (1 - single_share)))
    ranked = sorted(timelines, key=lambda timeline: -timeline[0])
    rows: list[tuple[float, FloatArray]] = []
    singles = 0
    for rank, (calls, first_s, last_s) in enumerate(ranked):
        single = singles < single_share * (rank + 1)
        singles += single
        starts = INTERVAL_S * np.arange(hours)
        inside = np.clip(np.minimum(last_s, starts + INTERVAL_S) - np.maximum(first_s, starts), 0, None)
        hourly = calls * inside / (last_s - first_s)
        weights = np.ones(1) if single else 1.0 / (1.0 + np.arange(several))
        rows += [(first_s, hourly * share) for share in (weights / weights.sum()).tolist()]
    rows.sort(key=lambda row: row[0])
    return FunctionTrace(np.array([hourly for _, hourly in rows]))


READERS: Mapping[str, Callable[[Path], FunctionTrace]] = {
    "azure_functions_2019": per_minute,
    "azure_functions_2021": invocations,
}
POPULARITIES: Mapping[str, Callable[..., FunctionTrace]] = {
    "lognormal": lognormal_popularity,
    "applications": split_applications,
}


def made_up(statistics: Mapping[str, object]) -> FunctionTrace:
    """A trace with the given popularity, as the `stand_in` of a dataset describes it.

    Raises InputError for a popularity that does not exist.
    """
    kind = statistics.get("popularity")
    if kind not in POPULARITIES:
        raise InputError("registry.yaml", "stand_in.popularity", kind, f"use one of {', '.join(POPULARITIES)}")
    return POPULARITIES[str(kind)](**{k: v for k, v in statistics.items() if k not in ("kind", "source", "popularity")})


def function_trace(name: str, path: Path | None) -> FunctionTrace:
    """Dataset `name` from its file, or its stand-in (`path` None).

    Raises InputError when it is no trace of functions, or its file is unusable.
    """
    if name not in READERS:
        raise InputError("workload", "trace", name, f"it has no functions: use one of {', '.join(READERS)}")
    return _stand_in(name) if path is None else _cached(name, path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=4)
def _cached(name: str, path: Path, _mtime_ns: int) -> FunctionTrace:
    return READERS[name](path)


@lru_cache(maxsize=4)
def _stand_in(name: str) -> FunctionTrace:
    return made_up(entry(name).stand_in or {})
