"""Simulate an LLM engine on requests of your own.

    python -m systems.common.simulate --requests FILE.csv --model llama-3.1-8b --hardware rtx4090 \
        --max-num-batched-tokens 2048 --max-num-seqs 256 --num-gpu-blocks 1000 --out DIR

FILE.csv has the columns `arrival_s,input_tokens,output_tokens`. DIR gets `requests.csv` (per request: queued,
scheduled, first token, finish, and the latencies that follow) and `summary.json`. With `--operators DIR` the operator
times come from tables measured on some GPU (docs/hardware.md); otherwise from the datasheet's roofline.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from systems.common.engine.config import POLICIES, EngineConfig
from systems.common.engine.engine import Engine, serve
from systems.common.engine.memory import kv_blocks
from systems.common.engine.results import to_records
from systems.common.engine.simulated import IterationCost, SimulatedExecutor
from systems.common.errors import InputError
from systems.common.hardware import CalibratedCosts, OperatorCosts, costs, parse_testbed
from systems.common.metrics import summarise
from systems.common.models import ModelShape, model
from systems.common.serving_files import check, plain, shown, table, write
from systems.common.workloads.build import from_csv

WATERMARK = {"prefill-first": 0.01, "chunked-prefill": 0.0}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m systems.common.simulate", description="Simulate an LLM engine on your requests."
    )
    made.add_argument("--requests", type=Path, required=True, help="CSV with arrival_s, input_tokens, output_tokens")
    made.add_argument("--model", required=True, help="a model shape, such as llama-3.1-8b")
    made.add_argument("--hardware", required=True, help="GPUs, such as rtx4090 or a100-80x2")
    made.add_argument("--tp", type=int, help="tensor-parallel degree (default: all GPUs of --hardware)")
    made.add_argument("--operators", type=Path, help="folder of operator tables or of a calibration measured on this GPU")
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
    made.add_argument(
        "--overhead-us", type=float, help="host time per iteration, microseconds (default: the calibration's, else 0)"
    )
    made.add_argument("--out", type=Path, required=True, help="folder for requests.csv and summary.json")
    return made


def _engine(options: argparse.Namespace) -> tuple[Engine, SimulatedExecutor]:
    testbed = parse_testbed(options.hardware, "--hardware")
    shape = model(options.model, "--model")
    tp = testbed.count if options.tp is None else options.tp
    if options.overhead_us is not None and not options.overhead_us >= 0:
        raise InputError("simulate", "--overhead-us", options.overhead_us, "give 0 or more microseconds")
    priced = costs(shape, testbed, tp, operators=options.operators)
    blocks = options.num_gpu_blocks
    if blocks is None and isinstance(priced, CalibratedCosts) and priced.calibration.engine.block_tokens == options.block_size:
        blocks = priced.calibration.engine.num_gpu_blocks
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
    executor = executor_of(priced, shape, None if options.overhead_us is None else options.overhead_us * 1e-6)
    return Engine(config, executor), executor


def executor_of(priced: OperatorCosts, shape: ModelShape, overhead_s: float | None = None) -> SimulatedExecutor:
    """The simulated executor over `priced`; from a calibration also the padding, host time and early launches of its engine."""
    if not isinstance(priced, CalibratedCosts):
        return SimulatedExecutor(IterationCost(priced, shape, overhead_s or 0.0))
    facts = priced.calibration.engine
    cost = IterationCost(priced, shape, facts.host_s if overhead_s is None else overhead_s, facts.padding, priced.rest_s)
    return SimulatedExecutor(cost, facts.launch_ahead_s or 0.0, facts.launch_ahead_s is not None)


def engine_of(
    config: EngineConfig, model_name: str, hardware: str, operators: Path | None = None
) -> tuple[Engine, SimulatedExecutor]:
    """An idle simulated engine with the limits `config`, on one GPU.

    Raises InputError for unknown names and unusable tables.
    """
    testbed, shape = parse_testbed(hardware, "--hardware"), model(model_name, "--model")
    executor = executor_of(costs(shape, testbed, 1, operators=operators), shape)
    return Engine(config, executor), executor


def simulate(options: argparse.Namespace) -> dict[str, object]:
    """Run the command; the summary that it wrote."""
    workload = from_csv(options.requests)
    engine, executor = _engine(options)
    check(workload, engine.config, options.requests)
    began = time.perf_counter()
    sequences = serve(engine, workload.requests, ahead=executor if executor.launches_ahead else None)
    took_s = time.perf_counter() - began
    records = to_records(sequences, engine)
    summary: dict[str, object] = {
        **summarise(records),
        "engine_steps": engine.steps,
        "num_gpu_blocks": engine.config.num_gpu_blocks,
        "hardware_model": executor.cost.costs.source,
        "simulation_s": took_s,
    }
    write(options.out / "requests.csv", table(records))
    write(options.out / "summary.json", json.dumps(plain(summary), indent=2, sort_keys=True) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, said in one line."""
    options = parser().parse_args(arguments)
    try:
        summary = simulate(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{summary['finished']} requests, {summary['engine_steps']} iterations, {summary['hardware_model']}")
    print(shown(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
