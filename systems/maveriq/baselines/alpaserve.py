"""AlpaServe's placement search (Li et al., OSDI '23) as the artifact calls it (sheet, 3): fp16, balanced pipelines, static.

All GPUs are cut into groups of one power of two; every group runs one (TP, PP) with TP x PP its size, and all its models share
that. For each size and factorisation replicas are added greedily: one at a time, the one that a fast simulator scores
best. The score is goodput - mean latency / 10^4 + replicas / 10^6: goodput decides, and among equals speed, and then copies.

The fast simulator sends a request to the group that can finish it first, refuses it when it would miss its SLO, and lets a
pipeline take the next request once its first stage is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from systems.maveriq.configuration import Configuration

Latency = Callable[[str, Configuration], float]
"""Seconds of one request on a configuration; infinite where it can't run."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the search is given: entry e is a model with a limit; requests are (arrival, entry), in order of arrival."""

    models: tuple[str, ...]
    slo_s: tuple[float, ...]
    requests: tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Groups:
    """A placement: `count` groups of TP x PP GPUs each; `hosts[e]` are the groups that hold a replica of entry e."""

    tp: int
    pp: int
    count: int
    hosts: tuple[tuple[int, ...], ...]

    @property
    def replicas(self) -> int:
        """All of them."""
        return sum(map(len, self.hosts))

    def gpus(self, group: int) -> tuple[int, ...]:
        """The GPUs of a group."""
        size = self.tp * self.pp
        return tuple(range(group * size, group * size + size))

    def having(self, entry: int, group: int) -> Groups:
        """With one more replica."""
        grown = tuple((*hosts, group) if place == entry else hosts for place, hosts in enumerate(self.hosts))
        return Groups(self.tp, self.pp, self.count, grown)


@dataclass(frozen=True, slots=True)
class Judged:
    """What the fast simulator says: the share of requests within their SLO, and the mean latency of those (seconds)."""

    goodput: float
    mean_latency_s: float
    missed: tuple[int, ...]

    def score(self, replicas: int) -> float:
        """What the search maximises."""
        return self.goodput - self.mean_latency_s / 1e4 + replicas / 1e6


@dataclass(frozen=True)
class AlpaServe:
    """The search. `memory_gib` is what a model takes of one GPU of a configuration, `free_gib` what a GPU has.

    `keep_all` restricts it to placements that host every entry: AlpaServe*.
    """

    latency_s: Latency
    memory_gib: Latency
    gpus: int = 8
    free_gib: float = 47.0
    keep_all: bool = False

    def place(self, job: Job) -> tuple[Groups, Judged] | None:
        """The best placement of `job` and what the simulator says of it; None where `keep_all` asks for what no one offers."""
        found = [self._grown(job, tp, pp) for tp, pp in factorisations(self.gpus)]
        kept = [one for one in found if not self.keep_all or all(one[0].hosts)]
        return max(kept, key=lambda one: one[1].score(one[0].replicas)) if kept else None

    def _grown(self, job: Job, tp: int, pp: int) -> tuple[Groups, Judged]:
        """Greedy: add the replica that helps most until none helps; AlpaServe* first gives everybody one."""
        groups = Groups(tp, pp, self.gpus // (tp * pp), tuple(() for _ in job.models))
        best = self.judge(job, groups)
        while options := list(self._options(job, groups, best)):
            judged = [(self.judge(job, option), option) for option in options]
            top, option = max(judged, key=lambda one: one[0].score(one[1].replicas))
            must = self.keep_all and not all(groups.hosts)
            if not must and top.score(option.replicas) <= best.score(groups.replicas):
                break
            groups, best = option, top
        return groups, best

    def _options(self, job: Job, groups: Groups, judged: Judged) -> Iterator[Groups]:
        """One more replica of the entries worth trying, in every group with room; equal groups are tried once.

        With many entries only those that miss most requests are tried, as in AlpaServe's fast heuristic.
        """
        one = Configuration(groups.tp, groups.pp)
        needs = {model: self.memory_gib(model, one) for model in set(job.models)}
        used = [0.0] * groups.count
        held = [list[int]() for _ in range(groups.count)]
        for entry, hosts in enumerate(groups.hosts):
            for group in hosts:
                used[group] += needs[job.models[entry]]
                held[group].append(entry)
        entries = [entry for entry in self._worth(job, groups, judged) if math.isfinite(self.latency_s(job.models[entry], one))]
        tried = 0
        for entry in entries:
            seen = set[tuple[int, ...]]()
            for group in sorted(range(groups.count), key=lambda group: used[group]):
                fits = used[group] + needs[job.models[entry]] <= self.free_gib
                if group not in groups.hosts[entry] and fits and tuple(held[group]) not in seen:
                    seen.add(tuple(held[group]))
                    yield groups.having(entry, group)
            tried += bool(seen)
            if len(job.models) > MANY and tried:
                return

    def _worth(self, job: Job, groups: Groups, judged: Judged) -> list[int]:
        entries = list(range(len(job.models)))
        if self.keep_all and not all(groups.hosts):
            entries = [entry for entry in entries if not groups.hosts[entry]]
        return sorted(entries, key=lambda entry: -judged.missed[entry]) if len(job.models) > MANY else entries

    def judge(self, job: Job, groups: Groups) -> Judged:
        """The fast simulator."""
        one = Configuration(groups.tp, groups.pp)
        stage_s = [
            self.latency_s(model, one) / groups.pp if math.isfinite(self.latency_s(model, one)) else 0.0 for model in job.models
        ]
        clocks = [[0.0] * groups.pp for _ in range(groups.count)]
        missed, good, total_s = [0] * len(job.models), 0, 0.0
        for arrival_s, entry in job.requests:
            taken = -1
            if hosts := groups.hosts[entry]:
                group = min(hosts, key=lambda group: clocks[group][0])
                times = _through(clocks[group], arrival_s, stage_s[entry])
                if times[-1] - arrival_s <= job.slo_s[entry]:
                    clocks[group], taken = times, group
                    total_s += times[-1] - arrival_s
                    good += 1
            missed[entry] += taken < 0
        return Judged(good / max(1, len(job.requests)), total_s / max(1, good), tuple(missed))


MANY = 6
"""With more entries than this the greedy step tries only the entry that misses most."""


def _through(clocks: Sequence[float], arrival_s: float, stage_s: float) -> list[float]:
    """When a request leaves each stage of a pipeline whose stages are free at `clocks`."""
    now, left = arrival_s, []
    for free_s in clocks:
        now = (now if now > free_s else free_s) + stage_s
        left.append(now)
    return left


def factorisations(gpus: int) -> Iterator[tuple[int, int]]:
    """Every (TP, PP) of powers of two whose product divides `gpus` into equal groups."""
    size = 1
    while size <= gpus:
        if gpus % size == 0:
            tp = 1
            while tp <= size:
                if size % tp == 0:
                    yield tp, size // tp
                tp *= 2
        size *= 2
