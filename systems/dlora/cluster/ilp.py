"""Co-migration as an integer program: requests and adapters of some replicas assigned anew (sheet, 2.10).

    min T
    x[i,j] >= 0, y[k,j] in {0, 1}, z[j] >= 0
    sum_j x[i,j] >= 1                                             every request somewhere
    n_k y[k,j] >= sum_{i of adapter k} x[i,j]                     its adapter is there
    sum_k y[k,j] <= slots[j]                                      LoRA memory
    sum_j y[k,j] >= 1 for each adapter that is hosted nowhere else
    z[j] >= (sum_i blocks_i x[i,j] - blocks[j]) / swap rate       KV overflow as swapping time
    T >= sum_i e_k(i) x[i,j] + move_s sum_{i not on j} x[i,j] + z[j]

As published but for the fourth line, without which an idle adapter could vanish from the cluster. With two replicas this is
the artifact's program; with all of them it is the one that the pairwise approach stands in for. Solved by HiGHS through
scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLASSES = 4
"""Sizes that an adapter's requests at one place are told apart by, when KV memory is short."""
MOVE_S = 0.05
"""Seconds that moving one request costs, as the artifact reckons."""


@dataclass(frozen=True, slots=True)
class Item:
    """A request: its adapter, the KV blocks that it needs, and where it is (an index into the program's replicas)."""

    adapter: int
    blocks: float
    engine: int


@dataclass(frozen=True, slots=True)
class Program:
    """The input of the integer program.

    Attributes:
        items: requests. `hosted`: adapters that each replica hosts now.
        slots: most adapters per replica. `blocks`: KV blocks per replica.
        execution_s: mean execution time of a request, per adapter.
        swap_blocks_per_s: KV blocks per second over the host link.
        must_stay: adapters hosted by none but these replicas.
        move_s: seconds per moved request.
    """

    items: Sequence[Item]
    hosted: Sequence[frozenset[int]]
    slots: Sequence[int]
    blocks: Sequence[int]
    execution_s: Mapping[int, float]
    swap_blocks_per_s: float = 4096.0
    must_stay: frozenset[int] = frozenset()
    move_s: float = MOVE_S


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the program answers: a replica per item, the adapters of each replica, and T."""

    engines: Sequence[int]
    hosted: Sequence[frozenset[int]]
    makespan_s: float


Solver = Callable[[Program, float], Assignment | None]


def makespan_s(program: Program, engines: Sequence[int]) -> float:
    """T of a given assignment."""
    loads, used = [0.0] * len(program.slots), [0.0] * len(program.slots)
    for item, engine in zip(program.items, engines, strict=True):
        loads[engine] += program.execution_s[item.adapter] + (program.move_s if engine != item.engine else 0.0)
        used[engine] += item.blocks
    over = [max(0.0, u - b) / program.swap_blocks_per_s for u, b in zip(used, program.blocks, strict=True)]
    return max(load + z for load, z in zip(loads, over, strict=True))


def grouped(program: Program, classes: int | None = CLASSES) -> dict[Item, list[int]]:
    """Requests that one variable stands for, with their mean size.

    x is continuous, so requests of one adapter, place and size need one variable only, without loss. Sizes matter only to
    z: where all KV would fit on any replica they are all one, else an adapter's requests at a place are cut into `classes`
    by size (None: every size by itself).
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for place, item in enumerate(program.items):
        alike.setdefault((item.adapter, item.engine), []).append(place)
    fits = sum(item.blocks for item in program.items) <= min(program.blocks)
    groups: dict[Item, list[int]] = {}
    for (adapter, engine), members in alike.items():
        members.sort(key=lambda place: program.items[place].blocks)
        sizes = [program.items[place].blocks for place in members]
        cuts = len(members) if classes is None and not fits else 1 if fits else min(classes or 1, len(members))
        for part in range(cuts):
            first, last = len(members) * part // cuts, len(members) * (part + 1) // cuts
            mean = sum(sizes[first:last]) / (last - first)
            groups.setdefault(Item(adapter, mean, engine), []).extend(members[first:last])
    return groups


def solve(program: Program, limit_s: float = 10.0, classes: int | None = CLASSES) -> Assignment | None:
    """Solve by HiGHS; None when no assignment was found within `limit_s` seconds, and serving goes on as it was.

    Whole requests are made of a group's shares afterwards, by largest remainder (the artifact takes each request's largest
    share).
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    groups = grouped(program, classes)
    kinds, engines = list(groups), len(program.slots)
    adapters = sorted({k for hosted in program.hosted for k in hosted} | {item.adapter for item in kinds})
    layout = _Layout(len(kinds), len(adapters), engines)
    rows = _rows(program, kinds, [len(groups[kind]) for kind in kinds], adapters, layout)
    cost = np.zeros(layout.size)
    cost[layout.makespan] = 1.0
    upper = np.full(layout.size, np.inf)
    upper[layout.y(0, 0) : layout.z(0)] = 1.0
    integral = np.zeros(layout.size)
    integral[layout.y(0, 0) : layout.z(0)] = 1
    found = milp(
        cost,
        integrality=integral,
        bounds=Bounds(np.zeros(layout.size), upper),
        constraints=LinearConstraint(rows.matrix(layout.size), rows.low, np.inf),
        options={"time_limit": limit_s, "mip_rel_gap": 0.01 if engines == 2 else 0.05},
    )
    if found.x is None:
        return None
    return _rounded(program, groups, kinds, adapters, layout, found.x)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each variable stands in the vector: x[g,j], then y[k,j], z[j], T."""

    kinds: int
    adapters: int
    engines: int

    def x(self, kind: int, engine: int) -> int:
        return kind * self.engines + engine

    def y(self, adapter: int, engine: int) -> int:
        return (self.kinds + adapter) * self.engines + engine

    def z(self, engine: int) -> int:
        return (self.kinds + self.adapters) * self.engines + engine

    @property
    def makespan(self) -> int:
        return (self.kinds + self.adapters + 1) * self.engines

    @property
    def size(self) -> int:
        return self.makespan + 1


class _Rows:
    """Constraints `sum of coefficients >= low`, collected as a sparse matrix."""

    def __init__(self) -> None:
        self.low: list[float] = []
        self._cells: tuple[list[int], list[int], list[float]] = ([], [], [])

    def add(self, coefficients: Sequence[tuple[int, float]], low: float) -> None:
        rows, columns, values = self._cells
        for column, value in coefficients:
            rows.append(len(self.low))
            columns.append(column)
            values.append(value)
        self.low.append(low)

    def matrix(self, size: int) -> Any:  # noqa: ANN401  scipy has no types
        from scipy.sparse import csr_matrix

        rows, columns, values = self._cells
        return csr_matrix((values, (rows, columns)), shape=(len(self.low), size))


def _rows(program: Program, kinds: Sequence[Item], sizes: Sequence[int], adapters: Sequence[int], at: _Layout) -> _Rows:
    rows, every = _Rows(), range(at.engines)
    of: dict[int, list[int]] = {}
    for kind, item in enumerate(kinds):
        of.setdefault(item.adapter, []).append(kind)
        rows.add([(at.x(kind, j), 1.0) for j in every], float(sizes[kind]))
    for place, adapter in enumerate(adapters):
        mine = of.get(adapter, [])
        count = float(sum(sizes[kind] for kind in mine))
        if mine:
            for j in every:
                rows.add([(at.y(place, j), count), *((at.x(kind, j), -1.0) for kind in mine)], 0.0)
        if adapter in program.must_stay:
            rows.add([(at.y(place, j), 1.0) for j in every], 1.0)
    for j in every:
        rows.add([(at.y(place, j), -1.0) for place in range(at.adapters)], -float(program.slots[j]))
        rate = program.swap_blocks_per_s
        rows.add(
            [(at.z(j), rate), *((at.x(kind, j), -float(item.blocks)) for kind, item in enumerate(kinds))],
            -float(program.blocks[j]),
        )
        times = [program.execution_s[item.adapter] + (program.move_s if item.engine != j else 0.0) for item in kinds]
        rows.add([(at.makespan, 1.0), (at.z(j), -1.0), *((at.x(kind, j), -time) for kind, time in enumerate(times))], 0.0)
    return rows


def _rounded(
    program: Program,
    groups: Mapping[Item, list[int]],
    kinds: Sequence[Item],
    adapters: Sequence[int],
    at: _Layout,
    x: Sequence[float],
) -> Assignment:
    """Whole requests: each group's shares by largest remainder, where its adapter is, staying ones first."""
    chosen = [item.engine for item in program.items]
    hosted = [frozenset(k for place, k in enumerate(adapters) if x[at.y(place, j)] > 0.5) for j in range(at.engines)]
    for kind, item in enumerate(kinds):
        members = groups[item]
        shares = [float(x[at.x(kind, j)]) if item.adapter in hosted[j] else 0.0 for j in range(at.engines)]
        counts = _whole(shares, len(members), item.engine)
        targets = [j for j in sorted(range(at.engines), key=lambda j: (j != item.engine, j)) for _ in range(counts[j])]
        for member, target in zip(members, targets, strict=True):
            chosen[member] = target
    return Assignment(chosen, hosted, makespan_s(program, chosen))


def _whole(shares: Sequence[float], count: int, home: int) -> list[int]:
    total = sum(shares)
    if total <= 0:
        return [count if j == home else 0 for j in range(len(shares))]
    exact = [share * count / total for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    order = sorted(range(len(shares)), key=lambda j: (counts[j] - exact[j], j != home, j))
    for j in order[: count - sum(counts)]:
        counts[j] += 1
    return counts
