"""Simulate again what was measured, and tell how far off the simulation is.

    python -m systems.common.fidelity_table --measured DIR --model llama-3.1-8b --hardware h200 [--operators DIR] --out FILE.csv

DIR holds a folder per workload as `systems.common.measure` writes it (`requests.csv` with what came and what it took,
`summary.json` with the engine's limits). Each is simulated twice: from the datasheet's roofline, and from the calibration
`--operators` where there is one. FILE.csv gets a row per workload, hardware model, metric and statistic.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import serve
from systems.common.engine.results import to_records
from systems.common.errors import InputError
from systems.common.fidelity import compare, rows
from systems.common.hardware.readings import read_numbers
from systems.common.metrics import FINISHED, Records
from systems.common.serving_files import write
from systems.common.simulate import engine_of

COLUMNS = ("workload", "hardware_model", "metric", "statistic", "unit", "simulated", "measured", "error", "aim", "met")
TIMES = ("queued_s", "scheduled_s", "first_token_s", "finish_s")
SIZES = ("input_tokens", "output_tokens", "preemptions")
LIMITS = ("num_gpu_blocks", "max_num_batched_tokens", "max_num_seqs")


@dataclass(frozen=True, slots=True)
class Run:
    """One measured workload: its records, and the limits of the engine that served it."""

    name: str
    records: Records
    config: EngineConfig


def read_run(folder: Path) -> Run:
    """Read what `measure` wrote.

    Raises InputError for a missing file or key, and for a number that is none.
    """
    columns = {name: np.array(values) for name, values in read_numbers(folder / "requests.csv", (*TIMES, *SIZES)).items()}
    inputs, outputs, preemptions = (columns[name].astype(np.int64) for name in SIZES)
    records = Records(
        arrival_s=columns["queued_s"],
        scheduled_s=columns["scheduled_s"],
        first_token_s=columns["first_token_s"],
        finish_s=columns["finish_s"],
        status=np.full(len(columns["queued_s"]), FINISHED, np.int8),
        input_tokens=inputs,
        output_tokens=outputs,
        preemptions=preemptions,
    )
    return Run(folder.name, records, _config(folder / "summary.json"))


def _config(path: Path) -> EngineConfig:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        blocks, tokens, sequences = (int(summary[key]) for key in LIMITS)
        policy = str(summary["policy"])
        return EngineConfig(blocks, policy, max_num_batched_tokens=tokens, max_num_seqs=sequences)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(path, "file", type(error).__name__, "give what `python -m systems.common.measure` wrote") from None
    except KeyError as error:
        mend = "missing: give what `python -m systems.common.measure` wrote"
        raise InputError(path, "key", str(error.args[0]), mend) from None


def simulated(run: Run, model: str, hardware: str, operators: Path | None) -> tuple[Records, str]:
    """The same requests through the simulator, and what it says of its hardware model."""
    engine, executor = engine_of(run.config, model, hardware, operators)
    requests = [
        Request(i, float(at), int(a), int(b))
        for i, (at, a, b) in enumerate(
            zip(run.records.arrival_s, run.records.input_tokens, run.records.output_tokens, strict=True)
        )
    ]
    sequences = serve(engine, requests, ahead=executor if executor.launches_ahead else None)
    return to_records(sequences, engine), executor.cost.costs.source


def table(folders: Sequence[Path], model: str, hardware: str, operators: Path | None) -> Iterator[Mapping[str, Any]]:
    """All rows."""
    for folder in folders:
        run = read_run(folder)
        for source in (operators, None) if operators else (None,):
            records, name = simulated(run, model, hardware, source)
            kind = "calibrated" if source else "roofline"
            for row in rows(compare(records, run.records)):
                yield {"workload": run.name, "hardware_model": kind, **row, "source": name}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line."""
    made = argparse.ArgumentParser(prog="python -m systems.common.fidelity_table", description="Simulated against measured.")
    made.add_argument("--measured", type=Path, required=True, help="folder with a folder per measured workload")
    made.add_argument("--model", required=True, help="the model shape that was measured")
    made.add_argument("--hardware", required=True, help="the GPU that it was measured on, such as h200")
    made.add_argument("--operators", type=Path, help="calibration of that GPU; without one, the roofline alone")
    made.add_argument("--out", type=Path, required=True, help="CSV to write")
    options = made.parse_args(arguments)
    try:
        folders = sorted(path.parent for path in options.measured.glob("*/requests.csv"))
        if not folders:
            mend = "holds no workload: name a folder with <workload>/requests.csv, as `python -m systems.common.measure` writes"
            raise InputError(options.measured, "--measured", options.measured.name, mend)
        found = list(table(folders, options.model, options.hardware, options.operators))
        write(options.out, _csv(found))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(_shown(found))
    return 0


def _csv(found: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _shown(found: Sequence[Mapping[str, Any]]) -> str:
    """Signed errors in percent, a line per workload and hardware model."""
    wanted = [(metric, statistic) for metric in ("ttft", "tpot", "e2e") for statistic in ("p50", "p90", "p99")]
    lines = [f"{'':24}" + "".join(f"{metric + ' ' + statistic:>10}" for metric, statistic in wanted)]
    cells = {(r["workload"], r["hardware_model"], r["metric"], r["statistic"]): r["error"] for r in found}
    for name, kind in dict.fromkeys((r["workload"], r["hardware_model"]) for r in found):
        errors = [cells[name, kind, *key] for key in wanted]
        shown = (f"{'-':>10}" if math.isnan(error) else f"{100 * error:+9.1f}%" for error in errors)
        lines.append(f"{name + ', ' + kind:24}" + "".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
