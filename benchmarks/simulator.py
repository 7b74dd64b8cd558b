"""Speed of the LLM engine's simulation on one core.

    python benchmarks/simulator.py [--mirror DIR] [--out FILE]

Llama-2-70B, TP 2 on A100-80, chunked prefill with 512-token chunks, 128 sequences, 4,000 requests with the Azure conversation
lengths (a stand-in where the file is not to be had), Poisson 2/s. Prints a short table, then one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine, serve
from systems.common.engine.memory import kv_blocks
from systems.common.engine.results import to_records
from systems.common.engine.simulated import IterationCost, SimulatedExecutor
from systems.common.hardware import costs, parse_testbed
from systems.common.metrics import summarise
from systems.common.models import model
from systems.common.workloads.build import build

TRACE = "azure_llm_2023/AzureLLMInferenceTrace_conv.csv"
PEER = {
    "requests_per_s": 813,
    "output_tokens_per_s": 172_000,
}  # microsoft/vidur on this workload and a machine like CI's: quoted from an earlier timing, not measured in this run


def workload(mirror: Path):
    """The 4,000 requests."""
    trace = mirror / TRACE
    declared = {"arrivals": "poisson", "rate_rps": 2.0, "requests": 4000, "lengths": "azure_conv"}
    return build(declared, {"azure_conv": trace if trace.is_file() else None}, seed=0)


def once(requests) -> tuple[float, float, Engine, list]:
    """Simulate them with a fresh engine and fresh caches; seconds for the engine alone and with the metrics."""
    shape, testbed = model("llama-2-70b"), parse_testbed("a100-80x2")
    cost = IterationCost(costs(shape, testbed, 2), shape)
    blocks = kv_blocks(shape, testbed, 2, 0.9)
    engine = Engine(
        EngineConfig(blocks, "chunked-prefill", max_num_batched_tokens=512, max_num_seqs=128), SimulatedExecutor(cost)
    )
    began = time.perf_counter()
    sequences = serve(engine, requests)
    engine_s = time.perf_counter() - began
    summarise(to_records(sequences, engine))
    return engine_s, time.perf_counter() - began, engine, sequences


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser()
    options.add_argument("--mirror", type=Path, default=Path("../shared/data"))
    options.add_argument("--runs", type=int, default=7)
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    given = workload(chosen.mirror)
    requests = given.requests
    tokens = int(given.output_tokens.sum())
    once(requests)  # warm the interpreter's caches
    runs = [once(requests) for _ in range(chosen.runs)]
    engine_s = statistics.median(run[0] for run in runs)
    whole_s = statistics.median(run[1] for run in runs)
    engine, sequences = runs[0][2], runs[0][3]
    result = {
        "requests_per_s": len(requests) / engine_s,
        "output_tokens_per_s": tokens / engine_s,
        "requests_per_s_with_metrics": len(requests) / whole_s,
        "output_tokens_per_s_with_metrics": tokens / whole_s,
        "ratio_to_quoted_vidur_requests": len(requests) / engine_s / PEER["requests_per_s"],
        "ratio_to_quoted_vidur_tokens": tokens / engine_s / PEER["output_tokens_per_s"],
        "spread_s": [min(run[0] for run in runs), max(run[0] for run in runs)],
        "iterations": engine.steps,
        "simulated_s": max(s.finish_s for s in sequences),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "notes": list(given.notes),
    }
    for key in ("requests_per_s", "output_tokens_per_s", "requests_per_s_with_metrics", "output_tokens_per_s_with_metrics"):
        print(f"{key:36}{result[key]:14,.0f}")
    print(f"{'peak memory':36}{result['peak_memory_mib']:14,.0f} MiB")
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
