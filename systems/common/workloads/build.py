"""From a declaration to a workload: `build`. docs/workloads.md lists every key with examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from systems.common.core import Request
from systems.common.errors import InputError
from systems.common.workloads import adapters as adapter_patterns
from systems.common.workloads import arrivals, functions, lengths
from systems.common.workloads.arrivals import Extent
from systems.common.workloads.catalogue import read
from systems.common.workloads.declaration import Declaration
from systems.common.workloads.lengths import FILTERS, Lengths
from systems.common.workloads.readers import Recorded, burstgpt, requests_csv
from systems.common.workloads.standins import stand_in
from systems.common.workloads.streams import stream

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)  # without slots, so that `requests` is made once and only when somebody wants objects
class Workload:
    """The requests of one run, in order of arrival: columns for the fast path, objects on demand.

    Attributes:
        arrival_s: seconds from the start of the run, rising.
        input_tokens, output_tokens: lengths, at least 1.
        adapters: one per request, or empty where none names an adapter.
        notes: what a figure's footer must say: stand-ins, rescaled lengths and arrivals.
    """

    arrival_s: FloatArray
    input_tokens: IntArray
    output_tokens: IntArray
    adapters: tuple[str | None, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.arrival_s) == len(self.input_tokens) == len(self.output_tokens)
        assert len(self.adapters) in (0, len(self.arrival_s))

    def __len__(self) -> int:
        return len(self.arrival_s)

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The same as objects, numbered from 0."""
        columns = (self.arrival_s.tolist(), self.input_tokens.tolist(), self.output_tokens.tolist())
        named = self.adapters or (None,) * len(self)
        return tuple(map(Request, range(len(self)), *columns, named))


class _Builder:
    """One use of `build`: the declaration, where datasets are, and the notes that collect on the way."""

    def __init__(self, declaration: Declaration, datasets: Mapping[str, Path | None], seed: int) -> None:
        self.keys, self.datasets, self.seed = declaration, datasets, seed
        self.notes: list[str] = []
        self.replayed: tuple[str, Recorded, int] | None = None  # name, content and first row of the trace, once replayed
        self.callers: IntArray | None = None  # adapter of each request, where the arrivals decide it

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def dataset(self, key: str, name: str, model: str | None = None, limit: int | None = None) -> Recorded:
        """Dataset `name` from its file, or its stand-in (with a note) where the file is not to be had."""
        if name not in self.datasets:
            raise self.keys.error(key, name, f"add it under `datasets` (there: {', '.join(sorted(self.datasets)) or 'none'})")
        path = self.datasets[name]
        if path is None:
            self.note(f"{name}: synthetic stand-in")
            return stand_in(name)
        if name == "burstgpt":  # 3.8 million rows, of which a run needs the first few thousand
            return burstgpt(path, model=model or "ChatGPT", limit=limit)
        return read(name, path)

    def extent(self) -> Extent:
        return Extent(self.keys.whole("requests"), self.keys.number("seconds"))

    # One method per arrival process.

    def poisson(self) -> FloatArray:
        return arrivals.poisson(self.stream("arrivals"), self.keys.need("rate_rps"), self.extent())

    def deterministic(self) -> FloatArray:
        return arrivals.deterministic(self.keys.need("rate_rps"), self.extent())

    def gamma(self) -> FloatArray:
        return arrivals.gamma(self.stream("arrivals"), self.keys.need("rate_rps"), self.keys.need("cv"), self.extent())

    def spotserve_gamma(self) -> FloatArray:
        rate_rps, cv = self.keys.need("rate_rps"), self.keys.need("cv")
        self.note(f"arrivals as SpotServe's artifact draws them: true CV {(cv * rate_rps / 1000) ** 0.5:.3g}, not {cv:g}")
        return arrivals.spotserve_gamma(self.stream("arrivals"), rate_rps, cv, self.extent())

    def piecewise(self) -> FloatArray:
        rates = self.keys.numbers("rates_rps")
        if self.keys.has("interval_s"):
            durations = [self.keys.need("interval_s")] * len(rates)
        else:
            durations = self.keys.numbers("durations_s")
        bounded = self.keys.has("requests") or self.keys.has("seconds")
        return arrivals.piecewise(self.stream("arrivals"), rates, durations, self.extent() if bounded else None)

    def mmpp(self) -> FloatArray:
        rates, dwell_s = self.keys.numbers("rates_rps"), self.keys.numbers("dwell_s")
        streams = self.stream("arrivals"), self.stream("modulation")
        return arrivals.mmpp(*streams, rates, dwell_s, self.extent(), self.keys.number("rate_rps"))

    def replay(self) -> FloatArray:
        name = self._trace()
        rate_rps, extent = self.keys.number("rate_rps"), self.extent()
        skip = self.keys.whole("trace_start", default=0, least=0) or 0
        model = self.keys.text("trace_model") if name == "burstgpt" else None
        wanted = None
        if extent.count is not None or rate_rps is not None:
            wanted = skip + extent.expect(rate_rps or 1.0) + 1
        recorded = self.dataset("trace", name, model, wanted)
        self.replayed = name, recorded, skip
        if rate_rps is not None:
            self.note(f"{name}: arrivals rescaled to {rate_rps:g} req/s")
        return arrivals.replay(recorded.arrivals(name), extent, rate_rps, skip)

    def functions(self) -> FloatArray:
        name = self._trace()
        if name not in self.datasets:
            raise self.keys.error(
                "trace", name, f"add it under `datasets` (there: {', '.join(sorted(self.datasets)) or 'none'})"
            )
        path = self.datasets[name]
        trace = functions.function_trace(name, path)
        if path is None:
            self.note(f"{name}: synthetic stand-in")
        adapters, requests = self.keys.whole("adapters"), self.keys.whole("requests")
        if adapters is None or requests is None:
            raise self.keys.error(
                "adapters" if adapters is None else "requests", None, "missing: give a whole number, at least 1"
            )
        counts = trace.window(self.keys.whole("window_hours", default=1) or 1)
        stride = self.keys.whole("map_stride", default=1) or 1
        striped = functions.stripe(counts, adapters, stride, self.keys.flag("by_popularity"))
        rate_rps, cv, correlated = self.keys.need("rate_rps"), self.keys.number("cv") or 1.0, self.keys.flag("correlated")
        times, self.callers = functions.replay(striped, self.stream("arrivals"), requests, rate_rps, cv, correlated)
        return times

    # One method per rule of lengths; any other value of `lengths` is a dataset's name.

    def fixed_lengths(self, count: int) -> Lengths:
        return lengths.fixed(count, self._tokens("input_tokens"), self._tokens("output_tokens"))

    def uniform_lengths(self, count: int) -> Lengths:
        inputs = self._tokens("min_input_tokens"), self._tokens("max_input_tokens")
        outputs = self._tokens("min_output_tokens"), self._tokens("max_output_tokens")
        return lengths.uniform(self.stream("lengths"), count, inputs, outputs)

    def lognormal_lengths(self, count: int) -> Lengths:
        rng = self.stream("lengths")
        columns = []
        for kind in ("input", "output"):
            mean, p50 = self.keys.need(f"mean_{kind}_tokens"), self.keys.need(f"p50_{kind}_tokens")
            columns.append(lengths.lognormal(rng, count, mean, p50, self.keys.whole(f"max_{kind}_tokens")))
        return Lengths(*columns)

    def trace_lengths(self, count: int) -> Lengths:
        if self.replayed is None:
            raise self.keys.error("lengths", "trace", "it needs `arrivals: replay`; or name a dataset to sample from")
        name, recorded, skip = self.replayed
        return recorded.lengths(name).take(np.arange(skip, skip + count))

    def dataset_lengths(self, name: str, count: int) -> Lengths:
        table = self.dataset("lengths", name).lengths(name)
        filter_name = self.keys.choice("lengths_filter", FILTERS, default="none")
        caps = FILTERS[filter_name]
        for key in ("max_input_tokens", "max_total_tokens"):
            limit = self.keys.whole(key)
            caps = replace(caps, **{key: limit}) if limit is not None else caps
        table = lengths.keep(table, caps)
        means = self.keys.number("mean_input_tokens"), self.keys.number("mean_output_tokens")
        if means != (None, None):
            table = lengths.scale_to_mean(table, *means, caps=caps)
            inputs, outputs = table.input_tokens.mean(), table.output_tokens.mean()
            self.note(f"{name}: lengths rescaled to a mean of {inputs:.1f} in, {outputs:.1f} out")
        return lengths.sample(table, self.stream("lengths"), count, self.keys.flag("lengths_replacement"))

    def adapters(self, count: int) -> tuple[str | None, ...]:
        if self.callers is not None:
            return tuple([f"adapter-{k}" for k in self.callers.tolist()])
        number = self.keys.whole("adapters")
        if number is None:
            return ()
        pattern = self.keys.choice("adapter_pattern", adapter_patterns.PATTERNS, default="round-robin")
        exponent = self.keys.need("adapter_exponent") if pattern == "zipf" else 1.0
        return adapter_patterns.assign(self.stream("adapters"), count, number, pattern, exponent)

    def stream(self, purpose: str) -> np.random.Generator:
        return stream(self.seed, purpose)

    def _trace(self) -> str:
        name = self.keys.text("trace")
        if name is None:
            raise self.keys.error("trace", None, "missing: give the name of a dataset with arrivals")
        return name

    def _tokens(self, key: str) -> int:
        value = self.keys.whole(key)
        if value is None:
            raise self.keys.error(key, None, "missing: give a whole number of tokens, at least 1")
        return value


_ARRIVALS: Mapping[str, Callable[[_Builder], FloatArray]] = {
    "poisson": _Builder.poisson,
    "deterministic": _Builder.deterministic,
    "gamma": _Builder.gamma,
    "spotserve-gamma": _Builder.spotserve_gamma,
    "piecewise": _Builder.piecewise,
    "mmpp": _Builder.mmpp,
    "replay": _Builder.replay,
    "functions": _Builder.functions,
}

_LENGTHS: Mapping[str, Callable[[_Builder, int], Lengths]] = {
    "fixed": _Builder.fixed_lengths,
    "uniform": _Builder.uniform_lengths,
    "lognormal": _Builder.lognormal_lengths,
    "trace": _Builder.trace_lengths,
}


def build(
    declaration: Mapping[str, object], datasets: Mapping[str, Path | None], seed: int, where: str = "workload"
) -> Workload:
    """The workload that `declaration` describes: the same three arguments give the same requests.

    Args:
        declaration: flat data, such as {arrivals: poisson, rate_rps: 2, seconds: 200, lengths: sharegpt_lengths}.
        datasets: file of each dataset that the declaration may name; None means its synthetic stand-in.
        seed: arrivals, lengths and adapters each get an independent stream of it.
        where: what error messages call the declaration.

    Raises:
        InputError: a key that is unknown, missing, unused or impossible; a dataset that is unusable.
    """
    keys = Declaration(declaration, where)
    builder = _Builder(keys, datasets, seed)
    try:
        kind = keys.choice("arrivals", _ARRIVALS)
        times = _ARRIVALS[kind](builder)
        rule = keys.text("lengths")
        if rule is None:
            raise keys.error("lengths", None, f"missing: give one of {', '.join(_LENGTHS)} or the name of a dataset")
        sized = _LENGTHS[rule](builder, len(times)) if rule in _LENGTHS else builder.dataset_lengths(rule, len(times))
        names = builder.adapters(len(times))
        keys.finish()
    except InputError as error:
        if error.where == "workload" and where != "workload":
            raise InputError(where, error.key, error.value, error.mend) from error
        raise
    return Workload(times, sized.input_tokens, sized.output_tokens, names, tuple(builder.notes))


def from_csv(path: Path) -> Workload:
    """A user's own requests, as they are in the file (columns: see `readers.requests_csv`).

    Raises InputError naming file, line, column, value and mend.
    """
    recorded = requests_csv(path)
    sized = recorded.lengths(path.name)
    return Workload(recorded.arrivals(path.name), sized.input_tokens, sized.output_tokens, recorded.adapters or ())
