"""dLoRA's replica on one device, serving in real time: what `dlora_gpu` and `dlora_cluster_gpu` measure as requests arrive.

A runner for it (`serving_runner`), a replica that times its iterations (`Watched`), a run of a policy (`run`), and the parts of
benchmarks/dlora_gpu.py that serve:

* `iterations`: what iterations cost here, through the very loop that serves: decoding by batch, context and adapters in the
  batch, prompts by tokens and rows beside them, merged and unmerged; changes of the merged adapter.
* `policies`: Figure 10 in small: even and skewed popularity under overload, by policy. Unmerged-only with the grouped kernels
  is also the S-LoRA stand-in.
* `heldout`: other rates, skew and lengths, request by request; `python -m systems.dlora.fidelity` predicts it from
  `iterations`.
* `adapters`: Figure 12 on one GPU: throughput at overload over the number of adapters.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.models import ModelShape
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.weights import Weights
from systems.common.workloads.build import build
from systems.dlora import fidelity
from systems.dlora.lora_engine.adapters import HostAdapter
from systems.dlora.lora_engine.bank import SITES, SlotBank
from systems.dlora.lora_engine.constants import Constants, measure_constants
from systems.dlora.lora_engine.live import LiveReplica, serve
from systems.dlora.lora_engine.passes import Passes
from systems.dlora.lora_engine.runner import LoraRunner
from systems.dlora.lora_engine.switching import Copy
from systems.dlora.policies import Plan, Policy
from systems.dlora.replica import engine_config
from systems.dlora.requests import LoraSequence, Place, RequestQueue

RANK, ROWS, BUDGET = 16, 16, 2048
"""Rank of adapters; the artifact's batch of 16; tokens of a batch."""
ADAPTERS = 8
GPU = torch.cuda.is_available()
PLACES, BLOCKS, MOST_TOKENS = (320, 6500, 2048) if GPU else (160, 2400, 1024)
"""Requests that hold KV cache, blocks of 16 tokens, tokens of a request."""
SLOTS = 128 if GPU else 16
WINDOW_S = 3.0 if GPU else 0.25
"""Seconds of arrivals of one run."""
POLICIES = ("fcfs", "merge", "credit")
CLOCK, SLEEP = time.perf_counter, time.sleep
"""Tests put a clock of their own here."""
SECONDS = {"policies": 100.0, "heldout": 80.0, "adapters": 75.0}
"""Most seconds of each part that serves: no run begins after them."""


def random_host_adapter(bank: SlotBank, scale: float = 0.1) -> HostAdapter:
    """Matrices of one adapter in host memory, pinned on a GPU."""

    def made(room: torch.Tensor, deviation: float) -> torch.Tensor:
        tensor = torch.empty_like(room[:, 1]).normal_(0, deviation).cpu()
        return tensor.pin_memory() if room.is_cuda else tensor

    return HostAdapter(
        {site: made(bank.a[site], bank.a[site].shape[-1] ** -0.5) for site in SITES},
        {site: made(bank.b[site], scale * RANK**-0.5) for site in SITES},
    )


def serving_runner(
    shape: ModelShape, weights: Weights, capacity: int, known: int, places: int = PLACES, blocks: int = BLOCKS,
    distinct: int = 1,
) -> LoraRunner:  # fmt: skip
    """A runner by copy, warm for batches of 16, that knows adapters a0, a1, ...; `distinct` of them are in memory, in turn."""
    device = weights.layers[0].norm1.gain.device
    bank = SlotBank(shape, capacity, RANK, places, SITES, device)
    config = EngineConfig(blocks, max_num_batched_tokens=BUDGET, max_num_seqs=places)
    runner = LoraRunner(Live.build(shape, weights, config, max_tokens=MOST_TOKENS), bank, Copy(weights, Passes(bank)))
    held = [random_host_adapter(bank) for _ in range(distinct)]
    for i in range(known):
        runner.add(f"a{i}", held[i % distinct])
    runner.warm(ROWS)
    return runner


def prompt_of(vocab: int, request: Request) -> np.ndarray:
    """A request's prompt, by its number."""
    return np.random.default_rng(request.index).integers(0, vocab, request.input_tokens)


class Watched(LiveReplica):
    """A live replica that keeps what each iteration was and how long it took, from its decision to its booking.

    Attributes:
        log: per iteration merged (0 or 1), prompts, their tokens, decoding rows, their context, distinct adapters, seconds.
    """

    def __init__(
        self, runner: LoraRunner, policy: Policy, names: Sequence[str], blocks: int = BLOCKS, index: int = 0, batch: int = ROWS
    ) -> None:
        config = engine_config(blocks - blocks // 20, batch, BUDGET)
        super().__init__(runner, config, policy, names, partial(prompt_of, runner.bank.shape.vocab), index, CLOCK)
        self.log: list[tuple[int, int, int, int, int, int, float]] = []

    def begin(self, now_s: float) -> float:
        """As `LiveReplica.begin`."""
        self._began_s = self.clock()
        return super().begin(now_s)

    def end(self) -> list[LoraSequence]:
        """As `LiveReplica.end`."""
        assert self.run is not None
        batch, merged = self.run.batch, self.run.plan.merged is not None
        context = sum([s.context for s in batch.decodes])
        tokens = sum([s.prompt_tokens for s in batch.prefills])
        what = int(merged), len(batch.prefills), tokens, len(batch.decodes), context, len(batch.adapters)
        done = super().end()
        self.log.append((*what, self.clock() - self._began_s))
        return done

    def empty(self) -> None:
        """Let all requests go."""
        for sequence in list(self.queue):
            self.withdraw(sequence)

    def kinds(self) -> dict[str, dict[str, float]]:
        """Iterations and their seconds, by kind: says where a prediction went wrong."""
        found: dict[str, dict[str, float]] = {}
        for merged, prompts, _, decodes, _, _, took_s in self.log:
            name = ("merged" if merged else "unmerged") + (" with prompts" if prompts else "") + ("" if decodes else " alone")
            mine = found.setdefault(name, {"iterations": 0, "seconds": 0.0, "rows": 0})
            mine["iterations"] += 1
            mine["seconds"] += took_s
            mine["rows"] += decodes
        return found


def policy_of(name: str, constants: Constants, adapters: int, slots: int) -> Policy:
    """One of `POLICIES` for a replica of 16 requests a batch."""
    return fidelity.policy_of(name, constants.rules(), adapters, slots, ROWS)


def run(runner: LoraRunner, policy: Policy, requests: Iterable[tuple[Request, int]]) -> tuple[Watched, list[LoraSequence]]:
    """Serve `requests` from now, in real time; Python's garbage collector waits meanwhile."""
    names = list(runner.store.residents.outstanding)
    runner.store.fetch(names[: min(runner.bank.capacity, len(names))])
    replica = Watched(runner, policy, names)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        return replica, serve(replica, requests, sleep=SLEEP)
    except Exception:
        replica.run = None
        replica.empty()
        raise
    finally:
        gc.enable()
        gc.unfreeze()


def summary(replica: Watched, served: Sequence[LoraSequence], passes: int) -> dict[str, object]:
    """Numbers of a finished run; latencies and queueing per output token, as the paper's."""
    per_token = sorted((s.finish_s - s.arrival_s) / s.output_tokens for s in served)
    queueing = [(s.finish_s - s.arrival_s - s.executed_s) / s.output_tokens for s in served]
    ended_s = max(s.finish_s for s in served)
    return {
        "requests": len(served),
        "mean_s_per_token": statistics.fmean(per_token),
        "p90_s_per_token": per_token[int(0.9 * len(per_token))],
        "queueing_s_per_token": statistics.fmean(queueing),
        "ttft_mean_s": statistics.fmean(s.first_token_s - s.arrival_s for s in served),
        "ended_s": ended_s,
        "throughput_rps": len(served) / ended_s,
        "iterations": replica.iterations,
        "passes": passes,
        "kinds": replica.kinds(),
    }


def workload(
    rate_rps: float, seconds: float, seed: int, told: Mapping[str, object] | None = None, least: int = 24,
    datasets: Mapping[str, Path | None] | None = None, drop: Sequence[str] = (),
) -> list[tuple[Request, int]]:  # fmt: skip
    """Requests with adapter numbers; `told` overrides the declaration (docs/workloads.md), `drop` takes keys out of it."""
    most_in, most_out = (512, 256) if GPU else (60, 12)
    declared: dict[str, object] = {
        "arrivals": "poisson", "rate_rps": rate_rps, "requests": max(least, round(rate_rps * seconds)), "lengths": "lognormal",
        "mean_input_tokens": most_in / 4, "p50_input_tokens": most_in / 6, "max_input_tokens": most_in,
        "mean_output_tokens": most_out / 4, "p50_output_tokens": most_out / 5, "max_output_tokens": most_out,
        "adapters": ADAPTERS, "adapter_pattern": "uniform",
    }  # fmt: skip
    made = build({key: value for key, value in {**declared, **(told or {})}.items() if key not in drop}, datasets or {}, seed)
    return [(r, int(str(r.adapter).rpartition("-")[2])) for r in made.requests]


def capacity_rps(constants: Constants, mean_output_tokens: float) -> float:
    """What unmerged steps alone could serve, a fifth of the time left to prompts."""
    return 0.8 * ROWS / (constants.t_unmerged_s * mean_output_tokens)


# ---- what iterations cost


class Scripted:
    """A policy that does as it is told."""

    def __init__(self) -> None:
        self.coming = Plan([])

    def plan(self, queue: RequestQueue) -> Plan:
        """What was told."""
        return self.coming

    def repeats(self, plan: Plan, queue: RequestQueue) -> int:
        """Once."""
        return 1

    def ran(self, plan: Plan, queue: RequestQueue, steps: int) -> None:
        """Nothing to book."""


PER_ADAPTER = (16, 8, 4, 4, 2, 2, 2, 2)
"""Requests of each adapter that decode: enough for 16 of one, 8 of two, 4 of four, 2 of eight."""
DECODES = [
    (1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 4), (6, 1), (6, 6), (8, 1), (8, 2), (8, 4), (8, 8), (9, 1), (9, 8),
    (12, 1), (12, 4), (12, 8), (16, 1), (16, 2), (16, 4), (16, 8),
]  # fmt: skip
"""Rows and adapters among them."""
CONTEXTS = (64, 384, 896) if GPU else (8, 16)
PROMPTS = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048) if GPU else (8, 32, 60)


class Desk:
    """Requests under a scripted replica, to run any batch of them."""

    def __init__(self, runner: LoraRunner, context: int, output_tokens: int) -> None:
        self.script = Scripted()
        names = list(runner.store.residents.outstanding)
        runner.store.fetch(names[:ADAPTERS])
        self.replica = Watched(runner, self.script, names)
        self._number = 1_000_000
        self.of = [[self.make(k, context, output_tokens) for _ in range(count)] for k, count in enumerate(PER_ADAPTER)]
        waiting = [s for mine in self.of for s in mine]
        while waiting := [s for s in waiting if s.place is Place.WAITING]:
            self.step(waiting)

    def make(self, adapter: int, tokens: int, output_tokens: int) -> LoraSequence:
        """A request that waits."""
        self._number += 1
        sequence = LoraSequence(Request(self._number, 0.0, tokens, output_tokens), adapter)
        self.replica.submit(sequence)
        return sequence

    def step(self, order: Sequence[LoraSequence], merged: int | None = None) -> float:
        """One iteration; seconds."""
        self.script.coming = Plan(order, merged)
        self.replica.begin(0.0)
        self.replica.end()
        return self.replica.log[-1][-1]

    def rows(self, count: int, adapters: int) -> list[LoraSequence]:
        """`count` decoding requests of `adapters` adapters, in turns."""
        turns = [self.of[k][i] for i in range(max(PER_ADAPTER)) for k in range(adapters) if i < len(self.of[k])]
        return turns[:count]


def decode_costs(desk: Desk, steps: int) -> list[dict[str, float]]:
    """Decode iterations of one context: `steps` of each batch, the first two left out."""
    found = []
    for merged in (True, False):
        for count, adapters in DECODES:
            if merged and adapters > 1:
                continue
            order = desk.rows(count, adapters)
            times = [desk.step(order, 0 if merged else None) for _ in range(steps + 2)][2:]
            assert len(order) == count, (count, adapters)
            context = sum(s.context for s in order) - count * steps / 2
            low, middle, high = statistics.quantiles(times, n=4)
            times_ms = {"ms": middle * 1e3, "low_ms": low * 1e3, "high_ms": high * 1e3}
            found.append({"merged": merged, "rows": count, "adapters": adapters, "context": context, **times_ms})
    return found


def prompt_costs(desk: Desk, repeats: int) -> list[dict[str, float]]:
    """Iterations with prompts: beside no, 1 or 12 decoding rows; as one prompt (of at most 1,024 tokens), and as four."""
    found = []
    most = 1024 if GPU else 60
    plans = [(rows, tokens, -(-tokens // most)) for rows in (0, 1, 12) for tokens in PROMPTS]
    plans += [(rows, tokens, 4) for rows in (0, 12) for tokens in PROMPTS[1::3] if tokens <= most]
    for merged in (True, False):
        for count, tokens, prompts in plans:
            rows = desk.rows(count, 1 if merged else min(ADAPTERS, max(1, count)))
            times = []
            for _ in range(repeats):
                new = [desk.make(0 if merged else k % ADAPTERS, tokens // prompts, 9) for k in range(prompts)]
                times.append(desk.step([*rows, *new], 0 if merged else None))
                for sequence in new:
                    desk.replica.withdraw(sequence)
            _, prompts_run, tokens_run, decodes, context, distinct, _ = desk.replica.log[-1]
            what = {"merged": merged, "rows": decodes, "context": context, "tokens": tokens_run, "prompts": prompts_run}
            found.append({**what, "adapters": distinct, "ms": statistics.median(times) * 1e3})
    return found


def change_costs(desk: Desk, repeats: int) -> dict[str, float]:
    """Milliseconds that the first iteration takes longer: after a -> b, after merged -> unmerged, with other rows."""
    halves = desk.of[0][:8], desk.of[0][8:]
    mixed = desk.rows(8, 4)

    def first_over(after: Callable[[int], object], then: Callable[[int], float]) -> float:
        extra = []
        for i in range(repeats):
            after(i)
            first, *rest = [then(i) for _ in range(4)]
            extra.append(first - statistics.median(rest))
        return statistics.median(extra) * 1e3

    def to_merged(k: int) -> float:
        return desk.step(desk.of[k][:8], k)

    def unmerged(_: int) -> float:
        return desk.step(mixed)

    def held(_: int) -> float:
        return to_merged(0)

    return {
        "a_to_b_ms": first_over(lambda i: [to_merged(i % 2) for _ in range(2)], lambda i: to_merged(1 - i % 2)),
        "unmerged_to_held_ms": first_over(lambda i: (held(i), unmerged(i)), held),
        "unmerge_ms": first_over(held, unmerged),
        "other_rows_ms": first_over(lambda i: desk.step(halves[i % 2], 0), lambda i: desk.step(halves[1 - i % 2], 0)),
    }


def iterations(runner: LoraRunner) -> dict[str, object]:
    """See the module."""
    decode: list[dict[str, float]] = []
    report: dict[str, object] = {"decode": decode, "source": "LiveReplica: decision, launch, device and booking, host clock"}
    repeats = 10 if GPU else 3
    for context in CONTEXTS:
        desk = Desk(runner, context, 1100)
        decode += decode_costs(desk, repeats)
        if context == CONTEXTS[1]:
            report["prompts"] = prompt_costs(desk, 3)
            report["changes"] = change_costs(desk, repeats)
        desk.replica.empty()
    return report


# ---- what a replica serves


def told_constants(constants: Constants) -> dict[str, float]:
    """For the report."""
    return {**asdict(constants), "t_m_over_t_u": constants.t_merged_s / constants.t_unmerged_s}


def measured(runner: LoraRunner) -> Constants:
    """t_m, t_u and c_sw of this runner."""
    return measure_constants(runner, ROWS, 20 if GPU else 2)


class Clock:
    """Seconds left of a part's time: runs that would begin after it are left out, and said to be."""

    def __init__(self, seconds: float) -> None:
        self._ends_s = time.perf_counter() + seconds
        self.left_out: list[str] = []

    def allows(self, name: str) -> bool:
        """Whether run `name` may begin."""
        if time.perf_counter() < self._ends_s:
            return True
        self.left_out.append(name)
        return False


def mean_output(requests: Sequence[tuple[Request, int]]) -> float:
    """Mean output tokens."""
    return statistics.fmean(r.output_tokens for r, _ in requests)


def one(
    runner: LoraRunner, constants: Constants, policy: str, requests: list[tuple[Request, int]], adapters: int = ADAPTERS
) -> tuple[dict[str, object], list[LoraSequence]]:
    """One run of one policy: its numbers, or the error."""
    before = runner.scheme.passes
    try:
        replica, served = run(runner, policy_of(policy, constants, adapters, min(adapters, runner.bank.capacity)), requests)
    except Exception as error:
        return {"error": repr(error)}, []
    print(f"  {policy}: {len(served)} requests, {max(s.finish_s for s in served):.1f} s", flush=True)
    return summary(replica, served, runner.scheme.passes - before), served


TRAFFIC = {"even": 1.0, "halving": 0.5}
"""Each of 8 adapters gets so many times the requests of the one before it: the most popular one has 12.5 or 50 %."""


def policies(runner: LoraRunner, seconds: float, seed: int = 0) -> dict[str, object]:
    """See the module: Poisson arrivals at 1.3 times what unmerged decode steps alone could serve, 64 tokens in, 64 out."""
    constants, clock = measured(runner), Clock(seconds)
    count, length = (300, 64) if GPU else (24, 8)
    rate_rps = 1.3 * ROWS / (constants.t_unmerged_s * length)
    points: list[dict[str, object]] = []
    for traffic, ratio in TRAFFIC.items():
        rng, shares = np.random.default_rng(seed), ratio ** np.arange(ADAPTERS)
        arrivals = rng.exponential(1 / rate_rps, count).cumsum()
        chosen = rng.choice(ADAPTERS, count, p=shares / shares.sum())
        requests = [(Request(i, float(arrivals[i]), length, length), int(chosen[i])) for i in range(count)]
        top = float(np.bincount(chosen).max() / count)
        for policy in POLICIES:
            if clock.allows(f"{traffic}, {policy}"):
                found, _ = one(runner, constants, policy, requests)
                points.append({"traffic": traffic, "policy": policy, "rate_rps": rate_rps, "top_share": top, **found})
    return {"constants": told_constants(constants), "points": points, "left_out": clock.left_out}


HELD_OUT: Mapping[str, object] = {"arrivals": "gamma", "cv": 1.5, "adapter_pattern": "zipf", "adapter_exponent": 1.4}
"""A skew and an arrival process that no other part uses; lengths too."""
HELD_OUT_RATES = (0.65, 0.9, 1.15)


def heldout(runner: LoraRunner, seconds: float, seed: int = 77) -> dict[str, object]:
    """See the module. Requests and their times are kept one by one."""
    constants, clock = measured(runner), Clock(seconds)
    lengths = {"mean_input_tokens": 220.0, "p50_input_tokens": 130.0, "max_input_tokens": 1000, "mean_output_tokens": 100.0,
               "p50_output_tokens": 70.0, "max_output_tokens": 400}  # fmt: skip
    told = {**HELD_OUT, **(lengths if GPU else {})}
    base_rps = capacity_rps(constants, mean_output(workload(10, 100, seed, told)))
    runs: list[dict[str, object]] = []
    for rate in HELD_OUT_RATES:
        requests = workload(rate * base_rps, 1.5 * WINDOW_S, seed, told)
        asked = [[r.arrival_s, r.input_tokens, r.output_tokens, k] for r, k in requests]
        mine: dict[str, object] = {"rate": rate, "rate_rps": rate * base_rps, "requests": asked, "policies": {}}
        runs.append(mine)
        for policy in POLICIES:
            if clock.allows(f"rate {rate}, {policy}"):
                found, served = one(runner, constants, policy, requests)
                times = {"first_token_s": [s.first_token_s for s in served], "finish_s": [s.finish_s for s in served]}
                mine["policies"][policy] = {**found, **times}  # type: ignore[index]
    return {
        "constants": told_constants(constants), "capacity_rps": base_rps, "batch": ROWS, "adapters": ADAPTERS,
        "slots": min(ADAPTERS, runner.bank.capacity), "kv_blocks": BLOCKS - BLOCKS // 20, "budget": BUDGET, "runs": runs,
        "left_out": clock.left_out,
    }  # fmt: skip


def adapters(runner: LoraRunner, seconds: float, seed: int = 5) -> dict[str, object]:
    """See the module: at 1.8 times the capacity, uniform popularity, so that all adapters are in use."""
    constants, clock = measured(runner), Clock(seconds)
    base_rps = capacity_rps(constants, mean_output(workload(10, 100, seed)))
    points: list[dict[str, object]] = []
    for count in (8, 128, 32, 16, 64) if GPU else (8, 16):
        requests = workload(1.8 * base_rps, WINDOW_S, seed, {"adapters": count})
        for policy in ("fcfs", "credit"):
            if clock.allows(f"{count} adapters, {policy}"):
                found, _ = one(runner, constants, policy, requests, count)
                points.append({"adapters": count, "policy": policy, **found})
    return {"constants": told_constants(constants), "points": points, "left_out": clock.left_out}
