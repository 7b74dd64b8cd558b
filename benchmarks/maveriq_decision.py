"""How long a deployment decision takes, and how fast the serving simulator is.

    python benchmarks/maveriq_decision.py [--mirror DIR] [--repeats N] [--out FILE]

A decision chooses among all configurations that a model has on eight GPUs (97 for Llama-2-70B). *First* includes the estimates
of all of them, *next* finds them kept and places anew on another state of the node. The authors' controller takes 0.6 to 4 s
(their logs); the bound of ours is 50 ms. The simulator replays the conversation trace at RS 0.4 under both queues.
A table in Markdown, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.atomic import write_atomically
from harness.provenance import environment
from systems.maveriq.decide import searcher
from systems.maveriq.placement import GpuState
from systems.maveriq.search import Search, Wish
from systems.maveriq.serving.runs import deploying
from systems.maveriq.serving.services import Services, read_full_models
from systems.maveriq.serving.workload import minute_counts, model_list, replayed, scaled

TABLES = Path("maveriq_a6000")
MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "falcon-40b")


def node(seed: int) -> list[GpuState]:
    """Eight GPUs, each with something on it."""
    pick = random.Random(seed)
    return [GpuState(gpu, 47.98828, 0.46527 + pick.uniform(0, 20), pick.random()) for gpu in range(8)]


def took_s(search: Search, model: str, seed: int) -> tuple[float, float]:
    """Seconds of one decision, on the clock and of CPU."""
    states, begun, cpu = node(seed), time.perf_counter(), time.process_time()
    search.deploy(Wish(model), states)
    return time.perf_counter() - begun, time.process_time() - cpu


def decisions(mirror: Path, mode: str, repeats: int) -> list[dict[str, object]]:
    """First and next decisions of every model, milliseconds."""
    rows: list[dict[str, object]] = []
    for model in MODELS:
        first = []
        for repeat in range(min(5, repeats)):
            fresh = searcher(mirror / TABLES / "fingerprint_data_collection_BS.csv", mode)
            first.append(took_s(fresh, model, repeat))
        after = [1000 * took_s(fresh, model, repeat)[0] for repeat in range(repeats)]
        count = len(fresh.configurations(model, 8))
        wall, cpu = (1000 * statistics.median(times) for times in zip(*first, strict=True))
        rows.append(
            {"model": model, "mode": mode, "configurations": count, "first_ms": wall, "first_cpu_ms": cpu,
             "next_median_ms": statistics.median(after), "next_max_ms": max(after)}
        )  # fmt: skip
    return rows


def simulator(mirror: Path) -> dict[str, float]:
    """Requests per second of wall time that the simulated node serves, by queue."""
    search = searcher(mirror / TABLES / "fingerprint_data_collection_BS.csv")
    services = Services(search.estimator, read_full_models(mirror / TABLES / "full_model_data_collection.csv"))
    counts = scaled(minute_counts(mirror / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv"), 0.4)
    trace = replayed(counts, model_list("large"))
    wishes = [Wish(entry.model, "min_lat", strategy="hybrid") for entry in trace.entries]
    found = {}
    for queue in ("global", "per_model"):
        deploying(trace, search, services, wishes, queue)
        begun = time.perf_counter()
        deploying(trace, search, services, wishes, queue)
        found[queue] = len(trace.arrival_s) / (time.perf_counter() - begun)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", type=Path, default=Path("../shared/data"))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = [row for mode in ("paper", "improved") for row in decisions(args.mirror, mode, args.repeats)]
    speed = simulator(args.mirror)
    print("| model | mode | configurations | first (ms) | its CPU time (ms) | next, median (ms) | next, most (ms) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        times = " | ".join(f"{row[key]:.2f}" for key in ("first_ms", "first_cpu_ms", "next_median_ms", "next_max_ms"))
        print(f"| {row['model']} | {row['mode']} | {row['configurations']} | {times} |")
    print(f"\nsimulated requests per second: one queue {speed['global']:,.0f}, a queue per model {speed['per_model']:,.0f}")
    told = json.dumps({"decisions": rows, "simulated_requests_per_s": speed, "environment": environment()}, sort_keys=True)
    print(told)
    if args.out:
        write_atomically(args.out, told + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
