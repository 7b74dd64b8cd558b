"""dLoRA on several GPUs, a replica each: Figures 2b, 11a and 13 at the size of two (or four) H200s.

    python -m benchmarks.dlora_cluster_gpu [--model llama-2-7b] [--replicas 2] [--out FILE] [--parts ilp,...] [--limit-s 200]

Requests arrive as in the simulated figures (stand-in of Azure Functions 2021, functions striped over adapters in the file's
order), are dispatched to live replicas and, with migration type `dlora`, moved between them with their adapters
(benchmarks/dlora_live_cluster.py). Shorter than the paper's runs: a look every second instead of every ten, answers of 64
tokens in the mean, rates by what unmerged steps alone could serve. The file is written after each run. Without GPUs two
processes serve the tiny model, so that the script itself can be tried. Parts, in order:

* `ilp`: seconds of the pairwise integer program by requests and adapters, and of the whole one by replicas (CPU only).
* `fig11a`: dispatch only (by stale counts), proactive dispatch, co-migration; 8 adapters, rates 0.9, 1.2 and 0.6.
* `fig2b`: one adapter per batch, adapters fixed to replicas: how unequal queueing is. Merging stands in for whole copies.
* `fig13`: co-migration with 16 adapters, of which a replica has slots for 6; with `fig11a`'s runs the overheads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.dlora_live_cluster import Ended, LiveCluster, Record
from benchmarks.dlora_serving import BLOCKS, BUDGET, GPU, ROWS, capacity_rps, mean_output, workload
from harness.atomic import write_atomically
from systems.common.core import Request
from systems.common.models import model
from systems.dlora import sizes
from systems.dlora.cluster import ilp
from systems.dlora.cluster.migration import MigrationRules
from systems.dlora.cluster.placement import Hosts, fill, replicate, striped

PARTS = ("ilp", "fig11a", "fig2b", "fig13")
SLOTS = 6
"""Adapters that fit a replica: the 4 placed there, the extra copy, one more."""
WINDOW_S = 8.0 if GPU else 0.4
"""Seconds of arrivals of one run."""
CUT = 2.5
"""A run is cut after so many windows; what has not finished counts as if it had then."""
RULES = MigrationRules(interval_s=1.0 if GPU else 0.1, load_excess=16.0 if GPU else 2.0)
TYPES = ("round_robin", "proactive", "dlora")
Asked = Sequence[tuple[Request, int]]


def asked(rate_rps: float, adapters: int, seed: int = 0) -> list[tuple[Request, int]]:
    """A window of requests from the function trace's stand-in."""
    told: dict[str, object] = {
        "arrivals": "functions", "trace": "azure_functions_2021", "window_hours": 6, "map_stride": 1, "adapters": adapters,
    }  # fmt: skip
    return workload(rate_rps, WINDOW_S, seed, told, datasets={"azure_functions_2021": None}, drop=("adapter_pattern",))


def placed(kind: str, adapters: int, replicas: int, shape_bytes: float, seed: int = 0) -> Hosts:
    """Where adapters lie at start, as `Bench.hosts` does it."""
    if kind == "one_adapter":
        return striped(adapters, replicas)
    found = fill([set() for _ in range(replicas)], [60e9] * replicas, [1 / adapters] * adapters, shape_bytes)
    random = np.random.default_rng([seed, adapters, replicas]) if kind == "dlora" else None
    return replicate(found, adapters, random)


def numbers(record: Record, requests: Asked) -> dict[str, object]:
    """A run's latencies, queueing and overheads; per replica its share of queueing."""
    told = {request.index: (request, adapter) for request, adapter in requests}
    done = [one for one in record.ended.values() if one.index in told]

    def waited(ended: Sequence[Ended]) -> float:
        whole = statistics.fmean(e.finish_s - told[e.index][0].arrival_s for e in ended)
        return 100 * (1 - statistics.fmean(e.executed_s for e in ended) / whole)

    latency = sorted((e.finish_s - told[e.index][0].arrival_s) / told[e.index][0].output_tokens for e in done)
    queueing = [
        (e.finish_s - told[e.index][0].arrival_s - e.executed_s) / told[e.index][0].output_tokens for e in done
    ]  # fmt: skip
    replicas = []
    for mine in record.replicas:
        here = [e for e in done if e.replica == mine["replica"]]
        share = waited(here) if here else None
        replicas.append(
            {**mine, "requests": len(here), "queueing_percent": share, "busy_share": mine["busy_s"] / record.duration_s}
        )
    return {
        "requests": len(requests), "unfinished": record.unfinished, "duration_s": record.duration_s,
        "throughput_rps": (len(done) - record.unfinished) / record.duration_s,
        "mean_s_per_token": statistics.fmean(latency), "p90_s_per_token": latency[int(0.9 * len(latency))],
        "queueing_s_per_token": statistics.fmean(queueing),
        "ttft_mean_s": statistics.fmean(e.first_token_s - told[e.index][0].arrival_s for e in done),
        "moved_requests": sum(e.migrations > 0 for e in done), "looks": record.looks, "solves": len(record.solver_s),
        "solver_s": record.solver_s, "moves": record.moves, "replicas": replicas, "errors": record.errors,
    }  # fmt: skip


@dataclass
class Bench:
    """The cluster, and what is known about it."""

    cluster: LiveCluster
    adapter_bytes: float
    ends_s: float
    write: Callable[[], None]
    asked: dict[str, list[list[float]]]
    """Requests of each rate and number of adapters: arrival, input and output tokens, adapter."""

    def run(
        self, report: list[dict[str, object]], policy: str, migration: str, rate: float, adapters: int, hosted: str = ""
    ) -> None:
        """One run, into `report`; left out (and said so) where its time is not there any more."""
        told: dict[str, object] = {"policy": policy, "migration": migration, "rate": rate, "adapters": adapters}
        report.append(told)
        left_s = self.ends_s - time.perf_counter()
        if left_s < 1.5 * WINDOW_S:
            told["left_out"] = f"{left_s:.0f} s were left"
            return
        try:
            constants = self.cluster.capacity
            rate_rps = rate * self.cluster.count * capacity_rps(constants, mean_output(asked(20, adapters)))
            requests = asked(rate_rps, adapters)
            self.asked[f"{rate}, {adapters} adapters"] = [
                [r.arrival_s, r.input_tokens, r.output_tokens, k] for r, k in requests
            ]
            kind = hosted or ("dlora" if migration == "dlora" else "others")
            hosts = placed(kind, adapters, self.cluster.count, self.adapter_bytes)
            shares = np.bincount([k for _, k in requests], minlength=adapters) / len(requests)
            told |= {"rate_rps": rate_rps, "top_share": float(shares.max()), "hosts": [sorted(h) for h in hosts]}
            record = self.cluster.serve(requests, hosts, policy, migration, RULES, min(CUT * WINDOW_S, left_s))
            told |= numbers(record, requests)
            told |= {"switching_s": [r["passes"] * constants.switch_s for r in record.replicas]}
            told |= {"hosts_at_end": [sorted(h) for h in self.cluster.hosts]}
            print(f"  {policy}, {migration}, rate {rate}, {adapters} adapters: {record.duration_s:.1f} s", flush=True)
        except Exception as error:
            told |= {"error": repr(error), "trace": traceback.format_exc()}
            print(f"  {policy}, {migration}, rate {rate}: {error!r}", file=sys.stderr, flush=True)
        self.write()


def fig11a(bench: Bench, report: list[dict[str, object]]) -> None:
    """See the module."""
    for rate in (0.9, 1.2, 0.6):
        for migration in TYPES:
            bench.run(report, "credit", migration, rate, 8)


def fig2b(bench: Bench, report: list[dict[str, object]]) -> None:
    """See the module; at a rate that one adapter per batch can hardly serve."""
    for rate in (0.15, 0.3):
        bench.run(report, "one_adapter", "none", rate, 8, "one_adapter")


def fig13(bench: Bench, report: list[dict[str, object]]) -> None:
    """See the module."""
    bench.run(report, "credit", "dlora", 0.9, 16)


def ilp_program(requests: int, adapters: int, replicas: int, seed: int = 0) -> ilp.Program:
    """Replica 0 has half of all requests and more; skewed adapters, each on one replica, one on all."""
    rng = np.random.default_rng([seed, requests, adapters, replicas])
    hosted = [frozenset([k for k in range(adapters) if k % replicas == e] + [adapters - 1]) for e in range(replicas)]
    shares = 1 / (1.0 + np.arange(adapters))
    items = []
    for _ in range(requests):
        engine = 0 if rng.random() < 0.5 else int(rng.integers(replicas))
        mine = sorted(hosted[engine])
        adapter = int(rng.choice(mine, p=shares[mine] / shares[mine].sum()))
        items.append(ilp.Item(adapter, float(rng.integers(5, 60)), engine))
    times = {k: float(1 + rng.random()) for k in range(adapters)}
    slots = [len(h) + 1 for h in hosted]
    return ilp.Program(items, hosted, slots, [6500] * replicas, times, must_stay=frozenset(range(adapters)))


def solver(report: list[dict[str, object]]) -> None:
    """Solver time: pairs by requests and adapters, all replicas in one."""
    plans = [(n, 32, 2) for n in (100, 300, 1000)] + [(1000, m, 2) for m in (8, 16, 64, 128)] + [(1000, 32, 4)]
    ilp.solve(ilp_program(20, 4, 2))  # scipy comes in
    for requests, adapters, replicas in plans if GPU else plans[:1]:
        program = ilp_program(requests, adapters, replicas)
        times = []
        for _ in range(3):
            began_s = time.perf_counter()
            answer = ilp.solve(program, 5.0)
            times.append(time.perf_counter() - began_s)
        before = ilp.makespan_s(program, [item.engine for item in program.items])
        after = answer.makespan_s if answer is not None else None
        told = {"requests": requests, "adapters": adapters, "replicas": replicas, "seconds": statistics.median(times)}
        report.append({**told, "makespan_before_s": before, "makespan_after_s": after})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b" if GPU else "tiny")
    parser.add_argument("--replicas", type=int, default=torch.cuda.device_count() if GPU else 2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit-s", type=float, default=200.0, help="no run begins or goes on after so many seconds")
    given = parser.parse_args(arguments)
    started_s, parts = time.perf_counter(), given.parts.split(",")
    runs: dict[str, list[dict[str, object]]] = {}
    asked_of: dict[str, list[list[float]]] = {}
    report: dict[str, object] = {
        "command": sys.argv, "model": given.model, "replicas": given.replicas, "window_s": WINDOW_S, "slots": SLOTS,
        "kv_blocks": BLOCKS - BLOCKS // 20, "batch": ROWS, "budget": BUDGET, "interval_s": RULES.interval_s,
        "load_excess": RULES.load_excess, "torch": torch.__version__, "asked": asked_of, "parts": runs,
    }  # fmt: skip

    def write() -> None:
        report["took_s"] = time.perf_counter() - started_s
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(given.out, json.dumps(report, indent=1).encode())

    if "ilp" in parts:
        solver(runs.setdefault("ilp", []))
        write()
        print(f"ilp: {time.perf_counter() - started_s:.1f} s", flush=True)
    try:
        with LiveCluster(given.model, given.replicas, 16, SLOTS) as cluster:
            report["facts"], report["ready_s"] = cluster.facts, time.perf_counter() - started_s
            print(f"replicas ready: {report['ready_s']:.1f} s", flush=True)
            shape_bytes = float(sizes.adapter_bytes(model(given.model)))
            bench = Bench(cluster, shape_bytes, started_s + given.limit_s, write, asked_of)
            for name, work in (("fig11a", fig11a), ("fig2b", fig2b), ("fig13", fig13)):
                if name in parts:
                    work(bench, runs.setdefault(name, []))
                    print(f"{name}: {time.perf_counter() - started_s:.1f} s", flush=True)
    except Exception as error:
        report["error"], report["trace"] = repr(error), traceback.format_exc()
        print(report["trace"], file=sys.stderr)
    write()
    print(json.dumps(report, indent=1))
    failed = "error" in report or any("error" in run or run.get("errors") for mine in runs.values() for run in mine)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
