"""Serve requests of your own with the real engine, in real time: what `simulate` predicts, measured.

    python -m systems.common.measure --requests FILE.csv [FILE.csv ...] --model llama-3.1-8b --out DIR

FILE.csv has the columns `arrival_s,input_tokens,output_tokens`; prompts are random tokens, output lengths are forced. DIR gets
a folder per file with the same `requests.csv` and `summary.json` that `simulate` writes. With `--log-steps` there is also a
`steps.csv`: when each step ended, how long the host waited for it, and how many sequences decoded (0 with prompts). Random
weights: times do not depend on what the weights hold. A run takes as long as its last arrival and what is then unfinished.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from systems.common.core import Request
from systems.common.engine.config import POLICIES, EngineConfig
from systems.common.engine.results import to_records
from systems.common.errors import InputError
from systems.common.metrics import summarise
from systems.common.models import ModelShape, model
from systems.common.serving_files import check, plain, shown, table, write
from systems.common.workloads.build import Workload, from_csv

if TYPE_CHECKING:
    from systems.common.torch_engine.drivers import Live


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m systems.common.measure", description="Serve your requests for real.")
    made.add_argument(
        "--requests", type=Path, nargs="+", required=True, help="CSVs with arrival_s, input_tokens, output_tokens"
    )
    made.add_argument("--model", required=True, help="a model shape, such as llama-3.1-8b")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--policy", choices=POLICIES, default="chunked-prefill", help="batching policy (default: %(default)s)")
    made.add_argument("--max-num-batched-tokens", type=int, default=2048, help="token budget of an iteration (%(default)s)")
    made.add_argument("--max-num-seqs", type=int, default=256, help="most sequences at once (%(default)s)")
    made.add_argument("--max-model-len", type=int, default=8192, help="most tokens of one request (%(default)s)")
    made.add_argument("--num-gpu-blocks", type=int, help="KV blocks of 16 tokens (default: what the GPU has room for)")
    made.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="for that (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of weights and prompts (%(default)s)")
    made.add_argument("--log-steps", action="store_true", help="write when each step ended, too")
    made.add_argument("--out", type=Path, required=True, help="folder for a folder per file")
    return made


def build(shape: ModelShape, options: argparse.Namespace) -> Live:
    """The engine, warm.

    Raises InputError where PyTorch or the GPU is missing, or memory too small.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise InputError("measure", "torch", "not installed", "`make torch` installs it") from error
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("measure", "--device", "cuda", "PyTorch sees no GPU here: use --device cpu with a small model")
    from systems.common.torch_engine.drivers import Live
    from systems.common.torch_engine.executor import fitting_blocks
    from systems.common.torch_engine.weights import random_weights

    weights = random_weights(shape, options.seed, options.device)
    blocks = options.num_gpu_blocks
    if blocks is None:
        if options.device == "cpu":
            raise InputError("measure", "--num-gpu-blocks", None, "say how many KV blocks to take on a CPU")
        blocks = fitting_blocks(shape, options.gpu_memory_utilization, options.max_num_batched_tokens)
    config = EngineConfig(
        num_gpu_blocks=blocks,
        policy=options.policy,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
    )
    live = Live.build(shape, weights, config, max_tokens=options.max_model_len)
    live.executor.warm()
    live.generate(_warming(options))
    return live


def _warming(options: argparse.Namespace) -> list[Request]:
    """Requests that have every kernel compiled before the clock counts."""
    longest = min(options.max_num_batched_tokens, options.max_model_len) - 8
    lengths = [*range(16, min(longest, 400), 24), longest]
    return [Request(i, 0.0, length, 4) for i, length in enumerate(lengths) if length > 0]


def measure(live: Live, workload: Workload, out: Path, log_steps: bool = False) -> dict[str, object]:
    """Serve one workload; the summary that was written to `out`."""
    engine, executor = live.engine, live.executor
    steps, first = engine.steps, len(executor.flights.ended_s)
    began, clock_s = time.perf_counter(), executor.clock()
    sequences = live.serve(workload.requests)
    took_s = time.perf_counter() - began
    records = to_records(sequences, engine)
    summary: dict[str, object] = {
        **summarise(records),
        "engine_steps": engine.steps - steps,
        "gpu_steps": len(executor.flights.ended_s) - first,
        "num_gpu_blocks": engine.config.num_gpu_blocks,
        **executor.choices,
        "policy": engine.config.policy,
        "max_num_batched_tokens": engine.config.max_num_batched_tokens,
        "max_num_seqs": engine.config.max_num_seqs,
        "measured_s": took_s,
    }
    if log_steps:
        flights = executor.flights
        log = zip(flights.ended_s[first:], flights.waited_s[first:], flights.decode_rows[first:], strict=True)
        lines = (f"{ended_s - clock_s:.6f},{waited_s:.6f},{rows}\n" for ended_s, waited_s, rows in log)
        write(out / "steps.csv", "ended_s,waited_s,decode_rows\n" + "".join(lines))
    write(out / "requests.csv", table(records))
    write(out / "summary.json", json.dumps(plain(summary), indent=2, sort_keys=True) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line."""
    options = parser().parse_args(arguments)
    try:
        shape = model(options.model, "--model")
        workloads = {file: from_csv(file) for file in options.requests}
        live = build(shape, options)
        for file, workload in workloads.items():
            check(workload, live.engine.config, file)
        for file, workload in workloads.items():
            summary = measure(live, workload, options.out / file.stem, options.log_steps)
            print(f"{file.stem}: {summary['finished']} requests, {summary['engine_steps']} iterations", flush=True)
            print(shown(summary), flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
