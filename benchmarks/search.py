"""Probes and error of the knob search against simpler ones, over random knees in 1 ... 1000.

    python benchmarks/search.py [--knees N] [--out FILE]

`ours` is harness/search with 5 % tolerance; `doubling` doubles from 1 until the limit breaks and bisects to 5 %, as
MLPerf's peak search does; `grid` probes 20 even steps; `majority` is `doubling` with every verdict the majority of 3 seeds.
The system: metric = knob / knee, limit 1, log-normal noise of the stated size, fresh for every trial; the objective is the
knob. *Right*: the answer is within 5 % of the knee.
A table in Markdown, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.atomic import write_atomically
from harness.provenance import environment
from harness.search import Answer, Knob, Probe, SearchSpace, search

LOW, HIGH, TOLERANCE = 1.0, 1000.0, 0.05
NOISES = (0.0, 0.02, 0.05, 0.1)
Ask = Callable[[float, int], float]
"""A knob setting and a seed to metric / limit."""
Found = tuple[float, int, int]
"""The answer, the trials, the distinct settings."""


def system(knee: float, noise: float, seed: int) -> Ask:
    """The system whose metric / limit = knob / knee, times noise."""

    def ask(value: float, repeat: int) -> float:
        draw = random.Random(f"{seed} {value!r} {repeat}").gauss(0, 1) if noise else 0.0
        return value / knee * math.exp(noise * draw)

    return ask


def ours(ask: Ask, repeats: int, start: float | None = None) -> Found:
    """harness/search."""
    knob = Knob(low=LOW, high=HIGH, start=start)
    space = SearchSpace(maximise="y", limits={"m": 1.0}, knobs={"k": knob}, tolerance=TOLERANCE, repeats=repeats)

    def answer(probe: Probe) -> Answer:
        value = probe.knobs["k"]
        return Answer(probe, value, {"m": ask(value, probe.seed)})

    verdict, history = search(space, answer)
    found = verdict.knobs["k"] if verdict.knobs else LOW
    return found, len(history), len({a.probe.knobs["k"] for a in history})


def doubling(ask: Ask, votes: int = 1) -> Found:
    """Double until the limit breaks, then bisect; a setting passes by the majority of `votes` seeds."""
    settings = 0

    def passes(value: float) -> bool:
        nonlocal settings
        settings += 1
        return sum(ask(value, seed) <= 1 for seed in range(votes)) * 2 > votes

    low, high = LOW, LOW
    while passes(high):
        if high == HIGH:
            return HIGH, settings * votes, settings
        low, high = high, min(2 * high, HIGH)
    while high > low * (1 + TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low, settings * votes, settings


def grid(ask: Ask, steps: int = 20) -> Found:
    """Even steps from end to end; the largest that passes."""
    values = [LOW + (HIGH - LOW) * i / (steps - 1) for i in range(steps)]
    return max((v for v in values if ask(v, 0) <= 1), default=LOW), steps, steps


def measure(method: Callable[[Ask, float], Found], noise: float, knees: int) -> dict[str, float]:
    """One row: probes and errors of `method` over random knees."""
    draw = random.Random(1)
    places = [math.exp(draw.uniform(math.log(LOW), math.log(HIGH))) for _ in range(knees)]
    start = time.perf_counter()
    found = [method(system(knee, noise, seed), knee) for seed, knee in enumerate(places)]
    spent = time.perf_counter() - start
    errors = sorted(abs(value / knee - 1) for (value, _, _), knee in zip(found, places, strict=True))
    return {
        "noise": noise,
        "settings_mean": statistics.fmean(s for _, _, s in found),
        "settings_max": max(s for _, _, s in found),
        "trials_mean": statistics.fmean(t for _, t, _ in found),
        "trials_max": max(t for _, t, _ in found),
        "error_median": statistics.median(errors),
        "error_p95": errors[math.ceil(0.95 * knees) - 1],
        "right": sum(e <= TOLERANCE for e in errors) / knees,
        "ms_per_search": 1e3 * spent / knees,
    }


def hint(knee: float) -> float:
    """A knob setting within 15 % of the knee, as a simulation might give."""
    return min(max(knee * random.Random(knee).uniform(0.85, 1.15), LOW), HIGH)


METHODS: dict[str, Callable[[Ask, float], Found]] = {
    "ours": lambda ask, _: ours(ask, 5),
    "ours, 3 repeats": lambda ask, _: ours(ask, 3),
    "ours, hint within 15 %": lambda ask, knee: ours(ask, 5, hint(knee)),
    "doubling": lambda ask, _: doubling(ask),
    "doubling, majority of 3": lambda ask, _: doubling(ask, 3),
    "grid of 20": lambda ask, _: grid(ask),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description="Probes and error of the knob search against simpler ones.")
    parser.add_argument("--knees", type=int, default=1000, help="random knees per row")
    parser.add_argument("--out", type=Path, help="also write the JSON object, with provenance, to this file")
    args = parser.parse_args(argv)
    rows = [{"method": name, **measure(method, noise, args.knees)} for noise in NOISES for name, method in METHODS.items()]
    print("| noise | method | settings mean (max) | trials mean (max) | error p50 | p95 | right |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        counts = f"{row['settings_mean']:.1f} ({row['settings_max']}) | {row['trials_mean']:.1f} ({row['trials_max']})"
        errors = f"{row['error_median']:.1%} | {row['error_p95']:.1%} | {row['right']:.1%}"
        print(f"| {row['noise']:.0%} | {row['method']} | {counts} | {errors} |")
    result = {"benchmark": "search", "knees": args.knees, "tolerance": TOLERANCE, "rows": rows}
    if args.out:
        told = {**result, "provenance": environment()}
        write_atomically(args.out, json.dumps(told, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
