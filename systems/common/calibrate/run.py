# mypy: disable-error-code="no-untyped-call"
"""One calibration from start to end."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from systems.common.calibrate import grid as grids
from systems.common.calibrate.adapters import adapters_s
from systems.common.calibrate.attention import attention_s
from systems.common.calibrate.bench import Bench
from systems.common.calibrate.clock import Clock
from systems.common.calibrate.dense import embedding_s, head_s, layer_s
from systems.common.calibrate.links import copies_s
from systems.common.calibrate.steps import Step, decode_steps, mixed_steps, served_period_s
from systems.common.calibrate.write import Folder
from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.flights import LAUNCH_AHEAD_S
from systems.common.torch_engine.graphs import MIXED_CHUNKS, MIXED_TOKENS, PROMPT_TOKENS
from systems.common.torch_engine.lora import ATTENTION_SITES

Point = TypeVar("Point")
SERVED_ROWS = (1, 8, 32, 128)
STEP_COLUMNS = ("rows", "context", "chunk", "past", "time_us")


def calibrate(shape: ModelShape, gpu: str, device: str, runs: int, commit: str, quick: bool = False) -> Folder:
    """Measure everything; the files to write.

    Raises InputError where there is no such device or not enough memory.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("calibrate", "--device", device, "PyTorch sees no GPU here: run it on the machine that has one")
    began, small = time.perf_counter(), device == "cpu"
    torch.manual_seed(0)
    bench = Bench.build(shape, torch.device(device), max_num_seqs=16 if small else 512, blocks=64 if small else None)
    clock = Clock(bench.device, runs)
    grid = (grids.small if small else grids.quick if quick else grids.full)(bench.cached_tokens)
    folder = Folder()
    _operators(bench, clock, grid, folder)
    _steps(bench, clock, grid, small, folder)
    if not quick:
        _extras(bench, clock, small, folder)
    if not small:
        torch.cuda.synchronize()
    spent_s = time.perf_counter() - began
    folder.mapping("meta.yaml", _meta(shape, "cpu" if small else gpu, bench, runs, commit, spent_s))
    return folder


def _operators(bench: Bench, clock: Clock, grid: grids.Grid, folder: Folder) -> None:
    layer = layer_s(bench, clock, _shown("layer", grid.tokens))
    folder.table("layer.csv", ("tokens", "time_us"), _us(layer))
    folder.table("embedding.csv", ("tokens", "time_us"), _us(embedding_s(bench, clock, _shown("embedding", grid.tokens))))
    folder.table("head.csv", ("sequences", "time_us"), _us(head_s(bench, clock, _shown("head", grid.sequences))))
    attention = attention_s(bench, clock, _shown("attention", list(grid.attention())))
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    folder.table("attention.csv", columns, [(*point, took_s * 1e6) for point, took_s in attention.items()])


def _steps(bench: Bench, clock: Clock, grid: grids.Grid, small: bool, folder: Folder) -> None:
    """Whole steps, with graphs; what the host adds follows from the same steps as served."""
    steps = bench.live.executor.steps
    bench.live.executor.warm()
    sizes = (1, 3) if small else tuple(steps.sizes)
    found = decode_steps(bench, clock, _shown("decode steps", sizes), (grid.step_context,))
    batches = [(rows, grid.step_context, chunk, 0) for rows in grid.step_rows for chunk in grid.step_chunks]
    fitting = [b for b in batches if b[0] * (b[1] + 8) + b[2] <= bench.cached_tokens]
    found += mixed_steps(bench, clock, _shown("steps with prompts", fitting))
    folder.table("steps.csv", STEP_COLUMNS, _rows(found))
    checked = decode_steps(bench, clock, grid.check_rows, grid.check_contexts)
    checked += mixed_steps(bench, clock, grid.check_batches)
    folder.table("check.csv", STEP_COLUMNS, _rows(checked))
    folder.mapping("engine.yaml", _engine(bench, clock, (2,) if small else SERVED_ROWS, 16 if small else 512))


def _rows(steps: list[Step]) -> list[tuple[object, ...]]:
    return [(s.rows, s.context, s.chunk, s.past, s.took_s * 1e6) for s in steps]


def _engine(bench: Bench, clock: Clock, rows: Sequence[int], context: int) -> dict[str, Any]:
    """The engine's resolved facts (see `hardware.calibrated`)."""
    served = {}
    for count in rows:
        length = 8 if context < 100 else 48
        served_period_s(bench, count, context, length)  # once to warm
        alone: Step = decode_steps(bench, clock, (count,), (context,))[0]
        served[count] = max(0.0, served_period_s(bench, count, context, length) - alone.took_s)
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
        "host_us": round(sum(served.values()) / len(served) * 1e6, 3),
        "launch_ahead_us": LAUNCH_AHEAD_S * 1e6,
        "host_us_by_rows": {count: round(extra * 1e6, 3) for count, extra in served.items()},
    }


def _extras(bench: Bench, clock: Clock, small: bool, folder: Folder) -> None:
    """Tables that single systems read."""
    ranks = (8,) if small else (8, 16, 64)
    distinct, rows, prompts = ((1, 2), (4,), (8,)) if small else ((1, 4, 16, 32), (1, 8, 32, 128), (128, 512, 2048))
    points = [
        point
        for rank in _shown("adapters", ranks)
        for point in adapters_s(bench, clock, rank, distinct, rows, prompts, ATTENTION_SITES)
    ]
    columns = ("kind", "tokens", "adapters", "rank", "time_us")
    folder.table("adapters.csv", columns, [(p.kind, p.tokens, p.adapters, p.rank, p.took_s * 1e6) for p in points])
    sizes = (2**16,) if small else tuple(2**k for k in range(12, 31, 3))
    copies = copies_s(clock, sizes)
    folder.table(
        "copies.csv",
        ("direction", "pinned", "size_bytes", "time_us"),
        [(c.direction, "yes" if c.pinned else "no", c.size_bytes, c.took_s * 1e6) for c in copies],
    )


def _us(times: dict[int, float]) -> list[tuple[int, float]]:
    return [(size, took_s * 1e6) for size, took_s in times.items()]


def _shown(what: str, points: Iterable[Point]) -> Iterable[Point]:
    """The points, with a progress bar where somebody watches."""
    return tqdm(list(points), desc=what, unit="point", disable=None, leave=False)


def _meta(shape: ModelShape, gpu: str, bench: Bench, runs: int, commit: str, spent_s: float) -> dict[str, Any]:
    return {
        "gpu": gpu,
        "model": shape.name,
        "dtype": shape.dtype,
        "tp": 1,
        "seed": 0,
        "runs": runs,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": ["python", "-m", "systems.common.calibrate", *sys.argv[1:]],
        "gpu_seconds": round(spent_s, 1),
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
