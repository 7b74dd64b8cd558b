"""What the figures of H200 measurements show: one number each from tables that benchmarks wrote under `reference/`.

`python benchmarks/maveriq_record.py` reads them once into `reference/<gpu>/maveriq/<figure>/`, which `backend=recorded` draws.
Nothing stands in for a table that is not there.

* `reference/h200*/benchmarks/{quantised,parallel}.json`: decode steps and prompts (benchmarks/parallel.py).
* `reference/h200*/maveriq/profile/*.csv`: the profiler's tables (benchmarks/maveriq_gpu.py) on one, two and four GPUs.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from systems.common.core import Outcome, Scalar, Trial
from systems.common.errors import InputError
from systems.maveriq.fingerprint import Fingerprints, Point, read_fingerprints

REFERENCE = Path(__file__).resolve().parents[2] / "reference"
PROFILES = ("h200", "h200x2", "h200x4")
"""Folders of one, two and four GPUs."""
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
        for row in _profile(folder, f"{table}.csv", needed=False)
        if all(row[column] == str(wanted[key]) for key, column in _KEYS.items() if key in wanted)
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


RECORDED_EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {
    "recorded_steps": steps,
    "recorded_request": request,
    "recorded_error": error,
}

_NOTE = f"recorded by benchmarks/maveriq_gpu.py: our engine, bf16, random weights, prompts of {PROMPTS} tokens"
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


def _entry(file: Path, whole: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(whole.get(name), dict):
        raise InputError(file, "entry", name, f"it has {', '.join(key for key in whole if isinstance(whole[key], dict))}")
    found: Mapping[str, Any] = whole[name]
    return found


def _ms(entry: Mapping[str, Any], name: str) -> float:
    return float(entry[name]["ms"]) if name in entry else math.nan


@lru_cache(maxsize=16)
def _profile(folder: str, name: str, needed: bool = True) -> list[dict[str, str]]:
    file = REFERENCE / folder / "maveriq" / "profile" / name
    if not file.is_file() and not needed:
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _or_absent(table: str) -> None:
    if not any((REFERENCE / folder / "maveriq" / "profile" / f"{table}.csv").is_file() for folder in PROFILES):
        where = REFERENCE / "h200" / "maveriq" / "profile" / f"{table}.csv"
        raise InputError(
            where, "table", "absent", "not recorded yet: run benchmarks/maveriq_gpu.py on H200s and put its tables there"
        )


def _together(name: str) -> Fingerprints:
    _or_absent(name.removesuffix(".csv"))
    points: dict[Any, Point] = {}
    for folder in PROFILES:
        file = REFERENCE / folder / "maveriq" / "profile" / name
        if file.is_file():
            points = {**read_fingerprints(file).points, **points}
    return Fingerprints(name, points)


def _text(trial: Trial, key: str) -> str:
    value = trial.parameters.get(key)
    if not isinstance(value, str):
        raise InputError("maveriq", key, value, "give a word")
    return value
