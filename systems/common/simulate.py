"""Simulate an LLM engine on requests of your own.

    python -m systems.common.simulate --requests FILE.csv --model llama-3.1-8b --hardware rtx4090 \
        --max-num-batched-tokens 2048 --max-num-seqs 256 --num-gpu-blocks 1000 --out DIR

FILE.csv has the columns `arrival_s,input_tokens,output_tokens`. DIR gets `requests.csv` (per request: queued,
scheduled, first token, finish, and the latencies that follow) and `summary.json`. With `--operators DIR` the operator
times come from tables measured on some GPU (docs/hardware.md); otherwise from the datasheet's roofline.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from systems.common.engine.config import POLICIES, EngineConfig
from systems.common.engine.engine import Engine, serve
from systems.common.engine.memory import kv_blocks
from systems.common.engine.results import to_records
from systems.common.engine.simulated import IterationCost, SimulatedExecutor
from systems.common.errors import InputError
from systems.common.hardware import costs, parse_testbed
from systems.common.metrics import Records, summarise
from systems.common.models import model
from systems.common.workloads.build import Workload, from_csv

WATERMARK = {"prefill-first": 0.01, "chunked-prefill": 0.0}
COLUMNS = (
    "index", "input_tokens", "output_tokens", "queued_s", "scheduled_s", "first_token_s", "finish_s",
    "ttft_s", "tpot_s", "e2e_s", "preemptions", "status",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m systems.common.simulate", description="Simulate an LLM engine on your requests."
    )
    made.add_argument("--requests", type=Path, required=True, help="CSV with arrival_s, input_tokens, output_tokens")
    made.add_argument("--model", required=True, help="a model shape, such as llama-3.1-8b")
    made.add_argument("--hardware", required=True, help="GPUs, such as rtx4090 or a100-80x2")
    made.add_argument("--tp", type=int, help="tensor-parallel degree (default: all GPUs of --hardware)")
    made.add_argument("--operators", type=Path, help="folder of operator tables measured on this GPU")
    made.add_argument("--policy", choices=POLICIES, default="chunked-prefill", help="batching policy (default: %(default)s)")
    made.add_argument("--max-num-batched-tokens", type=int, default=2048, help="token budget of an iteration (%(default)s)")
    made.add_argument("--max-num-seqs", type=int, default=256, help="most sequences at once (%(default)s)")
    made.add_argument("--block-size", type=int, default=16, help="tokens per KV block (%(default)s)")
    made.add_argument("--num-gpu-blocks", type=int, help="KV blocks, as the real engine printed them (default: estimated)")
    made.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="for that estimate (%(default)s)")
    made.add_argument("--watermark", type=float, help="share of blocks that admission leaves free (0.01 for prefill-first)")
    made.add_argument(
        "--admit-partial-prompts", action="store_true", help="admit a prompt when its first chunk fits (vLLM < 0.19)"
    )
    made.add_argument("--overhead-us", type=float, default=0.0, help="host time per iteration, microseconds (%(default)s)")
    made.add_argument("--out", type=Path, required=True, help="folder for requests.csv and summary.json")
    return made


def _engine(options: argparse.Namespace) -> Engine:
    testbed = parse_testbed(options.hardware, "--hardware")
    shape = model(options.model, "--model")
    tp = testbed.count if options.tp is None else options.tp
    priced = costs(shape, testbed, tp, operators=options.operators)
    if not options.overhead_us >= 0:
        raise InputError("simulate", "--overhead-us", options.overhead_us, "give 0 or more microseconds")
    blocks = options.num_gpu_blocks
    if blocks is None:
        blocks = kv_blocks(shape, testbed, tp, options.gpu_memory_utilization, options.block_size)
    config = EngineConfig(
        num_gpu_blocks=blocks,
        policy=options.policy,
        block_tokens=options.block_size,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        watermark=WATERMARK[options.policy] if options.watermark is None else options.watermark,
        reserve_prompt=not options.admit_partial_prompts,
    )
    return Engine(config, SimulatedExecutor(IterationCost(priced, shape, options.overhead_us * 1e-6)))


def _check(workload: Workload, config: EngineConfig, file: Path) -> None:
    """Refuse the file before anything runs when one of its requests could never finish."""
    for row, request in enumerate(workload.requests, start=2):
        try:
            config.check(request.input_tokens, request.output_tokens)
        except InputError as error:
            raise InputError(f"{file} line {row}", error.key, error.value, error.mend) from error


def _table(records: Records) -> str:
    columns = (
        range(len(records)), records.input_tokens.tolist(), records.output_tokens.tolist(), records.arrival_s.tolist(),
        records.scheduled_s.tolist(), records.first_token_s.tolist(), records.finish_s.tolist(), records.ttft_s.tolist(),
        records.tpot_s.tolist(), records.e2e_s.tolist(), records.preemptions.tolist(), records.columns()["status"],
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    """Under a temporary name first, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            path, "--out", str(path.parent), f"cannot be written ({error.strerror}): free space or choose another folder"
        ) from error


def _shown(summary: Mapping[str, object]) -> str:
    rows = [f"{'':12}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}"]
    for name in ("ttft", "tpot", "itl", "e2e", "queue"):
        values = [summary.get(f"{name}_{of}_s", math.nan) for of in ("mean", "p50", "p90", "p99")]
        rows.append(f"{name + ' (s)':12}" + "".join(f"{value:10.4f}" for value in values))
    return "\n".join(rows)


def simulate(options: argparse.Namespace) -> dict[str, object]:
    """Run the command; the summary that it wrote."""
    workload = from_csv(options.requests)
    engine = _engine(options)
    _check(workload, engine.config, options.requests)
    began = time.perf_counter()
    sequences = serve(engine, workload.requests)
    took_s = time.perf_counter() - began
    records = to_records(sequences, engine)
    executor = engine.executor
    assert isinstance(executor, SimulatedExecutor)
    summary: dict[str, object] = {
        **summarise(records),
        "engine_steps": engine.steps,
        "num_gpu_blocks": engine.config.num_gpu_blocks,
        "hardware_model": executor.cost.costs.source,
        "simulation_s": took_s,
    }
    _write(options.out / "requests.csv", _table(records))
    _write(options.out / "summary.json", json.dumps(_plain(summary), indent=2, sort_keys=True) + "\n")
    return summary


def _plain(summary: Mapping[str, object]) -> dict[str, object]:
    """NaN is not JSON: a number that no request defines becomes null."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in summary.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line."""
    options = parser().parse_args(arguments)
    try:
        summary = simulate(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{summary['finished']} requests, {summary['engine_steps']} iterations, {summary['hardware_model']}")
    print(_shown(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
