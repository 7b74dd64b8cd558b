"""What the figures of H200 measurements show: one number each from tables that benchmarks wrote under `reference/`.

`python benchmarks/maveriq_record.py` reads them once into `reference/<gpu>/maveriq/<figure>/`, which `backend=recorded` draws.
Nothing stands in for a table that is not there.

* `reference/h200*/benchmarks/{quantised,parallel}.json`: decode steps and prompts (benchmarks/parallel.py).
* `reference/h200*/maveriq/profile*/*.csv`: the profiler's tables (benchmarks/maveriq_gpu.py) on one, two and four GPUs.
* `reference/h200*/benchmarks/maveriq_controller.json`: the controller at work (systems/maveriq/controller/trial.py), likewise.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from systems.common.core import Outcome, Scalar, Trial
from systems.common.errors import InputError
from systems.maveriq.fingerprint import Fingerprints, Point, read_fingerprints

REFERENCE = Path(__file__).resolve().parents[2] / "reference"
RUNS = ("profile", "profile_1", "profile_2")
PROFILES = tuple(f"{gpus}/maveriq/{run}" for gpus in ("h200", "h200x2", "h200x4") for run in RUNS)
"""Folders of one, two and four GPUs; of several runs the first that has measured a point counts."""
PROMPTS = 923


def steps(trial: Trial) -> Outcome:
    """One decode step of `rows` requests at context 512, or a prompt, of the entry `entry` in the benchmark `file`.

    `step_ms` in milliseconds, and its ratio to the entry `base`.
    """
    file = REFERENCE / _text(trial, "file")
    whole = _benchmark(file)
    mine, base = (_entry(file, whole, _text(trial, key)) for key in ("entry", "base"))
    rows = trial.parameters.get("rows", 1)
    values: dict[str, Scalar] = {"step_ms": _ms(mine, f"decode {rows}"), "base_ms": _ms(base, f"decode {rows}")}
    for size in (1, 32, 128):
        values[f"decode_{size}_ms"] = _ms(mine, f"decode {size}")
    values |= {f"prompt_{size}_ms": float(mine.get(f"prefill {size} ms", math.nan)) for size in (512, 2048)}
    values["faster"] = values["base_ms"] / values["step_ms"]  # type: ignore[operator]
    values["gb"] = float(mine.get("weight_bytes", math.nan)) / 1e9
    origin = whole.get("provenance", {})
    when = f"recorded by benchmarks/parallel.py on {str(origin.get('date', 'an unknown day'))[:10]}"
    return Outcome(values, notes=(f"{when}, commit {origin.get('commit', 'unknown')}; random weights",))


def request(trial: Trial) -> Outcome:
    """A whole request as the profiler measured it, seconds and GiB: a row of `table` (whole, uneven, scaling).

    The other parameters choose the row; with `what: line` it is the line through the rows of one layer and of two.
    """
    if trial.parameters.get("what") == "line":
        one, two = (
            request(replace(trial, parameters={**trial.parameters, "what": "row", "layers": n})).metrics for n in (1, 2)
        )
        further = float(str(trial.parameters["layers"])) - 1
        on_line = {name: float(str(one[name])) for name in one}
        on_line = {name: value + further * (float(str(two[name])) - value) for name, value in on_line.items()}
        return Outcome(on_line, notes=(_NOTE,))
    table, wanted = _text(trial, "table"), trial.parameters
    stages = str(wanted["pp_map"]).split() if "pp_map" in wanted else None
    rows = [
        row
        for folder in PROFILES
        for row in _profile(folder, f"{table}.csv")
        if all(row[column] == str(wanted[key]) for key, column in _KEYS.items() if key in wanted)
        and row["INT8_KV_Cache"] == str(bool(wanted.get("int8_kv", False)))
        and (stages is None or row["PP_Map"].split() == stages)
    ]
    _or_absent(table)
    if not rows:
        return Outcome({"latency_s": math.nan, "memory_gib": math.nan, "low_s": math.nan, "high_s": math.nan}, notes=(_NOTE,))
    row = rows[0]
    numbers = {"latency_s": "Latency", "memory_gib": "Memory-After-Run", "low_s": "Latency-Low", "high_s": "Latency-High"}
    return Outcome({name: float(row[column]) for name, column in numbers.items()}, notes=(_NOTE,))


def error(trial: Trial) -> Outcome:
    """Errors of `mode` against every whole model at `batch` (1, or above 1), all GPUs' tables together, in percent."""
    from systems.maveriq.profile import judge  # not at import: every series of every figure would wait for it

    prints, whole = (_together(f"{name}.csv") for name in ("fingerprints", "whole"))
    found, _ = judge.judge(prints, whole, PROMPTS)
    rows = judge.summary([one for one in found if one.mode == _text(trial, "mode")])
    mine = next((row for row in rows if row["model"] == "all" and row["batch"] == _text(trial, "batch")), None)
    names = (
        "configurations", "latency_median_percent", "latency_p90_percent", "latency_bias_percent", "memory_median_percent",
        "memory_p90_percent", "inside_percent",
    )  # fmt: skip
    given: dict[str, Scalar] = {
        name: math.nan if mine is None or mine[name] is None else float(str(mine[name])) for name in names
    }
    return Outcome(given, notes=(_NOTE,))


def tenant(trial: Trial) -> Outcome:
    """The model `tenant` as it came to the controller's node of `gpus` GPUs: load time, memory, service, and estimates.

    Seconds and GiB; errors in percent of what was measured. NaN where that node was not measured.
    """
    whole = _controller(trial)
    if whole is None:
        return Outcome(dict.fromkeys(_TENANT, math.nan), notes=(_CONTROLLER_NOTE,))
    name = _text(trial, "tenant")
    mine: Mapping[str, Any] = next((one for one in whole.get("load", {}).get("tenants", []) if one["name"] == name), {})
    served, held, guess = mine.get("service_s") or [], (mine.get("memory") or {}).get("gib"), mine.get("estimate") or {}
    values: dict[str, Scalar] = dict.fromkeys(_TENANT, math.nan)
    if "configuration" in mine:
        values |= {"tp": mine["configuration"]["tp"], "stages": len(mine["pp_map"]), "first_layers": mine["pp_map"][0]}
        values["weight_bits"] = {"float16": 16, "int8": 8, "int4": 4}[mine["configuration"]["dtype"]]
        values["load_s"] = mine["load_s"]
    if served:
        service_s = statistics.median(served)
        values |= {"service_s": service_s, "latency_error_percent": 100 * (guess["latency_s"] / service_s - 1)}
    if held:
        values |= {"gib": held, "memory_error_percent": 100 * (guess["memory_gib"] / held - 1)}
    return Outcome(values, notes=(_CONTROLLER_NOTE,))


def queue(trial: Trial) -> Outcome:
    """Latency with queueing under one of both queues on a node of `gpus` GPUs, seconds. NaN where that was not measured."""
    whole = _controller(trial) or {}
    mine = whole.get("queues", {}).get(_text(trial, "queue"), {})
    values: dict[str, Scalar] = {name: float(mine.get(name, math.nan)) for name in _QUEUE}
    rate_rps = float(whole.get("queues", {}).get("rate_rps", math.nan))
    values["rate_rps"] = rate_rps
    asked = () if math.isnan(rate_rps) else (f"GPUs: {trial.parameters['gpus']}, {rate_rps:.1f} requests/s",)
    return Outcome(values, notes=(_CONTROLLER_NOTE, *asked))


RECORDED_EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {
    "recorded_steps": steps,
    "recorded_request": request,
    "recorded_error": error,
    "recorded_tenant": tenant,
    "recorded_queue": queue,
}

_NOTE = f"recorded by benchmarks/maveriq_gpu.py: our engine computing in bf16, random weights, prompts of {PROMPTS} tokens"
_CONTROLLER_NOTE = (
    f"recorded by systems.maveriq.controller.trial: real engines, random weights (16 bit is bf16), prompts of {PROMPTS} tokens"
)
_TENANT = (
    "load_s", "gib", "memory_error_percent", "service_s", "latency_error_percent", "tp", "stages", "first_layers",
    "weight_bits",
)  # fmt: skip
_QUEUE = ("e2e_mean_s", "e2e_p50_s", "e2e_p95_s", "service_mean_s", "requests", "answered")
_KEYS = {
    "model": "Model", "tp": "TP", "pp": "PP", "dtype": "DTYPE", "batch": "Batch_Size", "output_length": "Output_Lenght",
    "layers": "Num_layers",
}  # fmt: skip


@lru_cache(maxsize=8)
def _benchmark(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            file, "benchmark", type(error).__name__, "not recorded yet: run benchmarks/parallel.py there"
        ) from error
    assert isinstance(found, dict)
    return found


def _controller(trial: Trial) -> Mapping[str, Any] | None:
    """What the trial on `gpus` GPUs wrote; None where only other nodes were measured. Raises InputError where none was."""
    files = {
        gpus: REFERENCE / folder / "benchmarks" / "maveriq_controller.json" for gpus, folder in ((1, "h200"), (2, "h200x2"))
    }
    if not any(file.is_file() for file in files.values()):
        raise InputError(files[1], "trial", "absent", "not recorded yet: run systems.maveriq.controller.trial on H200s")
    file = files.get(int(str(trial.parameters["gpus"])))
    return _benchmark(file) if file is not None and file.is_file() else None


def _entry(file: Path, whole: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(whole.get(name), dict):
        raise InputError(file, "entry", name, f"it has {', '.join(key for key in whole if isinstance(whole[key], dict))}")
    found: Mapping[str, Any] = whole[name]
    return found


def _ms(entry: Mapping[str, Any], name: str) -> float:
    return float(entry[name]["ms"]) if name in entry else math.nan


@lru_cache(maxsize=16)
def _profile(folder: str, name: str) -> list[dict[str, str]]:
    """The rows of a table; none where that run has not got it."""
    file = REFERENCE / folder / name
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _or_absent(table: str) -> None:
    if not any((REFERENCE / folder / f"{table}.csv").is_file() for folder in PROFILES):
        where = REFERENCE / PROFILES[0] / f"{table}.csv"
        raise InputError(
            where, "table", "absent", "not recorded yet: run benchmarks/maveriq_gpu.py on H200s and put its tables there"
        )


def _together(name: str) -> Fingerprints:
    _or_absent(name.removesuffix(".csv"))
    points: dict[Any, Point] = {}
    for folder in PROFILES:
        file = REFERENCE / folder / name
        if file.is_file():
            points = {**read_fingerprints(file).points, **points}
    return Fingerprints(name, points)


def _text(trial: Trial, key: str) -> str:
    value = trial.parameters.get(key)
    if not isinstance(value, str):
        raise InputError("maveriq", key, value, "give a word")
    return value
