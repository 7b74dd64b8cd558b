"""Tuning tasklets that were measured on a GPU: `tuning.csv` of its calibration, and the command that makes it.

    python -m systems.llmstation.tuning_table --training FILE.json --out reference/h200/calibrated/llama-3.1-8b/tuning.csv

The JSON is what `benchmarks/training.py` writes. Columns `phase,tokens,time_us`, one tasklet alone on the GPU per row:

* `forward`, `backward`: one layer of one sequence of `tokens` (CUDA graphs, LoRA on q, k and v);
* `recompute`: what activation checkpointing adds to `backward`;
* `loss`: head, loss and their gradient over all tokens; `step`: the optimizer's.

Between sizes, and below and above them, a measured time is scaled by what the operator costs say of a layer (`LayerCost`):
the nearest measured size gives the factor.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.common.hardware.readings import read_columns
from systems.common.serving_files import write
from systems.llmstation.tasklets import TuningJob

COLUMNS = ("phase", "tokens", "time_us")
PHASES = ("forward", "backward", "recompute", "loss", "step")
NEEDED = ("forward", "backward", "loss", "step")
PER_SAMPLE = ("loss", "step")
LayerCost = Callable[[str, int], float]
"""Seconds that the operator costs give a layer of a phase at so many tokens: only ratios are used."""


@dataclass(frozen=True, slots=True)
class TuningTable:
    """Seconds by phase and tokens."""

    path: Path
    times_s: Mapping[str, Mapping[int, float]]

    @property
    def source(self) -> str:
        """For a figure's footer."""
        sizes = ", ".join(str(tokens) for tokens in sorted(self.times_s["forward"]))
        return f"tuning tasklets measured at {sizes} tokens"

    def at(self, phase: str, tokens: int, layer_s: LayerCost) -> float:
        """Seconds of one tasklet of `phase` at `tokens`; 0 where recomputation was never measured."""
        known = self.times_s.get(phase, {})
        if not known:
            return 0.0
        nearest = min(known, key=lambda size: abs(size - tokens))
        if phase == "step":  # over the adapters, whatever was trained
            return known[nearest]
        if phase == "loss":
            return known[nearest] * tokens / nearest
        return known[nearest] * layer_s(phase, tokens) / layer_s(phase, nearest)

    def retimed(self, job: TuningJob, layers: int, layer_s: LayerCost, recompute: bool) -> TuningJob:
        """`job` with measured times: as many tasklets, with the same load on the GPU."""
        tokens = job.tokens
        forward_s = self.at("forward", tokens, layer_s)
        backward_s = self.at("backward", tokens, layer_s) + (self.at("recompute", tokens, layer_s) if recompute else 0.0)
        whole_s = {
            "forward": layers * forward_s,
            "backward": layers * backward_s + sum(self.at(phase, tokens, layer_s) for phase in PER_SAMPLE),
        }
        phases = tuple(replace(phase, tasklet_s=whole_s[phase.name] / phase.tasklets) for phase in job.phases)
        return replace(job, phases=phases)


def read_tuning(path: Path) -> TuningTable:
    """Read a table.

    Raises:
        InputError: no such file, a column or phase is missing, an unknown phase, a time or size that is not above 0.
    """
    numbers, words = read_columns(path, ("tokens", "time_us"), ("phase",))
    found: dict[str, dict[int, float]] = {}
    rows = zip(words["phase"], numbers["tokens"], numbers["time_us"], strict=True)
    for row, (phase, tokens, time_us) in enumerate(rows, start=2):
        if phase not in PHASES:
            raise InputError(path, f"column phase, row {row}", phase, f"use one of {', '.join(PHASES)}")
        for column, value in (("tokens", tokens), ("time_us", time_us)):
            if not value > 0:
                raise InputError(path, f"column {column}, row {row}", value, "give a number above 0")
        found.setdefault(phase, {})[int(tokens)] = time_us * 1e-6
    for phase in NEEDED:
        if phase not in found:
            raise InputError(path, "column phase", phase, "missing: `python -m systems.llmstation.tuning_table` writes all")
    return TuningTable(path, found)


# ---- from a benchmark's results


def rows_of(steps: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Rows of the table from the part `step` of `benchmarks/training.py`; variants that failed are passed over."""
    for name, found in steps.items():
        sequences, _, rest = name.partition(" x ")
        length, _, variant = rest.partition(" ")
        if sequences == "1" and variant == "graphs" and "phases_ms" in found:
            phases = found["phases_ms"]
            for phase in ("forward", "backward"):
                yield phase, int(length), 1e3 * phases[f"{phase} tasklet"]
            for phase in PER_SAMPLE:
                yield phase, int(length), 1e3 * phases[phase]
        if variant == "eager, recompute" and "phases_ms" in found:
            plain = steps.get(f"{sequences} x {length} eager", {}).get("phases_ms")
            if plain:
                extra_ms = found["phases_ms"]["backward tasklet"] - plain["backward tasklet"]
                yield "recompute", int(sequences) * int(length), 1e3 * extra_ms


def table_of(rows: Sequence[tuple[str, int, float]]) -> str:
    """The table as text, by phase and size; each size of a phase once."""
    once = {(phase, tokens): time_us for phase, tokens, time_us in rows}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for phase, tokens in sorted(once, key=lambda key: (PHASES.index(key[0]), key[1])):
        writer.writerow((phase, tokens, f"{once[phase, tokens]:.3f}"))
    return text.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line."""
    made = argparse.ArgumentParser(prog="python -m systems.llmstation.tuning_table", description="tuning.csv of a calibration.")
    made.add_argument("--training", type=Path, required=True, help="JSON that benchmarks/training.py wrote")
    made.add_argument("--out", type=Path, required=True, help="CSV to write, tuning.csv of a calibration")
    options = made.parse_args(arguments)
    try:
        write(options.out, table_of(_read_steps(options.training)))
        read_tuning(options.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(options.out)
    return 0


def _read_steps(path: Path) -> list[tuple[str, int, float]]:
    try:
        rows = list(rows_of(json.loads(path.read_text(encoding="utf-8"))["step"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(path, "--training", type(error).__name__, "give what benchmarks/training.py wrote") from None
    if not {phase for phase, *_ in rows} >= set(NEEDED):
        raise InputError(
            path, "step", len(rows), "run the part `step` of benchmarks/training.py again: 1 x 512 graphs is missing"
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
