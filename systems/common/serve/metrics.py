"""Counters and histograms of one server, as Prometheus text (exposition format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from systems.common.serve.messages import Family

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
TOKEN_SECONDS = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5)


@dataclass(slots=True)
class Counter:
    """A number that only grows."""

    value: int = 0

    def add(self, amount: int = 1) -> None:
        """Let it grow by `amount`."""
        self.value += amount


class Histogram:
    """How often a value fell into which bucket; `bounds` are the buckets' upper ends, inclusive."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(slots=True)
class Metrics:
    """What a server counts. TTFT and E2E run from when the request had been read to when the token was handed to HTTP."""

    prompt_tokens: Counter = field(default_factory=Counter)
    output_tokens: Counter = field(default_factory=Counter)
    ttft_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    tpot_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    ends: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))
    answers: dict[int, int] = field(default_factory=dict)

    def ended(self, reason: str) -> None:
        """Count a prompt's end."""
        self.ends[reason] += 1

    def answered(self, status: int) -> None:
        """Count an HTTP answer."""
        self.answers[status] = self.answers.get(status, 0) + 1

    def text(
        self, gauges: Mapping[str, tuple[str, float]], counts: Mapping[str, tuple[str, float]], more: Sequence[Family] = ()
    ) -> str:
        """Everything as text; `gauges` and `counts` are read elsewhere: name to (help, value); and `more`."""
        lines: list[str] = []

        def family(name: str, kind: str, about: str, samples: Mapping[str, float]) -> None:
            lines.append(f"# HELP fivefold_{name} {about}")
            lines.append(f"# TYPE fivefold_{name} {kind}")
            lines.extend(f"fivefold_{name}{labels} {value:.17g}" for labels, value in samples.items())

        for name, (about, value) in gauges.items():
            family(name, "gauge", about, {"": value})
        for name, (about, value) in counts.items():
            family(name, "counter", about, {"": value})
        for one in more:
            family(one.name, one.kind, one.about, one.samples)
        family("prompt_tokens_total", "counter", "Prompt tokens of accepted requests.", {"": self.prompt_tokens.value})
        family("output_tokens_total", "counter", "Tokens generated and handed out.", {"": self.output_tokens.value})
        ends = {f'{{reason="{reason}"}}': float(count) for reason, count in self.ends.items()}
        family("requests_ended_total", "counter", "Prompts whose answer ended, by reason.", ends)
        family(
            "requests_aborted_total", "counter", "Prompts whose client left or whose time ran out.", {"": self.ends["abort"]}
        )
        answers = {f'{{status="{status}"}}': float(count) for status, count in sorted(self.answers.items())}
        family("http_answers_total", "counter", "HTTP answers by status.", answers)
        for name, about, histogram in (
            ("ttft_seconds", "Time to first token.", self.ttft_s),
            ("tpot_seconds", "Time per output token after the first.", self.tpot_s),
            ("e2e_seconds", "Time to the last token.", self.e2e_s),
        ):
            lines += _histogram(f"fivefold_{name}", about, histogram)
        return "\n".join(lines) + "\n"


def _histogram(name: str, about: str, histogram: Histogram) -> list[str]:
    lines = [f"# HELP {name} {about}", f"# TYPE {name} histogram"]
    total = 0
    for bound, count in zip((*map("{:g}".format, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f"{name}_sum {histogram.sum:.9g}", f"{name}_count {total}"]
