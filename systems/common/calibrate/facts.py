# mypy: disable-error-code="no-untyped-call"
"""What a calibration notes of the engine and of itself: `engine.yaml`, `meta.yaml`."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from systems.common.calibrate.bench import Bench
from systems.common.calibrate.budget import Budget
from systems.common.calibrate.clock import Clock
from systems.common.calibrate.steps import host_s
from systems.common.models import ModelShape
from systems.common.torch_engine.flights import LAUNCH_AHEAD_S
from systems.common.torch_engine.graphs import MIXED_CHUNKS, MIXED_TOKENS, PROMPT_TOKENS


def engine_facts(bench: Bench, clock: Clock, rows: Sequence[int], context: int) -> dict[str, Any]:
    """The engine's resolved facts (see `hardware.calibrated`)."""
    served = host_s(bench, Clock(bench.device, max(clock.runs, 20)), rows, context)
    config, steps = bench.config, bench.live.executor.steps
    graphed = bench.device.type == "cuda"
    graphs = {
        "decode": list(steps.sizes),
        "rows": list(steps.mixed_rows),
        "tokens": list(MIXED_TOKENS),
        "prompt_tokens": PROMPT_TOKENS,
        "chunks": MIXED_CHUNKS,
    }
    return {
        "num_gpu_blocks": config.num_gpu_blocks,
        "block_tokens": config.block_tokens,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_num_seqs": config.max_num_seqs,
        "attention": bench.live.executor.model.attention.name,
        "graphs": graphs if graphed else {},
        # the median: what the host adds is the same for every batch, and a batch's own difference is mostly noise
        "host_us": round(statistics.median(served.values()) * 1e6, 3),
        "launch_ahead_us": LAUNCH_AHEAD_S * 1e6,
        "host_us_by_rows": {count: round(extra * 1e6, 3) for count, extra in served.items()},
    }


def meta_facts(shape: ModelShape, gpu: str, bench: Bench, runs: tuple[int, int], commit: str, budget: Budget) -> dict[str, Any]:
    """Where the tables come from; `runs` of most points, and of steps with prompts."""
    return {
        "gpu": gpu,
        "model": shape.name,
        "dtype": shape.dtype,
        "tp": 1,
        "seed": 0,
        "runs": runs[0],
        "runs_of_steps_with_prompts": runs[1],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": ["python", "-m", "systems.common.calibrate", *sys.argv[1:]],
        "gpu_seconds": round(budget.spent_s, 1),
        "left_out": dict(budget.left_out),
        "machine": _machine(bench.device),
    }


def _machine(device: torch.device) -> dict[str, str]:
    told = {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    if device.type != "cuda":
        return told | {"device": "cpu, for tests of the procedure only"}
    keys = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "-i", "0"]
    read = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout
    return told | dict(zip(keys, (cell.strip() for cell in read.split(",")), strict=False))
