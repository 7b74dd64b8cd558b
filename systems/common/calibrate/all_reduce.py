# mypy: disable-error-code="no-untyped-call"
"""Measure all-reduces among GPUs of this machine, by size.

    python -m systems.common.calibrate.all_reduce --gpus 2 --out reference/h200/calibrated/all_reduce.csv

Twenty seconds. As the engine launches them: NCCL inside a CUDA graph, half precision, NVLink multicast off; the median of
replays. The CSV has the columns that `hardware.tables.read_all_reduce` reads (milliseconds). `--device cpu` does it with gloo.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.common.serving_files import write

ROOT = Path(__file__).resolve().parents[3]
COLUMNS = ("num_workers", "devices_per_node", "size", "time_stats.all_reduce.median")
SIZES = tuple(8192 * 2**k for k in range(14))
"""From one token of 4,096 bf16 numbers to 8,192 of them."""
IN_GRAPH, RUNS = 20, 15
START_S, REST_S = 90.0, 60.0


# ---- one rank


def rank(number: int, gpus: int, store: str, device: str) -> None:
    """Measure as rank `number`; rank 0 says what it found as one line of JSON. Ends when its owner does."""
    threading.Thread(target=_end_with_owner, daemon=True).start()
    from systems.common.torch_engine.parallel.spec import ENVIRONMENT, ONE_HOST

    for name, value in {**ENVIRONMENT, **ONE_HOST}.items():
        os.environ.setdefault(name, value)
    import torch
    import torch.distributed as dist

    gpu = device == "cuda"
    if gpu:
        torch.cuda.set_device(number)
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=number, world_size=gpus, timeout=timedelta(seconds=60))
    found = {}
    for size in SIZES if gpu else SIZES[:3]:
        x = torch.ones(size // 2, dtype=torch.bfloat16 if gpu else torch.float16, device=device)
        found[size] = _graphed_s(x) if gpu else _called_s(x)
    if number == 0:
        told = {"seconds": found, "torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu"}
        print(json.dumps(told), flush=True)
    os._exit(0)  # NCCL need not be waited for


def _end_with_owner() -> None:
    sys.stdin.read()
    os._exit(3)


def _graphed_s(x: Any) -> float:  # noqa: ANN401 - a tensor
    import torch
    import torch.distributed as dist

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            dist.all_reduce(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(IN_GRAPH):
            dist.all_reduce(x)
    spans = []
    for _ in range(RUNS + 2):
        span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        span[0].record()
        graph.replay()
        span[1].record()
        spans.append(span)
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in spans[2:])) * 1e-3 / IN_GRAPH


def _called_s(x: Any) -> float:  # noqa: ANN401 - a tensor
    import torch.distributed as dist

    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---- all of them


def measure(gpus: int, device: str) -> dict[str, Any]:
    """What rank 0 said. Raises InputError when a rank dies or is silent for too long; none is left then."""
    with ExitStack() as owned:
        store = f"{owned.enter_context(tempfile.TemporaryDirectory(prefix='all-reduce-'))}/store"
        ranks = []
        for number in range(gpus):
            command = [sys.executable, "-m", "systems.common.calibrate.all_reduce", "--rank", str(number), "--store", store]
            process = subprocess.Popen(
                [*command, "--gpus", str(gpus), "--device", device, "--out", "-"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True, text=True,
            )  # fmt: skip
            owned.callback(_end, process)
            ranks.append(process)
        lines: queue.Queue[str] = queue.Queue()
        out = ranks[0].stdout
        assert out is not None
        threading.Thread(target=lambda: lines.put(out.readline()), daemon=True).start()
        until_s = time.monotonic() + START_S + REST_S
        while time.monotonic() < until_s:
            with suppress(queue.Empty):
                line = lines.get(timeout=0.5)
                if not line:
                    raise InputError("all_reduce", "rank 0", ranks[0].wait(), "it died: its messages are above")
                return dict(json.loads(line))
            for number, process in enumerate(ranks[1:], start=1):
                if process.poll() not in (None, 0):
                    raise InputError("all_reduce", f"rank {number}", process.returncode, "it died: its messages are above")
        raise InputError("all_reduce", "seconds", START_S + REST_S, "no rank answered: see the messages above")


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def table(gpus: int, seconds: dict[str, float]) -> str:
    """The CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((gpus, gpus, int(size), f"{1e3 * took_s:.6f}") for size, took_s in seconds.items())
    return out.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line."""
    made = argparse.ArgumentParser(prog="python -m systems.common.calibrate.all_reduce", description="All-reduce by size.")
    made.add_argument("--gpus", type=int, default=2, help="how many, of this machine (default: %(default)s)")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: gloo and few sizes, for tests")
    made.add_argument("--out", type=Path, required=True, help="CSV to write")
    made.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    made.add_argument("--store", help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.rank is not None:
        rank(options.rank, options.gpus, options.store, options.device)
    try:
        if options.gpus < 2:
            raise InputError("all_reduce", "--gpus", options.gpus, "give at least 2")
        if options.device == "cuda":
            _check(options.gpus)
        told = measure(options.gpus, options.device)
        write(options.out, table(options.gpus, told["seconds"]))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: {options.gpus} x {told['device']}, torch {told['torch']}")
    return 0


def _check(gpus: int) -> None:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise InputError("all_reduce", "torch", "not installed", "`make torch` installs it") from error
    if (found := torch.cuda.device_count()) < gpus:
        raise InputError("all_reduce", "--gpus", gpus, f"PyTorch sees {found} GPUs here")


if __name__ == "__main__":
    sys.exit(main())
