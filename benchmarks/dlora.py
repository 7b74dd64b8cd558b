"""dLoRA's scheduler, integer program and simulator: how long do decisions take?

    python benchmarks/dlora.py [--out FILE] [--repeats N]

* `decision`: one `plan`, `repeats` and `ran` of each policy with 10 to 10,000 queued requests over 32 adapters. Must: under
  100 us at 1,000.
* `ilp`: a solve for two replicas (the artifact's program), and for the whole cluster. Must: under 0.2 s for two replicas and
  1,000 requests. What it loses: the makespan of the pairwise program, applied once, beside that of the full one.
* `cluster`: 32 replicas, 128 adapters, 10,000 requests from arrival to end, per request and against real time.

Prints a table, then one JSON object on its last line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from systems.common.core import Request, Trial
from systems.dlora.bench import Bench
from systems.dlora.cluster.ilp import Item, Program, makespan_s, solve
from systems.dlora.experiments import sequences_of, workload_of
from systems.dlora.policies import Policy
from systems.dlora.policies.credit import Credit
from systems.dlora.policies.static import Fcfs, Merge, OneAdapter
from systems.dlora.requests import LoraSequence, RequestQueue

ADAPTERS, SLOTS, BATCH = 32, 8, 16
POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": lambda: Fcfs(SLOTS, BATCH),
    "merge": lambda: Merge(BATCH),
    "one_adapter": lambda: OneAdapter(BATCH),
    "credit": lambda: Credit(ADAPTERS, SLOTS, BATCH),
}
WORKLOAD = {
    "arrivals": "functions", "trace": "azure_functions_2019", "window_hours": 2, "lengths": "sharegpt_turns",
    "lengths_filter": "vllm-sharegpt",
}  # fmt: skip


def queue_of(requests: int, rng: np.random.Generator) -> RequestQueue:
    """A queue of `requests` requests; adapter k with weight 1 / (k + 1)."""
    weights = 1 / (1 + np.arange(ADAPTERS))
    queue = RequestQueue()
    for index, adapter in enumerate(rng.choice(ADAPTERS, requests, p=weights / weights.sum()).tolist()):
        queue.add(LoraSequence(Request(index, 0.1 * index, 100, 100), adapter))
    return queue


def decision_us(make: Callable[[], Policy], requests: int, repeats: int) -> float:
    """Median microseconds of one decision and its booking, while the queue moves on by one request each time."""
    rng = np.random.default_rng(0)
    queue, policy = queue_of(requests, rng), make()
    took = []
    for step in range(repeats):
        queue.remove(queue.order[0])
        queue.add(LoraSequence(Request(10**6 + step, 1e6 + step, 100, 100), int(rng.integers(ADAPTERS))))
        began = time.perf_counter()
        plan = policy.plan(queue)
        policy.ran(plan, queue, min(5, policy.repeats(plan, queue)))
        took.append(time.perf_counter() - began)
    return 1e6 * statistics.median(took)


def uneven(requests: int, replicas: int, rng: np.random.Generator) -> Program:
    """A cluster whose first replica has most of the requests."""
    adapters = 4 * replicas
    hosted = [frozenset([*range(4 * j, 4 * j + 4), 0]) for j in range(replicas)]
    places = np.where(rng.random(requests) < 0.7, 0, rng.integers(replicas, size=requests)).tolist()
    items = [Item(int(rng.choice(sorted(hosted[j]))), int(rng.integers(1, 60)), j) for j in places]
    times = {k: float(rng.uniform(2, 8)) for k in range(adapters)}
    return Program(items, hosted, [6] * replicas, [7000] * replicas, times, must_stay=frozenset(range(adapters)))


def pair_of(program: Program) -> Program:
    """The most and the least loaded replica of `program`, by number of requests."""
    counts = [sum(item.engine == j for item in program.items) for j in range(len(program.slots))]
    chosen = sorted((counts.index(max(counts)), counts.index(min(counts))))
    place = {engine: j for j, engine in enumerate(chosen)}
    items = [Item(i.adapter, i.blocks, place[i.engine]) for i in program.items if i.engine in place]
    hosted = [program.hosted[j] for j in chosen]
    elsewhere = frozenset().union(*(h for j, h in enumerate(program.hosted) if j not in place), frozenset())
    stay = frozenset().union(*hosted) - elsewhere
    return Program(items, hosted, [6, 6], [7000, 7000], program.execution_s, must_stay=stay)


def ilp(requests: int, replicas: int, repeats: int) -> dict[str, Any]:
    """Median solve time, and makespans: as it was, by one pair, by the whole cluster."""
    program = uneven(requests, replicas, np.random.default_rng(1))
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        answer = solve(program)
        took.append(time.perf_counter() - began)
    loads = [0.0] * replicas
    for item in program.items:
        loads[item.engine] += program.execution_s[item.adapter]
    pair = solve(pair_of(program))
    others = sorted(loads)[1:-1]  # those that the pair leaves as they are, the busiest and the idlest apart
    return {
        "requests": requests,
        "replicas": replicas,
        "solve_s": statistics.median(took),
        "as_it_was_s": makespan_s(program, [item.engine for item in program.items]),
        "pair_s": max([pair.makespan_s if pair else float("nan"), *others]),
        "cluster_s": answer.makespan_s if answer else float("nan"),
    }


def cluster(requests: int) -> dict[str, float]:
    """32 replicas and 128 adapters at 64 req/s."""
    told = {"workload": WORKLOAD, "adapters": 128, "replicas": 32, "rate_rps": 64.0, "requests": requests}
    data = {"azure_functions_2019": None, "sharegpt_turns": None}
    trial = Trial("dlora", "serving", told, "a100-80x32", datasets=data)
    bench = Bench.of(trial)
    asked = sequences_of(workload_of(trial, 0))
    made = bench.cluster(bench.costs())
    began, cpu = time.perf_counter(), time.process_time()
    made.serve(asked)
    took, spent = time.perf_counter() - began, time.process_time() - cpu
    simulated_s = max(s.finish_s for s in asked)
    iterations = sum(replica.iterations for replica in made.replicas)
    return {
        "requests": requests,
        "wall_s": took,
        "cpu_s": spent,
        "cpu_us_per_request": 1e6 * spent / requests,
        "times_real_time": simulated_s / spent,
        "iterations": iterations,
        "decisions": sum(replica.decisions for replica in made.replicas),
    }


def main() -> int:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": f"{platform.machine()}, Python {platform.python_version()}", "decision_us": {}}
    for name, make in POLICIES.items():
        found["decision_us"][name] = {n: decision_us(make, n, options.repeats) for n in (10, 100, 1000, 10_000)}
        shown = ", ".join(f"{n}: {us:.1f} us" for n, us in found["decision_us"][name].items())
        print(f"decision {name:12} {shown}", flush=True)
    solve(uneven(10, 2, np.random.default_rng(0)))  # loads scipy
    found["ilp"] = [ilp(*size, max(1, options.repeats // 60)) for size in ((100, 2), (1000, 2), (1000, 4), (1000, 8))]
    for row in found["ilp"]:
        said = f"makespan {row['as_it_was_s']:.0f} s, by the pair {row['pair_s']:.0f}, by the cluster {row['cluster_s']:.0f}"
        print(f"ILP {row['requests']:5} requests, {row['replicas']} replicas: {row['solve_s']:.3f} s; {said}", flush=True)
    found["cluster"] = cluster(10_000)
    print("cluster " + ", ".join(f"{key} {value:.4g}" for key, value in found["cluster"].items()))
    line = json.dumps(found)
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
