"""A cluster of replicas on a virtual clock: arrivals, dispatch, migration, death.

Events are handled in order of time, ties by the order in which they were made, so a run is a function of its input. What
happens at a replica in mid-run waits for the iteration's end (`Replica.interrupt`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count

from systems.common.errors import InputError
from systems.dlora.cluster import ilp
from systems.dlora.cluster.dispatch import View, choose
from systems.dlora.cluster.migration import TYPES, MigrationRules, trigger
from systems.dlora.cluster.placement import Hosts
from systems.dlora.replica import Replica
from systems.dlora.requests import LoraSequence, Place

LOAD_S = 96.25 / (32 * 1024)
"""Cost of loading an adapter, as proactive dispatch adds it to a number of batches (seconds; the artifact's unit mismatch)."""


def solver_s(requests: int, replicas: int) -> float:
    """Seconds of a solve on one core, as benchmarks/dlora.py finds them: 0.04 s for 1,000 requests on two replicas."""
    return 0.03 * (replicas / 2) ** 2 + 1e-5 * requests


@dataclass(frozen=True, slots=True)
class ClusterRules:
    """How requests are dispatched and moved.

    Attributes:
        migration: one of `TYPES`.
        rules: of reactive migration.
        transfer_bytes_per_s: between replicas, for copied KV.
        block_bytes: of a KV block.
        solve_s: simulated time of a solve, from its requests and replicas; dispatch waits for it.
        execution_default_s: e_k before any request of an adapter has finished.
    """

    migration: str = "dlora"
    rules: MigrationRules = field(default_factory=MigrationRules)
    transfer_bytes_per_s: float = 25e9
    block_bytes: int = 8 * 2**20
    solve_s: Callable[[int, int], float] = solver_s
    execution_default_s: float = 5.0

    def __post_init__(self) -> None:
        """Raises InputError for an unknown type."""
        if self.migration not in TYPES:
            raise InputError("dlora", "migration", self.migration, f"use one of {', '.join(TYPES)}")


@dataclass(slots=True)
class Totals:
    """What the cluster did besides serving."""

    solves: int = 0
    solver_s: float = 0.0
    timeouts: int = 0
    moved: int = 0
    deaths: int = 0


class Cluster:
    """Replicas, the adapters that each hosts, and the requests under way.

    Attributes:
        hosts: per replica, the adapters that requests may be sent there for.
        totals: solves, moves, deaths.
    """

    def __init__(
        self, replicas: Sequence[Replica], hosts: Hosts, rules: ClusterRules | None = None, solver: ilp.Solver = ilp.solve
    ) -> None:
        """A replica may host more adapters than it has slots: they take turns. Raises InputError when there is no replica."""
        if not replicas:
            raise InputError("dlora", "replicas", 0, "give at least one")
        self.replicas, self.rules, self.solver = list(replicas), rules or ClusterRules(), solver
        self.hosts = [set(hosted) for hosted in hosts]
        assert len(self.hosts) == len(self.replicas)
        self.totals = Totals()
        self.alive = [True] * len(self.replicas)
        self.sequences: list[LoraSequence] = []
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._tick = count()
        self._versions = [0] * len(self.replicas)
        self._outbox: list[list[tuple[LoraSequence, int]]] = [[] for _ in self.replicas]
        self._moving: dict[int, int] = {}
        self._reported: list[Mapping[int, int]] = [{} for _ in self.replicas]
        self._locked_until_s = 0.0
        self._unfinished = 0

    def serve(self, sequences: Iterable[LoraSequence], deaths: Sequence[tuple[float, int]] = ()) -> list[LoraSequence]:
        """Serve `sequences`, sorted by arrival, to the end; `deaths` are (time, replica).

        Raises:
            InputError: an adapter is hosted nowhere; a request could never finish; all replicas are dead.
        """
        self.sequences = list(sequences)
        known = set().union(*self.hosts)
        for sequence in self.sequences:
            if sequence.adapter not in known:
                raise InputError("dlora", "adapter", sequence.adapter, "no replica hosts it: place it first")
        self._unfinished = len(self.sequences)
        for sequence in self.sequences:
            self._at(sequence.arrival_s, lambda now, mine=sequence: self._arrive(mine, now))  # type: ignore[misc]
        for at_s, engine in deaths:
            self._at(at_s, lambda now, mine=engine: self.kill(mine, now))  # type: ignore[misc]
        if self.rules.migration == "dlora" and self.sequences and len(self.replicas) > 1:
            self._at(self.sequences[0].arrival_s + self.rules.rules.interval_s, self._look)
        while self._heap and self._unfinished:
            now_s, _, act = heappop(self._heap)
            act(now_s)
        return self.sequences

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        heappush(self._heap, (at_s, next(self._tick), act))

    # ---- dispatch

    def _arrive(self, sequence: LoraSequence, now_s: float) -> None:
        if now_s < self._locked_until_s:
            self._at(self._locked_until_s, lambda now: self._arrive(sequence, now))
            return
        engine = self._route(sequence.adapter)
        self._submit(sequence, engine, now_s)

    def _route(self, adapter: int) -> int:
        """The replica for a request of `adapter`."""
        kind = self.rules.migration
        stale = kind == "round_robin"
        every = kind == "proactive"
        engines = [e for e, hosted in enumerate(self.hosts) if (every or adapter in hosted) and self.alive[e]]
        views = [View(self._reported[e] if stale else self.replicas[e].queue.outstanding, self.hosts[e]) for e in engines]
        batch = self.replicas[0].config.max_num_seqs
        if every:
            copies: dict[int, int] = {}
            for hosted in self.hosts:
                for k in hosted:
                    copies[k] = copies.get(k, 0) + 1
            place, victim = choose(views, adapter, batch, LOAD_S, copies)
            if victim is not None:
                self.hosts[engines[place]] = (self.hosts[engines[place]] - {victim}) | {adapter}
        else:
            place, _ = choose(views, adapter, batch)
        if place < 0:
            raise InputError("dlora", "adapter", adapter, "no replica that is alive hosts it")
        return engines[place]

    def _submit(self, sequence: LoraSequence, engine: int, now_s: float) -> None:
        replica = self.replicas[engine]
        replica.submit(sequence)
        if replica.run is None:
            self._begin(engine, now_s)
        else:
            self._schedule(engine, replica.interrupt(now_s))

    # ---- iterations

    def _begin(self, engine: int, now_s: float) -> None:
        if len(self.replicas[engine].queue):
            self._schedule(engine, self.replicas[engine].begin(now_s))

    def _schedule(self, engine: int, end_s: float) -> None:
        self._versions[engine] += 1
        version = self._versions[engine]
        self._at(end_s, lambda now: self._end(engine, version, now))

    def _end(self, engine: int, version: int, now_s: float) -> None:
        if version != self._versions[engine] or not self.alive[engine]:
            return
        replica = self.replicas[engine]
        self._unfinished -= len(replica.end())
        if self.rules.migration == "round_robin":
            self._reported[engine] = dict(replica.queue.outstanding)
        if self._outbox[engine]:
            self._send(engine, now_s)
        if replica.run is None:  # a request that came back at once has begun one
            self._begin(engine, now_s)

    # ---- migration

    def _look(self, now_s: float) -> None:
        """Every interval: is somebody overloaded?"""
        rules = self.rules.rules
        self._at(now_s + rules.interval_s, self._look)
        living = [e for e, alive in enumerate(self.alive) if alive]
        pools = [self.replicas[e].pool for e in living]
        total = [pool.config.num_gpu_blocks for pool in pools]
        used = [whole - pool.free_blocks for whole, pool in zip(total, pools, strict=True)]
        pair = trigger(used, total, [len(self.replicas[e].queue) for e in living], rules)
        if pair is None or self._moving or any(self._outbox):
            return
        engines = living if rules.scope == "cluster" else sorted(living[e] for e in pair)
        members = [s for e in engines for s in self.replicas[e].queue]
        took_s = self.rules.solve_s(len(members), len(engines))
        answer = self.solver(self._program(engines, members), rules.limit_s)
        self.totals.solves += 1
        self.totals.solver_s += took_s
        if answer is None:  # out of time: serving goes on as it was
            self.totals.timeouts += 1
            return
        self._locked_until_s = now_s + took_s
        moves = [(s, engines[j]) for s, j in zip(members, answer.engines, strict=True) if engines[j] != s.replica]
        hosted = {engines[j]: answer.hosted[j] for j in range(len(engines))}
        self._at(now_s + took_s, lambda now: self._apply(moves, hosted, now))

    def _program(self, engines: Sequence[int], members: Sequence[LoraSequence]) -> ilp.Program:
        places = {engine: j for j, engine in enumerate(engines)}
        config = self.replicas[0].config
        items = [ilp.Item(s.adapter, config.blocks(max(s.context, s.prompt_tokens)), places[s.replica]) for s in members]
        spent: dict[int, list[float]] = {}
        for adapter in {item.adapter for item in items}:
            known = [self.replicas[e].mean_execution_s(adapter, math.nan) for e in engines]
            spent[adapter] = [value for value in known if value == value]
        default = self.rules.execution_default_s
        times = {k: sum(values) / len(values) if values else default for k, values in spent.items()}
        elsewhere = set().union(*(self.hosts[e] for e in range(len(self.hosts)) if e not in places and self.alive[e]))
        mine = set().union(*(self.hosts[e] for e in engines))
        return ilp.Program(
            items,
            [frozenset(self.hosts[e]) for e in engines],
            [max(self.replicas[e].slots.capacity, len(self.hosts[e])) for e in engines],
            [self.replicas[e].config.num_gpu_blocks for e in engines],
            times,
            must_stay=frozenset(mine - elsewhere),
        )

    def _apply(self, moves: Sequence[tuple[LoraSequence, int]], hosted: Mapping[int, frozenset[int]], now_s: float) -> None:
        """New adapter sets, then the moves: each leaves its replica at the end of the iteration under way."""
        if not all(self.alive[e] for e in hosted):
            return
        for engine, adapters in hosted.items():
            kept = [k for k in sorted(self.hosts[engine]) if k not in adapters]
            room = max(0, self.replicas[engine].slots.capacity - len(adapters))
            self.hosts[engine] = set(adapters) | set(kept[:room])  # what has a slot anyway stays
        for sequence, target in moves:
            if not math.isfinite(sequence.finish_s):
                self._outbox[sequence.replica].append((sequence, target))
        for engine in range(len(self.replicas)):
            if self._outbox[engine]:
                if self.replicas[engine].run is None:
                    self._send(engine, now_s)
                    self._begin(engine, now_s)
                else:
                    self._schedule(engine, self.replicas[engine].interrupt(now_s))

    def _send(self, engine: int, now_s: float) -> None:
        """Moves leave `engine`, which is between two iterations."""
        moves, self._outbox[engine] = self._outbox[engine], []
        copy = self.rules.rules.copy_kv
        for sequence, target in moves:
            if math.isfinite(sequence.finish_s) or sequence.replica != engine:
                continue
            replica = self.replicas[engine]
            blocks = replica.config.blocks(sequence.context) if copy and sequence.place is not Place.WAITING else 0
            replica.withdraw(sequence, keep_cache=copy)
            sequence.replica = -1
            sequence.migrations += 1
            self.totals.moved += 1
            self._moving[sequence.index] = engine
            arrives_s = now_s + blocks * self.rules.block_bytes / self.rules.transfer_bytes_per_s
            self._at(arrives_s, lambda now, s=sequence, e=target: self._land(s, e, now))  # type: ignore[misc]

    def _land(self, sequence: LoraSequence, target: int, now_s: float) -> None:
        """A moved request arrives; where its new replica or its cache's source died on the way it is dispatched anew."""
        source = self._moving.pop(sequence.index)
        if not self.alive[source] or not self.alive[target]:
            sequence.forget_cache()
        if not self.alive[target] or sequence.adapter not in self.hosts[target]:
            target = self._route(sequence.adapter)
        self._submit(sequence, target, now_s)

    # ---- faults

    def kill(self, engine: int, now_s: float) -> None:
        """Replica `engine` dies: its requests go elsewhere, its lonely adapters get a new home.

        Raises:
            InputError: it was the last one.
        """
        if not self.alive[engine]:
            return
        self.alive[engine] = False
        living = [e for e, alive in enumerate(self.alive) if alive]
        if not living:
            raise InputError("dlora", "replicas", 0, "the last one died: start another")
        self.totals.deaths += 1
        orphans, self.hosts[engine] = self.hosts[engine], set()
        self._outbox[engine] = []
        for adapter in sorted(orphans - set().union(*self.hosts)):
            home = min(living, key=lambda e: (len(self.hosts[e]), e))
            self.hosts[home].add(adapter)  # more than it has slots for, if need be: they take turns
        for sequence in self.replicas[engine].lose():
            self._arrive(sequence, now_s)


def with_scope(rules: ClusterRules, scope: str) -> ClusterRules:
    """`rules` with the integer program over a pair of replicas or the whole cluster."""
    return replace(rules, rules=replace(rules.rules, scope=scope))
