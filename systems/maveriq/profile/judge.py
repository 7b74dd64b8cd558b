"""How far the estimators are from whole models measured on the same machine.

    python -m systems.maveriq.profile.judge --fingerprints F.csv [F2.csv ...] --whole W.csv [W2.csv ...] [--out ERRORS.csv]

A row per configuration of a whole model that the fingerprints can speak of, by mode. On (1,1) the published method is its
first step alone (the depth and length lines, law.py), which needs no other layout; elsewhere it needs the fingerprints of
(1,1), (1,2) and (2,1). Exit status: 0; 2 for bad input, one line on stderr.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from systems.common.errors import InputError
from systems.maveriq.configuration import Configuration, ModelFacts, Question, facts_of, known_models
from systems.maveriq.estimator import make_estimator
from systems.maveriq.estimator_paper import PaperEstimator
from systems.maveriq.files import write
from systems.maveriq.fingerprint import Fingerprints, Point, Setting, read_fingerprints
from systems.maveriq.law import batched, extend_line, full_depth

COLUMNS = (
    "model", "tp", "pp", "dtype", "batch", "output_length", "mode", "true_s", "latency_s", "latency_error_percent", "inside",
    "true_gib", "memory_gib", "memory_error_percent", "memory_inside",
)  # fmt: skip
MODES = ("paper", "improved")


@dataclass(frozen=True, slots=True)
class Judged:
    """One configuration, one mode: truth and estimate; whether the interval holds the truth (None without one)."""

    setting: Setting
    mode: str
    truth: Point
    latency_s: float
    memory_gib: float
    inside: bool | None = None
    memory_inside: bool | None = None

    @property
    def latency_error(self) -> float:
        """Signed, relative."""
        return self.latency_s / self.truth.latency_s - 1

    @property
    def memory_error(self) -> float:
        """Signed, relative."""
        return self.memory_gib / self.truth.memory_gib - 1


def together(files: Sequence[Path], *, even_only: bool = False) -> Fingerprints:
    """The points of several files; where two have the same point, the first file's. Raises InputError for an unusable file."""
    points: dict[Setting, Point] = {}
    for file in files:
        points = {**read_fingerprints(file, even_only=even_only).points, **points}
    return Fingerprints(" and ".join(map(str, files)), points)


def judge(
    prints: Fingerprints, whole: Fingerprints, prompt_tokens: int | None = None, models: Mapping[str, ModelFacts] | None = None
) -> tuple[list[Judged], list[str]]:
    """Both modes over every whole model in `whole`, and what a mode could not speak of."""
    facts = known_models() if models is None else models
    found: list[Judged] = []
    silent: list[str] = []
    known = [s for s in whole.points if s.model in prints.models and s.layers == facts_of(s.model, facts).layers]
    estimators = {
        "paper": PaperEstimator(prints, facts),
        "improved": make_estimator(prints, "improved", facts, prompt_tokens=prompt_tokens),
    }
    for setting in sorted(known):
        for mode, estimator in estimators.items():
            question = Question(
                setting.model, Configuration(setting.tp, setting.pp, setting.dtype, setting.int8_kv), setting.batch,
                setting.output_length,
            )  # fmt: skip
            truth = whole.points[setting]
            try:
                if mode == "paper" and setting.layout == (1, 1):
                    found.append(Judged(setting, mode, truth, *_first_step(prints, setting, facts)))
                    continue
                one = estimator.estimate_many([question])[0]
            except InputError as error:
                silent.append(f"{mode}: {error}")
                continue
            bounds: tuple[bool | None, bool | None] = (None, None)
            if mode == "improved":
                bounds = (
                    one.latency_low_s <= truth.latency_s <= one.latency_high_s,
                    one.memory_low_gib <= truth.memory_gib <= one.memory_high_gib,
                )
            found.append(Judged(setting, mode, truth, one.latency_s, one.memory_gib, *bounds))
    return found, list(dict.fromkeys(silent))


def _first_step(prints: Fingerprints, asked: Setting, facts: Mapping[str, ModelFacts]) -> tuple[float, float]:
    """Paper mode on (1,1): seconds and GiB. Raises InputError where a fingerprint is missing."""
    values = []
    for batch in (1, 2) if asked.batch > 1 else (1, 1):
        mine = {
            (s.layers, s.output_length): point
            for s, point in prints.points.items()
            if (s.model, s.layout, s.precision, s.batch) == (asked.model, (1, 1), asked.precision, batch)
        }
        depths, lengths = (sorted({key[axis] for key in mine})[:2] for axis in (0, 1))
        if len(depths) < 2 or len(lengths) < 2 or not {(n, o) for n in depths for o in lengths} <= set(mine):
            where = f"{asked.model} {asked.dtype} (1,1) batch {batch}"
            raise InputError(prints.source, where, sorted(mine), "two depths and two output lengths are needed: measure them")
        (n1, n2), (o1, o2) = depths, lengths
        at = ((mine[n1, o1].latency_s, mine[n1, o2].latency_s), (mine[n2, o1].latency_s, mine[n2, o2].latency_s))
        layers = facts_of(asked.model, facts).layers
        line = full_depth(at, (n1, n2), (o1, o2), layers)
        gib = extend_line(mine[n1, o1].memory_gib, mine[n2, o1].memory_gib, n1, n2, layers)
        values.append((line.ttft_s + asked.output_length * line.tpot_s, gib))
    (one_s, one_gib), (two_s, two_gib) = values
    return float(batched(one_s, two_s, asked.batch)), float(batched(one_gib, two_gib, asked.batch))


def as_csv(judged: Iterable[Judged]) -> str:
    """A row per configuration and mode."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in judged:
        s = one.setting
        numbers = (one.truth.latency_s, one.latency_s, 100 * one.latency_error)
        gib = (one.truth.memory_gib, one.memory_gib, 100 * one.memory_error)
        head = (s.model, s.tp, s.pp, s.dtype, s.batch, s.output_length, one.mode)
        shown = ([f"{number:.6g}" for number in part] for part in (numbers, gib))
        latency, memory = shown
        writer.writerow([*head, *latency, _said(one.inside), *memory, _said(one.memory_inside)])
    return text.getvalue()


def _said(inside: bool | None) -> str:
    return "" if inside is None else str(inside)


def summary(judged: Sequence[Judged]) -> list[dict[str, object]]:
    """Per model, mode, batch 1 or more: how many, median, 90th percentile and mean signed error in percent, truths inside."""
    groups: dict[tuple[str, str, str], list[Judged]] = {}
    for one in judged:
        batch = "1" if one.setting.batch == 1 else "> 1"
        for name in (one.setting.model, "all"):
            groups.setdefault((name, one.mode, batch), []).append(one)
    return [_summed(key, rows) for key, rows in sorted(groups.items())]


def _summed(key: tuple[str, str, str], rows: Sequence[Judged]) -> dict[str, object]:
    latency, memory = (100 * np.array([getattr(one, name) for one in rows]) for name in ("latency_error", "memory_error"))
    inside = [one.inside for one in rows if one.inside is not None]
    model, mode, batch = key
    return {
        "model": model, "mode": mode, "batch": batch, "configurations": len(rows),
        "latency_median_percent": float(np.median(np.abs(latency))),
        "latency_p90_percent": float(np.percentile(np.abs(latency), 90)),
        "latency_bias_percent": float(latency.mean()), "memory_median_percent": float(np.median(np.abs(memory))),
        "memory_p90_percent": float(np.percentile(np.abs(memory), 90)),
        "inside_percent": 100 * sum(inside) / len(inside) if inside else None,
    }  # fmt: skip


def shown(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table of `summary`."""
    head = ("model", "mode", "batch", "n", "latency: median", "p90", "bias", "memory: median", "p90", "truths inside 90 %")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        cells = [f"{cell:.1f} %" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m systems.maveriq.profile.judge", description="Estimators against the truth."
    )
    parser.add_argument("--fingerprints", type=Path, nargs="+", required=True, help="CSV files of the profiler")
    parser.add_argument("--whole", type=Path, nargs="+", required=True, help="CSV files of whole models")
    parser.add_argument("--prompt-tokens", type=int, help="prompt length (default: found from the fingerprints)")
    parser.add_argument("--out", type=Path, help="CSV file for a row per configuration and mode")
    options = parser.parse_args(arguments)
    try:
        found, silent = judge(together(options.fingerprints), together(options.whole), options.prompt_tokens)
        if not found:
            raise InputError("judge", "--whole", [str(f) for f in options.whole], "no configuration that both files speak of")
        if options.out is not None:
            write(options.out, as_csv(found))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(shown(summary(found)))
    for line in silent:
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
