"""What the manager knows of requests and replicas, and what it decides: who serves a request, who moves. Pure.

The decisions are the simulator's (`cluster`: dispatch, trigger, integer program); this is the bookkeeping around them for
replicas that run for real. Nothing here reads a clock or speaks to anybody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from systems.common.serve.messages import Job
from systems.dlora.cluster import ilp
from systems.dlora.cluster.dispatch import View, choose
from systems.dlora.cluster.migration import MigrationRules, trigger
from systems.dlora.cluster.placement import Hosts
from systems.dlora.sizes import HOST_LINK

BASE = -1
"""The base model's number among the adapters; every replica hosts it."""
EXECUTION_S = 5.0
"""Seconds that a request is reckoned to take before one of its adapter has ended, as in the artifact."""

LOAD_S = 100_925_440 / HOST_LINK
"""Seconds to load an adapter (of Llama-2-7B), which proactive dispatch adds to a number of batches: it breaks ties."""


@dataclass(slots=True, eq=False)
class Order:
    """A request: what was asked, what it has got so far, who serves it, and where it is about to move."""

    job: Job
    adapter: int
    replica: int = -1
    target: int | None = None
    tokens: list[int] = field(default_factory=list)
    executed_s: float = 0.0

    def rest(self) -> Job:
        """What is left of it: a job whose prompt ends with what it has got.

        The draw of a token depends on seed and position alone, so whoever goes on with it goes on with the same tokens.
        """
        if not (count := len(self.tokens)):
            return self.job
        prompt = np.concatenate([self.job.prompt, np.array(self.tokens, np.int64)])
        most, least = self.job.max_tokens - count, max(0, self.job.min_tokens - count)
        return replace(self.job, prompt=prompt, max_tokens=most, min_tokens=least)


@dataclass(frozen=True, slots=True)
class Question:
    """Which requests should be where: the program, the replicas that it is about, and the requests behind its items."""

    engines: Sequence[int]
    indices: Sequence[int]
    program: ilp.Program


class Control:
    """See the module.

    Attributes:
        orders: unfinished requests, by index.
        alive: per replica. hosts: per replica, the adapters that requests may be sent there for (the base model left out).
        numbers: of adapters, by name; one that was unloaded keeps its number.
        moving: requests that have been asked back from their replica.
    """

    def __init__(
        self, adapters: Sequence[str], hosts: Hosts, slots: int, batch: int, kind: str, rules: MigrationRules | None = None
    ) -> None:
        """`slots`: adapters per GPU. `batch`: largest batch. `kind`: one of `migration.TYPES`."""
        self.kind, self.rules = kind, rules or MigrationRules()
        self.numbers = {name: number for number, name in enumerate(adapters)}
        self.hosts = [set(hosted) for hosted in hosts]
        self.alive = [True] * len(hosts)
        self.orders: dict[int, Order] = {}
        self.moving = 0
        self._slots, self._batch = slots, batch
        self._counts: list[Counter[int]] = [Counter() for _ in hosts]
        self._reported: list[Mapping[int, int]] = [{} for _ in hosts]
        self._executed: dict[int, tuple[float, int]] = {}

    # ---- requests

    def outstanding(self, replica: int) -> int:
        """Unfinished requests of a replica."""
        return self._counts[replica].total()

    def take(self, job: Job) -> Order:
        """A new request, at the replica that should serve it."""
        adapter = BASE if job.adapter is None else self.numbers[job.adapter]
        order = self.orders[job.index] = Order(job, adapter)
        self.assign(order, self.route(adapter))
        return order

    def assign(self, order: Order, replica: int) -> None:
        """`replica` serves `order` from now on."""
        self._leave(order)
        order.replica = replica
        self._counts[replica][order.adapter] += 1

    def drop(self, index: int) -> Order | None:
        """A request is over, or its client has gone; None where it is not known any more."""
        order = self.orders.pop(index, None)
        if order is not None:
            self._leave(order)
        return order

    def finished(self, order: Order) -> None:
        """It ran to its end: it tells how long such requests run."""
        self.drop(order.job.index)
        spent, count = self._executed.get(order.adapter, (0.0, 0))
        self._executed[order.adapter] = (spent + order.executed_s, count + 1)

    def _leave(self, order: Order) -> None:
        if order.replica >= 0:
            self._counts[order.replica][order.adapter] -= 1
        if order.target is not None:
            order.target, self.moving = None, self.moving - 1

    # ---- dispatch

    def reported(self, replica: int) -> None:
        """`replica` has told of an iteration: what it has now is what `round_robin` knows of it until it tells again."""
        if self.kind == "round_robin":
            self._reported[replica] = dict(self._counts[replica])

    def route(self, adapter: int) -> int:
        """The replica for a request of `adapter`; `proactive` may have it host the adapter from now on."""
        proactive = self.kind == "proactive" and adapter != BASE
        engines = [r for r, lives in enumerate(self.alive) if lives and (proactive or adapter in (BASE, *self.hosts[r]))]
        counts = self._reported if self.kind == "round_robin" else self._counts
        views = [View(counts[r], {BASE} if adapter == BASE else self.hosts[r]) for r in engines]
        copies = Counter(k for r, lives in enumerate(self.alive) if lives for k in self.hosts[r]) if proactive else None
        place, victim = choose(views, adapter, self._batch, LOAD_S if proactive else None, copies)
        assert place >= 0, "every adapter has a home while a replica lives"
        chosen = engines[place]
        if victim is not None:
            self.hosts[chosen] = (self.hosts[chosen] - {victim}) | {adapter}
        return chosen

    # ---- adapters

    def add(self, name: str) -> int:
        """A new adapter's home: the replica with the fewest."""
        number = self.numbers.setdefault(name, len(self.numbers))
        home = self._roomiest()
        self.hosts[home].add(number)
        return home

    def remove(self, name: str) -> None:
        """Nobody hosts the adapter any more."""
        for hosted in self.hosts:
            hosted.discard(self.numbers[name])

    def names(self, replica: int) -> list[str]:
        """Adapters that a replica hosts."""
        return [name for name, number in self.numbers.items() if number in self.hosts[replica]]

    def _roomiest(self) -> int:
        living = [replica for replica, alive in enumerate(self.alive) if alive]
        return min(living, key=lambda replica: (len(self.hosts[replica]), replica))

    # ---- migration

    def question(self, used_blocks: Sequence[int], blocks: Sequence[int], block_tokens: int = 16) -> Question | None:
        """What to solve, where somebody is overloaded (sheet, 2.10); None while requests still move, too.

        Args:
            used_blocks: KV blocks in use per replica.
            blocks: KV blocks that it has.
            block_tokens: tokens of a block.
        """
        living = [replica for replica, alive in enumerate(self.alive) if alive]
        counts = [self.outstanding(replica) for replica in living]
        pair = trigger([used_blocks[r] for r in living], [blocks[r] for r in living], counts, self.rules)
        if pair is None or self.moving:
            return None
        engines = living if self.rules.scope == "cluster" else sorted(living[place] for place in pair)
        members = [order for order in self.orders.values() if order.replica in engines]
        items = [ilp.Item(o.adapter, self._blocks(o, block_tokens), engines.index(o.replica)) for o in members]
        elsewhere = set().union(*(self.hosts[r] for r in living if r not in engines))
        mine = set().union(*(self.hosts[r] for r in engines))
        base = {BASE} & {item.adapter for item in items}
        program = ilp.Program(
            items,
            [frozenset(self.hosts[r] | base) for r in engines],
            [max(self._slots, len(self.hosts[r])) + len(base) for r in engines],  # the base model takes no slot
            [blocks[r] for r in engines],
            {item.adapter: self.execution_s(item.adapter) for item in items},
            must_stay=frozenset(mine - elsewhere),
        )
        return Question(engines, [order.job.index for order in members], program)

    def execution_s(self, adapter: int) -> float:
        """Mean seconds in executed iterations of requests of `adapter` that have ended (e_k)."""
        spent, count = self._executed.get(adapter, (0.0, 0))
        return spent / count if count else EXECUTION_S

    def answer(self, question: Question, found: ilp.Assignment) -> dict[int, list[int]]:
        """Take the answer over: adapters where it puts them, and the requests that must be asked back, by replica.

        Requests that ended or went elsewhere meanwhile are left alone, and so is everything where a replica died.
        """
        if not all(self.alive[replica] for replica in question.engines):
            return {}
        for replica, adapters in zip(question.engines, found.hosted, strict=True):
            wanted = set(adapters) - {BASE}
            kept = [k for k in sorted(self.hosts[replica]) if k not in wanted]
            self.hosts[replica] = wanted | set(kept[: max(0, self._slots - len(wanted))])  # what has a slot anyway stays
        leaving: dict[int, list[int]] = {}
        for index, place, item in zip(question.indices, found.engines, question.program.items, strict=True):
            source, target = question.engines[item.engine], question.engines[place]
            if (order := self.orders.get(index)) is None or source == target or order.replica != source:
                continue
            order.target, self.moving = target, self.moving + 1
            leaving.setdefault(source, []).append(index)
        return leaving

    def destination(self, order: Order) -> int:
        """Where a request goes that has left its replica: where it was to go, if that one lives and hosts it still."""
        target = order.target
        if target is not None and self.alive[target] and (order.adapter == BASE or order.adapter in self.hosts[target]):
            return target
        return self.route(order.adapter)

    @staticmethod
    def _blocks(order: Order, block_tokens: int) -> int:
        return -(-(len(order.job.prompt) + len(order.tokens)) // block_tokens)

    # ---- faults

    def died(self, replica: int) -> list[Order]:
        """A replica is gone: its requests, first come first, which must go elsewhere; adapters of its own have a new home.

        Where it was the last one nothing is left to decide.
        """
        self.alive[replica] = False
        orphans, self.hosts[replica] = self.hosts[replica], set()
        if not any(self.alive):
            return []
        for adapter in sorted(orphans - set().union(*self.hosts)):
            self.hosts[self._roomiest()].add(adapter)  # more than it has slots for, if need be: they take turns
        return sorted((o for o in self.orders.values() if o.replica == replica), key=lambda order: order.job.index)
