"""Fake experiments with a known knee, a little noise, and a log of what was run."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from systems.common.core import Outcome, Trial
from systems.common.errors import InputError


def knee(trial: Trial) -> Outcome:
    """The objective grows with the knob; the latency limit of 1 s breaks where knob * rate reaches `knee`.

    With n GPUs (`nothingx<n>`) an unloaded latency is n times shorter, and a loaded one n * n times.
    """
    _log(trial)
    known = {"knee", "rate_rps", "knob"}
    unknown = sorted(set(trial.parameters) - known)
    if unknown:
        raise InputError("fake", unknown[0], trial.parameters[unknown[0]], f"use one of {', '.join(sorted(known))}")
    rate, knob, limit = (float(trial.parameters[name]) for name in ("rate_rps", "knob", "knee"))
    noise = random.Random(f"{trial.seed} {rate} {knob}").uniform(0.98, 1.02)
    gpus = int(trial.hardware.rpartition("x")[2])
    latency_s = knob * rate / limit * noise / gpus**2
    return Outcome(
        metrics={
            "work_per_s": knob * 2.0,
            "latency_p99_s": latency_s,
            "floor_s": 0.2 / gpus,
            "unbounded": float("inf"),
            "how": "fake",
        },
        requests={"arrival_s": [0.0, 1.0], "latency_s": [latency_s, latency_s]},
        notes=("no hardware at all",),
    )


def _log(trial: Trial) -> None:
    """Append what is run to the file `FAKE_LOG`, take `FAKE_SLEEP_S` seconds, and wait while there is a file `FAKE_HOLD`."""
    if "FAKE_LOG" in os.environ:
        line = json.dumps({"parameters": dict(trial.parameters), "seed": trial.seed}, sort_keys=True)
        with Path(os.environ["FAKE_LOG"]).open("a", encoding="utf-8") as log:
            log.write(line + "\n")
    time.sleep(float(os.environ.get("FAKE_SLEEP_S", "0")))
    hold = os.environ.get("FAKE_HOLD")
    while hold and Path(hold).exists():
        time.sleep(0.05)


EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {"knee": knee}
