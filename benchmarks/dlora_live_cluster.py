"""Several live replicas, a process and a device each, and the router that dispatches to them and moves requests between them.

The decisions are the simulator's own (`systems.dlora.cluster`: `dispatch.choose`, `migration.trigger`, `ilp.solve`,
`placement`); here requests, tokens and adapters really move. A moved request leaves between two iterations, its KV cache is
freed, and it is prefilled again (prompt and answer so far) where it goes. Messages are tuples over pipes:

    router -> replica  ("run", settings) ("submit", [Moved]) ("look",) ("give", [numbers]) ("end",) ("stop",)
    replica -> router  ("ready", facts) ("done", [Ended], counts) ("state", State) ("given", [Moved]) ("ended", numbers)
                       ("error", text)

All processes read the same monotonic clock, so times are seconds since the run began, everywhere.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from benchmarks import dlora_serving
from benchmarks.dlora_serving import BLOCKS, BUDGET, ROWS, Watched, measured, policy_of, serving_runner, told_constants
from systems.common.core import Request
from systems.common.models import model
from systems.common.torch_engine.weights import random_weights
from systems.dlora.cluster import ilp
from systems.dlora.cluster.dispatch import View, choose
from systems.dlora.cluster.migration import MigrationRules, trigger
from systems.dlora.cluster.placement import Hosts
from systems.dlora.cluster.simulated import LOAD_S
from systems.dlora.lora_engine.constants import Constants
from systems.dlora.lora_engine.runner import LoraRunner
from systems.dlora.policies import Policy
from systems.dlora.policies.static import OneAdapter
from systems.dlora.replica import engine_config
from systems.dlora.requests import LoraSequence

EXECUTION_S = 5.0
"""e_k before any request of an adapter has finished (the artifact's)."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A request on its way, with what has been generated of it. `tokens`: prompt and answer so far, None for a new one."""

    request: Request
    adapter: int
    generated: int = 0
    tokens: list[int] | None = None
    scheduled_s: float = math.nan
    first_token_s: float = math.nan
    executed_s: float = 0.0
    migrations: int = 0

    @classmethod
    def of(cls, sequence: LoraSequence, tokens: list[int]) -> Moved:
        """A request that has left a replica."""
        return cls(
            sequence.request, sequence.adapter, sequence.generated, tokens, sequence.scheduled_s, sequence.first_token_s,
            sequence.executed_s, sequence.migrations + 1,
        )  # fmt: skip

    def arrive(self) -> LoraSequence:
        """The same request as a replica queues it: all there is of it will be prefilled."""
        sequence = LoraSequence(self.request, self.adapter)
        sequence.generated, sequence.prompt_tokens = self.generated, self.request.input_tokens + self.generated
        sequence.scheduled_s, sequence.first_token_s = self.scheduled_s, self.first_token_s
        sequence.executed_s, sequence.migrations = self.executed_s, self.migrations
        return sequence


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has finished (`finish_s`), or what was there of it at the cut. `answer`: its tokens, where kept."""

    index: int
    replica: int
    first_token_s: float
    finish_s: float
    executed_s: float
    migrations: int
    answer: list[int] | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What the migration looks at: requests as (number, adapter, tokens in the cache or to prefill), KV blocks, e_k sums."""

    requests: list[tuple[int, int, int]]
    used_blocks: int
    blocks: int
    adapter_time: dict[int, tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Settings:
    """One run, as a replica sees it."""

    policy: str
    adapters: int
    slots: int
    hosted: tuple[int, ...]
    began_s: float
    keep_answers: bool = False


# ---- a replica's process


class Worker:
    """A replica in its own process. Ends when told to, or when the router is gone."""

    def __init__(self, pipe: Connection, index: int, runner: LoraRunner) -> None:
        self.pipe, self.index, self.runner = pipe, index, runner
        self.constants: Constants = measured(runner)
        self.replica: Watched | None = None
        self.settings: Settings | None = None
        self.before = (0, 0)
        self.reported: dict[int, int] = {}

    def work(self) -> None:
        """Until told to stop."""
        while True:
            busy = self.replica is not None and len(self.replica.queue) > 0
            if self.pipe.poll(0 if busy else None):
                message = self.pipe.recv()
                if message[0] == "stop":
                    return
                getattr(self, message[0])(*message[1:])
            elif self.replica is not None and self.settings is not None:
                self.iterate(self.replica, self.settings)

    def iterate(self, replica: Watched, settings: Settings) -> None:
        """One iteration; tell who has finished. A replica that fails says so, and lets its requests go."""
        try:
            replica.begin(replica.clock() - settings.began_s)
            done = replica.end()
        except Exception as error:
            replica.run = None
            replica.empty()
            self.pipe.send(("error", f"replica {self.index}: {error!r}\n{traceback.format_exc()}"))
            return
        ended = [self.ended(sequence, settings) for sequence in done]
        counts = {adapter: len(queue) for adapter, queue in replica.queue.by_adapter.items()}
        if ended or counts != self.reported:
            self.pipe.send(("done", ended, counts))
            self.reported = counts

    def ended(self, sequence: LoraSequence, settings: Settings) -> Ended:
        """For the router."""
        assert self.replica is not None
        answer = self.replica.answers.pop(sequence.index, None)
        return Ended(
            sequence.index, self.index, sequence.first_token_s, sequence.finish_s, sequence.executed_s, sequence.migrations,
            answer if settings.keep_answers else None,
        )  # fmt: skip

    def run(self, settings: Settings) -> None:
        """Begin a run: an idle replica, its adapters resident, nothing merged."""
        if self.replica is not None:
            self.replica.empty()
        names = list(self.runner.store.residents.outstanding)
        self.runner.store.fetch([names[k] for k in settings.hosted][: self.runner.bank.capacity])
        policy: Policy = OneAdapter(ROWS)
        if settings.policy != "one_adapter":
            policy = policy_of(settings.policy, self.constants, settings.adapters, settings.slots)
        self.settings, self.replica = settings, Watched(self.runner, policy, names, index=self.index)
        self.before, self.reported = (self.runner.scheme.passes, self.runner.store.loads), {}
        gc.collect()

    def submit(self, moved: Sequence[Moved]) -> None:
        """Requests arrive, new ones or from another replica."""
        assert self.replica is not None
        for one in moved:
            if one.tokens is not None:
                self.replica.tokens[one.request.index] = list(one.tokens)
            self.replica.submit(one.arrive())

    def look(self) -> None:
        """Say what is here."""
        assert self.replica is not None
        pool, queue = self.replica.pool, self.replica.queue
        blocks = pool.config.num_gpu_blocks
        requests = [(s.index, s.adapter, max(s.context, s.prompt_tokens)) for s in queue]
        self.pipe.send(("state", State(requests, blocks - pool.free_blocks, blocks, dict(self.replica.adapter_time))))

    def give(self, numbers: Sequence[int]) -> None:
        """Let go of requests, those that are still here."""
        assert self.replica is not None
        wanted, given = set(numbers), []
        for sequence in [s for s in self.replica.queue if s.index in wanted]:
            self.replica.withdraw(sequence)
            given.append(Moved.of(sequence, self.replica.tokens.pop(sequence.index)))
        self.pipe.send(("given", given))

    def end(self) -> None:
        """The run is over: its numbers; what is left of it goes."""
        assert self.replica is not None
        replica, (passes, loads) = self.replica, self.before
        left = [Ended(s.index, self.index, s.first_token_s, math.inf, s.executed_s, s.migrations) for s in replica.queue]
        replica.empty()
        numbers = {
            "iterations": replica.iterations, "busy_s": sum(one[-1] for one in replica.log), "kinds": replica.kinds(),
            "passes": self.runner.scheme.passes - passes, "loads": self.runner.store.loads - loads,
        }  # fmt: skip
        self.replica = None
        self.pipe.send(("ended", numbers, left))


def process(pipe: Connection, index: int, name: str, seed: int, slots: int, adapters: int) -> None:
    """Entry of a replica's process: build, say so, work. Every replica holds the same weights and the same adapters."""
    try:
        if not dlora_serving.GPU:
            torch.set_num_threads(1)
        device = "cuda" if dlora_serving.GPU else "cpu"
        shape = model(name)
        weights = random_weights(shape, seed, device)
        torch.manual_seed(seed)
        runner = serving_runner(shape, weights, slots, adapters, distinct=adapters)
        worker = Worker(pipe, index, runner)
        named = torch.cuda.get_device_name() if dlora_serving.GPU else "cpu"
        pipe.send(("ready", {"device": named, "constants": told_constants(worker.constants)}))
        worker.work()
    except EOFError:
        pass  # the router is gone
    except Exception as error:
        pipe.send(("error", f"replica {index}: {error!r}\n{traceback.format_exc()}"))


# ---- the router


@dataclass(slots=True)
class Record:
    """What became of a run.

    Attributes:
        ended: every request. unfinished: of them, those that the cut ended (finish: the cut).
        solver_s, moves: per migration, seconds in the solver; requests moved, seconds from the look to their arrival.
        replicas: numbers of each.
    """

    ended: dict[int, Ended] = field(default_factory=dict)
    unfinished: int = 0
    looks: int = 0
    solver_s: list[float] = field(default_factory=list)
    moves: list[tuple[int, float]] = field(default_factory=list)
    replicas: list[dict[str, Any]] = field(default_factory=list)
    duration_s: float = 0.0
    errors: list[str] = field(default_factory=list)


class LiveCluster:
    """Replicas and their router; a context manager that ends every process however it is left."""

    def __init__(self, name: str, replicas: int, adapters: int, slots: int, seed: int = 0) -> None:
        self.count, self.adapters, self.slots = replicas, adapters, slots
        self._how = name, seed
        self.pipes: list[Connection] = []
        self.facts: list[dict[str, Any]] = []
        self._processes: list[Any] = []
        self._outstanding: list[dict[int, int]] = []
        self._reported: list[Mapping[int, int]] = []
        self._adapter: dict[int, int] = {}

    def __enter__(self) -> LiveCluster:
        context = multiprocessing.get_context("spawn")
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = seen.split(",") if seen else [str(i) for i in range(self.count)]
        try:
            for index in range(self.count):
                ours, theirs = context.Pipe()
                if dlora_serving.GPU:
                    os.environ["CUDA_VISIBLE_DEVICES"] = devices[index]
                told = (theirs, index, *self._how, self.slots, self.adapters)
                started = context.Process(target=process, args=told, daemon=True)
                started.start()
                theirs.close()
                self.pipes.append(ours)
                self._processes.append(started)
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if seen is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = seen
        try:
            for pipe in self.pipes:
                self.facts.append(self._expect(pipe, "ready")[0])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(("stop",))
            except OSError:
                continue
        for started in self._processes:
            started.join(10)
            if started.is_alive():
                started.kill()
                started.join(10)

    @property
    def capacity(self) -> Constants:
        """The first replica's constants."""
        told = {key: value for key, value in self.facts[0]["constants"].items() if key != "t_m_over_t_u"}
        return Constants(**told)

    # ---- a run

    def serve(
        self, requests: Sequence[tuple[Request, int]], hosts: Hosts, policy: str, migration: str, rules: MigrationRules,
        cut_s: float, keep_answers: bool = False,
    ) -> Record:  # fmt: skip
        """Serve `requests` (sorted by arrival) as they come, until all have ended or `cut_s` seconds have passed."""
        self.hosts, self.record, self._adapter = [set(hosted) for hosted in hosts], Record(), {}
        self._outstanding = [{} for _ in self.pipes]
        self._reported = [{} for _ in self.pipes]
        began_s = time.perf_counter() + 0.05
        for pipe, hosted in zip(self.pipes, self.hosts, strict=True):
            settings = Settings(policy, self.adapters, self.slots, tuple(sorted(hosted)), began_s, keep_answers)
            pipe.send(("run", settings))
        try:
            ended_s = self._route_all(requests, migration, rules, began_s, cut_s)
            return self._end(ended_s)
        except BaseException:
            self._drain()
            raise

    def _route_all(
        self, requests: Sequence[tuple[Request, int]], migration: str, rules: MigrationRules, began_s: float, cut_s: float
    ) -> float:
        """Dispatch, listen, look, until all have ended; when that was, `cut_s` at the latest."""
        coming, next_look_s = 0, rules.interval_s if migration == "dlora" else math.inf
        while len(self.record.ended) < len(requests) and not self.record.errors:
            now_s = time.perf_counter() - began_s
            if now_s > cut_s:
                break
            while coming < len(requests) and requests[coming][0].arrival_s <= now_s:
                self._dispatch(*requests[coming], migration)
                coming += 1
            if now_s >= next_look_s:
                self._look(rules)
                next_look_s = max(next_look_s + rules.interval_s, time.perf_counter() - began_s)
            until_s = min(cut_s, next_look_s, requests[coming][0].arrival_s if coming < len(requests) else math.inf)
            self._listen(max(0.0, until_s - (time.perf_counter() - began_s)))
        return min(cut_s, time.perf_counter() - began_s)

    def _listen(self, seconds: float) -> None:
        ready = wait(self.pipes, seconds)
        for engine, pipe in enumerate(self.pipes):
            if pipe in ready:
                self._heard(engine, pipe.recv())

    def _heard(self, engine: int, message: tuple[Any, ...]) -> None:
        """A message that may come at any time."""
        if message[0] == "error":
            self.record.errors.append(message[1])
            return
        assert message[0] == "done", message[0]
        counts = self._outstanding[engine]
        for ended in message[1]:
            adapter = self._adapter[ended.index]
            counts[adapter] -= 1
            self.record.ended[ended.index] = ended
        self._reported[engine] = message[2]

    def _expect(self, pipe: Connection, kind: str) -> tuple[Any, ...]:
        """The next message of `kind`; what else comes is heard."""
        while True:
            message = pipe.recv()
            if message[0] == kind:
                return tuple(message[1:])
            if message[0] == "error":
                raise RuntimeError(message[1])
            self._heard(self.pipes.index(pipe), message)

    # ---- dispatch

    def _dispatch(self, request: Request, adapter: int, migration: str) -> None:
        """As `Cluster._route`: by what the replicas last reported (round robin), else by what is outstanding now."""
        stale, every = migration == "round_robin", migration == "proactive"
        views = [View((self._reported if stale else self._outstanding)[e], self.hosts[e]) for e in range(self.count)]
        if every:
            copies: dict[int, int] = {}
            for hosted in self.hosts:
                for k in hosted:
                    copies[k] = copies.get(k, 0) + 1
            engine, victim = choose(views, adapter, ROWS, LOAD_S, copies)
            if victim is not None:
                self.hosts[engine] = (self.hosts[engine] - {victim}) | {adapter}
        else:
            engine, _ = choose(views, adapter, ROWS)
        assert engine >= 0, f"no replica hosts adapter {adapter}"
        self._adapter[request.index] = adapter
        self._send(engine, [Moved(request, adapter)])

    def _send(self, engine: int, moved: Sequence[Moved]) -> None:
        counts = self._outstanding[engine]
        for one in moved:
            counts[one.adapter] = counts.get(one.adapter, 0) + 1
        self.pipes[engine].send(("submit", list(moved)))

    # ---- migration

    def _look(self, rules: MigrationRules) -> None:
        """Is somebody overloaded? Then solve and move; dispatch waits meanwhile, as in the artifact."""
        began_s = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(("look",))
        states: list[State] = [self._expect(pipe, "state")[0] for pipe in self.pipes]
        self.record.looks += 1
        pair = trigger(
            [s.used_blocks for s in states], [s.blocks for s in states], [len(s.requests) for s in states], rules
        )  # fmt: skip
        if pair is None:
            return
        engines = list(range(self.count)) if rules.scope == "cluster" else sorted(pair)
        program, members = self._program(engines, states)
        solving_s = time.perf_counter()
        answer = ilp.solve(program, rules.limit_s)
        self.record.solver_s.append(time.perf_counter() - solving_s)
        if answer is None:
            return
        self._move(engines, members, program, answer)
        self.record.moves[-1] = self.record.moves[-1][0], time.perf_counter() - began_s

    def _program(self, engines: Sequence[int], states: Sequence[State]) -> tuple[ilp.Program, list[int]]:
        """As `Cluster._program`; and the requests' numbers, in the items' order."""
        config = engine_config(BLOCKS, ROWS, BUDGET)
        items, members = [], []
        for j, engine in enumerate(engines):
            for index, adapter, tokens in states[engine].requests:
                items.append(ilp.Item(adapter, config.blocks(tokens), j))
                members.append(index)
        times = {}
        for adapter in {item.adapter for item in items}:
            known = [s / n for e in engines if (s_n := states[e].adapter_time.get(adapter)) for s, n in [s_n] if n]
            times[adapter] = sum(known) / len(known) if known else EXECUTION_S
        elsewhere = set().union(*(self.hosts[e] for e in range(self.count) if e not in engines))
        mine = set().union(*(self.hosts[e] for e in engines))
        program = ilp.Program(
            items, [frozenset(self.hosts[e]) for e in engines], [max(self.slots, len(self.hosts[e])) for e in engines],
            [states[e].blocks for e in engines], times, must_stay=frozenset(mine - elsewhere),
        )  # fmt: skip
        return program, members

    def _move(self, engines: Sequence[int], members: Sequence[int], program: ilp.Program, answer: ilp.Assignment) -> None:
        """New adapter sets, then requests: out of each source between two of its iterations, into their target's queue."""
        for j, engine in enumerate(engines):
            kept = [k for k in sorted(self.hosts[engine]) if k not in answer.hosted[j]]
            room = max(0, self.slots - len(answer.hosted[j]))
            self.hosts[engine] = set(answer.hosted[j]) | set(kept[:room])
        wanted: dict[int, dict[int, int]] = {}
        for index, item, target in zip(members, program.items, answer.engines, strict=True):
            if target != item.engine:
                wanted.setdefault(engines[item.engine], {})[index] = engines[target]
        moved = 0
        for source, targets in wanted.items():
            self.pipes[source].send(("give", list(targets)))
            given: list[Moved] = self._expect(self.pipes[source], "given")[0]
            for one in given:
                self._outstanding[source][one.adapter] -= 1
                self._send(targets[one.request.index], [one])
            moved += len(given)
        self.record.moves.append((moved, 0.0))

    # ---- the end

    def _drain(self) -> None:
        """A run has failed: end it everywhere, and pass over what was under way."""
        for pipe in self.pipes:
            try:
                pipe.send(("end",))
                while pipe.recv()[0] != "ended":
                    continue
            except (OSError, EOFError):
                continue

    def _end(self, ended_s: float) -> Record:
        """Numbers of the replicas; requests that the cut ended count as if they had finished then."""
        record, last_s = self.record, 0.0
        for pipe in self.pipes:
            pipe.send(("end",))
        for engine, pipe in enumerate(self.pipes):
            numbers, left = self._expect(pipe, "ended")
            record.replicas.append({"replica": engine, **numbers})
            for one in left:
                first = one.first_token_s if one.first_token_s == one.first_token_s else ended_s
                record.ended[one.index] = Ended(one.index, engine, first, ended_s, one.executed_s, one.migrations)
                record.unfinished += 1
        last_s = max((one.finish_s for one in record.ended.values()), default=ended_s)
        record.duration_s = last_s
        return record
