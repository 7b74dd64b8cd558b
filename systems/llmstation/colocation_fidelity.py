"""Simulate again the co-located runs that were measured, and tell how far off the simulation is.

    python -m systems.llmstation.colocation_fidelity compare --measured DIR --model M --hardware h200x1 --out FILE.csv
    python -m systems.llmstation.colocation_fidelity record --benchmark FILE.json --seconds 9 --sharegpt FILE.csv --out DIR

A workload's folder holds `requests.csv` (`arrival_s,input_tokens,output_tokens`) and `runs.json`: per run its name, its
parameters, the metrics that were measured, and what the driver of that day could not do (`driver`: parameters of the simulator,
see docs/llmstation.md). Runs for which it says so take the co-run slowdowns of `corun.csv` beside it, if there is one, which
were measured with that driver. DIR of `compare` holds a folder per workload; every run is simulated with the GPU's calibration,
where there is one, and with the roofline. `record` makes a folder from what `benchmarks/llmstation.py` wrote.
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

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.common.fidelity import Difference, rows
from systems.common.hardware import parse_testbed
from systems.common.serving_files import write
from systems.common.workloads.build import build, from_csv
from systems.llmstation.experiments import simulated
from systems.llmstation.hardware_model import REFERENCE

COLUMNS = ("workload", "hardware_model", "metric", "statistic", "unit", "simulated", "measured", "error", "aim", "met")
COMPARED = (
    ("ttft_p50_s", "ttft", "p50", "s"), ("ttft_p99_s", "ttft", "p99", "s"),
    ("tpot_p50_s", "tpot", "p50", "s"), ("tpot_p99_s", "tpot", "p99", "s"),
    ("peft_samples_per_s", "peft", "rate", "samples/s"),
)  # fmt: skip
SERVED = {
    "arrivals": "poisson", "lengths": "sharegpt_lengths", "lengths_filter": "vllm-sharegpt",
    "mean_input_tokens": 215.2, "mean_output_tokens": 198,
}  # fmt: skip
"""The workload of `benchmarks/llmstation.py`."""
NOT_PARAMETERS = ("metrics", "notes", "error", "left_out")


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run: what it was asked, what it gave, and what its driver could not do."""

    name: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    driver: Mapping[str, Any]


def read_runs(folder: Path) -> list[Run]:
    """The runs of a workload's folder.

    Raises InputError for a file that is not what `record` wrote.
    """
    path = folder / "runs.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [Run(str(one["name"]), one["parameters"], one["metrics"], one.get("driver", {})) for one in told]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(path, "file", type(error).__name__, "give what `colocation_fidelity record` wrote") from None


def differences(folder: Path, run: Run, model: str, hardware: str, hardware_model: str) -> tuple[Difference, ...]:
    """`run` simulated against `run` measured.

    Raises InputError where the run names what the simulator does not know.
    """
    told = {"model": model, **run.parameters, **run.driver, "hardware_model": hardware_model}
    slowdowns = folder / "corun.csv"  # measured with a driver that could not do it either
    given = {"corun_slowdowns": slowdowns} if run.driver and hardware_model == "calibrated" and slowdowns.is_file() else {}
    trial = Trial("llmstation", "colocation", told, hardware, "simulated", 0, given)
    found: Mapping[str, Any] = simulated(trial, from_csv(folder / "requests.csv")).metrics
    return tuple(
        Difference(metric, statistic, unit, float(found[key]), float(run.metrics[key]))
        for key, metric, statistic, unit in COMPARED
    )


def table(measured: Path, model: str, hardware: str, reference: Path = REFERENCE) -> Iterator[Mapping[str, Any]]:
    """All rows, with the calibration where the GPU has one, and with the roofline.

    `workload` is the run's name, after its folder's where there are several folders.
    """
    folders = sorted(path.parent for path in measured.glob("*/runs.json"))
    if not folders:
        raise InputError(measured, "--measured", measured.name, "holds no <workload>/runs.json: name a folder that does")
    calibrated = (reference / parse_testbed(hardware, "--hardware").gpu.name / "calibrated" / model).is_dir()
    for folder in folders:
        for run in read_runs(folder):
            for kind in ("calibrated", "roofline") if calibrated else ("roofline",):
                for row in rows(differences(folder, run, model, hardware, kind)):
                    if row["metric"] != "peft" or row["measured"]:
                        yield {
                            "workload": run.name if len(folders) == 1 else f"{folder.name}: {run.name}",
                            "hardware_model": kind,
                            **row,
                            "aim": None,
                            "met": None,
                        }


# ---- from a benchmark's results


def recorded(benchmark: Path, seconds: float, sharegpt: Path | None, driver: Mapping[str, Any]) -> Mapping[str, str]:
    """The files of a workload's folder, by name, from what `benchmarks/llmstation.py` wrote at one rate.

    `driver` is noted with the runs that tune in the serving process, as far as it concerns them.

    Raises:
        InputError: no such file, runs at several rates, a workload that has not as many requests as were served.
    """
    try:
        told = json.loads(benchmark.read_text(encoding="utf-8"))
        runs = [one for one in told["policies"] if "metrics" in one]
        rates = {float(one["rate_rps"]) for one in runs}
        counts = {int(one["metrics"]["requests"]) for one in runs}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(benchmark, "--benchmark", type(error).__name__, "give what benchmarks/llmstation.py wrote") from None
    if len(rates) != 1:
        raise InputError(benchmark, "rate_rps", sorted(rates), "give runs at one rate: a folder holds one workload")
    asked = {**SERVED, "rate_rps": rates.pop(), "seconds": seconds}
    requests = build(asked, {"sharegpt_lengths": sharegpt}, 0).requests
    if counts != {len(requests)}:
        mend = f"{len(requests)} requests here: give the seconds and lengths with which it was run"
        raise InputError(benchmark, "requests", sorted(counts), mend)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arrival_s", "input_tokens", "output_tokens"))
    writer.writerows((f"{r.arrival_s:.6f}", r.input_tokens, r.output_tokens) for r in requests)
    kept = {"made_from": benchmark.name, "provenance": told.get("provenance", {}), "runs": [_kept(one, driver) for one in runs]}
    return {"requests.csv": text.getvalue(), "runs.json": json.dumps(kept, indent=1) + "\n"}


def _kept(one: Mapping[str, Any], driver: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {key: value for key, value in one.items() if key not in NOT_PARAMETERS}
    metrics = one["metrics"]
    parameters |= {"kv_blocks": metrics["num_gpu_blocks"], "fused": one.get("fused", "off")}
    policy = str(one["policy"])
    mode = str(one.get("mode", "planner")) if policy == "llmstation" else ""
    here = policy in ("llmstation", "fineinfer")
    concerned = {k: v for k, v in driver.items() if here and (k != "most_beside" or mode == "planner")}
    knob = {"decode_target_s": "ms", "thread_percentage": "%", "chunk_tokens": "tokens"}
    sizes = [f"{1e3 * one[k] if unit == 'ms' else one[k]:g} {unit}" for k, unit in knob.items() if k in one]
    name = " ".join((mode or policy.replace("_", " "), *sizes))
    wanted = {key: metrics[key] for key, *_ in COMPARED} | {key: metrics[key] for key in ("requests", "finished", "duration_s")}
    return {"name": name, "parameters": parameters, "driver": concerned, "metrics": wanted}


# ---- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line."""
    made = argparse.ArgumentParser(
        prog="python -m systems.llmstation.colocation_fidelity", description="Co-located runs, judged."
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    compare = verbs.add_parser("compare", help="simulate recorded runs again")
    compare.add_argument("--measured", type=Path, required=True, help="folder with a folder per workload")
    compare.add_argument("--model", required=True, help="the model shape that was measured")
    compare.add_argument("--hardware", required=True, help="the testbed that it was measured on, such as h200x1")
    compare.add_argument("--out", type=Path, required=True, help="CSV to write")
    record = verbs.add_parser("record", help="make a workload's folder")
    record.add_argument("--benchmark", type=Path, required=True, help="JSON that benchmarks/llmstation.py wrote")
    record.add_argument("--seconds", type=float, required=True, help="its --seconds")
    record.add_argument("--sharegpt", type=Path, help="its --sharegpt")
    record.add_argument("--driver", type=json.loads, default={}, help="JSON: what its driver could not do")
    record.add_argument("--out", type=Path, required=True, help="folder to write")
    options = made.parse_args(arguments)
    try:
        if options.verb == "compare":
            found = list(table(options.measured, options.model, options.hardware))
            write(options.out, _csv(found))
            print(_shown(found))
        else:
            for name, text in recorded(options.benchmark, options.seconds, options.sharegpt, options.driver).items():
                write(options.out / name, text)
            print(options.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _csv(found: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _shown(found: Sequence[Mapping[str, Any]]) -> str:
    """Signed errors in percent, a line per run and hardware model."""
    cells = {(r["workload"], r["hardware_model"], r["metric"], r["statistic"]): r["error"] for r in found}
    lines = [f"{'':44}" + "".join(f"{metric + ' ' + statistic:>11}" for _, metric, statistic, _ in COMPARED)]
    for name, kind in dict.fromkeys((r["workload"], r["hardware_model"]) for r in found):
        errors = [cells.get((name, kind, metric, statistic), math.nan) for _, metric, statistic, _ in COMPARED]
        shown = (f"{'-':>11}" if math.isnan(error) else f"{100 * error:+10.1f}%" for error in errors)
        lines.append(f"{name + ', ' + kind:44}" + "".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
