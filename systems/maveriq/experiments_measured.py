"""What a trial of each figure about the authors' measurements alone means: nothing here is estimated."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping

from systems.common.core import Outcome, Scalar, Trial
from systems.maveriq.experiments_data import (
    NOTE,
    PRINTS,
    SCALING,
    UNEVEN,
    WHOLE,
    bad,
    fits,
    folder,
    read,
    text,
    whole_number,
)
from systems.maveriq.fingerprint import Layout, Point, Setting

GPU_HOUR_USD = 0.8
"""The authors' price of an A6000 (sheet, 4); requests pay for the share of its 48 GB that they take."""
GPU_GB, REQUESTS = 48, 19_366
"""The authors count GB of a GPU's 48, and the requests of the conversation trace (sheet, T-intro)."""


def parallelism(trial: Trial) -> Outcome:
    """One layout of `model` at fp16: `metric` (latency, memory, memory_per_gpu, cost, gpu_s) over that of the worst layout."""
    rows = _dense(trial, text(trial, "model"), whole_number(trial, "output_length", 100))
    values = {layout: _worth(text(trial, "metric"), point, layout) for layout, point in rows.items()}
    at = whole_number(trial, "tp"), whole_number(trial, "pp")
    mine, best, worst = values.get(at, math.nan), min(values.values()), max(values.values())
    return Outcome({"share": mine / worst, "value": mine, "best": int(mine == best)}, notes=(NOTE,))


def _worth(metric: str, point: Point, layout: tuple[int, int]) -> float:
    gpus = layout[0] * layout[1]
    worths = {
        "latency": point.latency_s,
        "memory": point.memory_gib,
        "memory_per_gpu": point.memory_gib / gpus,
        "cost": point.latency_s * point.memory_gib,
        "gpu_s": point.latency_s * gpus,
    }
    if metric not in worths:
        raise bad("metric", metric, f"use one of {', '.join(worths)}")
    return worths[metric]


def uneven(trial: Trial) -> Outcome:
    """Latency of `model` at `batch` with layer map number `map` (0: the balanced one), and how far it is from map 0."""
    with (folder(trial) / UNEVEN).open(newline="", encoding="utf-8") as stream:
        rows = [
            row
            for row in csv.DictReader(stream)
            if row["Model"] == text(trial, "model") and int(row["Batch_Size"]) == whole_number(trial, "batch")
        ]
    place = whole_number(trial, "map", least=0)
    if place >= len(rows):
        return Outcome({"latency_s": math.nan, "deviation_percent": math.nan, "pp_map": ""}, notes=(NOTE,))
    latencies = [float(row["Latency"]) for row in rows]
    deviation = 100 * abs(latencies[place] / latencies[0] - 1)
    found: dict[str, Scalar] = {"latency_s": latencies[place], "deviation_percent": deviation, "pp_map": rows[place]["PP_Map"]}
    return Outcome(found, notes=(NOTE,))


def quantisation(trial: Trial) -> Outcome:
    """Latency of `model` at `dtype` on the smallest layout that holds it at fp16; how many times faster than fp16."""
    whole = read(trial, WHOLE)
    model, length = text(trial, "model"), whole_number(trial, "output_length", 100)
    base = _dense(trial, model, length)
    layout = _smallest(base)
    mine = {s.layout: p for s, p in whole.points.items() if fits(s, model, (text(trial, "dtype"), False), length)}
    latency_s = mine[layout].latency_s if layout in mine else math.nan
    return Outcome(
        {"latency_s": latency_s, "speedup": base[layout].latency_s / latency_s, "layout": str(layout)}, notes=(NOTE,)
    )


def scaling(trial: Trial) -> Outcome:
    """Llama-2-7B with `layers` layers on one GPU, 100 tokens: `what` is measured, or the line through one and two layers."""
    measured = read(trial, SCALING)
    rows = {s.layers: p for s, p in measured.points.items() if s.layout == (1, 1)}
    layers = whole_number(trial, "layers")
    if layers not in rows:
        raise bad("layers", layers, f"measured are {', '.join(map(str, sorted(rows)))}")
    if text(trial, "what") == "measured":
        point = rows[layers]
        return Outcome({"latency_s": point.latency_s, "memory_gib": point.memory_gib}, notes=(NOTE,))
    one, two = rows[1], rows[2]
    line = [
        getattr(one, name) + (layers - 1) * (getattr(two, name) - getattr(one, name)) for name in ("latency_s", "memory_gib")
    ]
    return Outcome({"latency_s": line[0], "memory_gib": line[1]}, notes=(NOTE,))


def spread(trial: Trial) -> Outcome:
    """How far the configurations of `model` are apart: least and most at `output_length` tokens, whole models, batch 1.

    `usd` is what the conversation trace would cost, latency x share of a GPU's memory; `profiling_h` the time of measuring all
    (`Time-Prof`); `*_range_percent` the distance from the least to the most, over the most.
    """
    whole = read(trial, WHOLE)
    model, length = text(trial, "model"), whole_number(trial, "output_length", 100)
    rows = {s: p for s, p in whole.points.items() if (s.model, s.output_length, s.batch) == (model, length, 1)}
    if not rows:
        raise bad("model", model, f"measured are {', '.join(whole.models)}")
    worths = {
        "latency_s": [p.latency_s for p in rows.values()],
        "memory_gib": [p.memory_gib for p in rows.values()],
        "gpu_s": [p.latency_s * s.tp * s.pp for s, p in rows.items()],
        "usd": [REQUESTS * GPU_HOUR_USD / 3600 * p.latency_s * p.memory_gib / GPU_GB for p in rows.values()],
    }
    found: dict[str, Scalar] = {"configurations": len(rows)}
    for name, values in worths.items():
        found |= {f"{name}_least": min(values), f"{name}_most": max(values)}
    for name in ("latency_s", "memory_gib"):
        found[f"{name.partition('_')[0]}_range_percent"] = 100 * (1 - min(worths[name]) / max(worths[name]))
    found["profiling_h"] = sum(p.profiling_s for p in rows.values()) / 3600
    return Outcome(found, notes=(NOTE,))


def fingerprint_size(trial: Trial) -> Outcome:
    """A fingerprint of one layer on one GPU beside all of `model` on the smallest layout that holds it: fp16, 10 tokens."""
    model = text(trial, "model")
    one = Setting(model, 1, 1, "float16", False, 1, 10, 1)
    small = read(trial, PRINTS).points[one]
    rows = _dense(trial, model, 10)
    whole = rows[_smallest(rows)]
    found: dict[str, Scalar] = {
        "memory_times": whole.memory_gib / small.memory_gib,
        "latency_times": whole.latency_s / small.latency_s,
        "size_percent": 100 * small.memory_gib / whole.memory_gib,
        "memory_gib": small.memory_gib,
        "latency_s": small.latency_s,
        "layout": str(_smallest(rows)),
    }
    return Outcome(found, notes=(NOTE,))


def _dense(trial: Trial, model: str, length: int) -> dict[Layout, Point]:
    """Whole models at fp16, by layout. Raises InputError where there are none."""
    whole = read(trial, WHOLE)
    found = {s.layout: p for s, p in whole.points.items() if fits(s, model, ("float16", False), length)}
    if not found:
        raise bad("model", model, f"measured are {', '.join(whole.models)}, at 10, 20, 50, 100 and 200 tokens")
    return found


def _smallest(rows: Mapping[Layout, Point]) -> Layout:
    return min(rows, key=lambda at: (at[0] * at[1], at[0]))


MEASURED_EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {
    "parallelism": parallelism,
    "uneven_pipelines": uneven,
    "quantisation": quantisation,
    "fingerprint_scaling": scaling,
    "configuration_spread": spread,
    "fingerprint_size": fingerprint_size,
}
