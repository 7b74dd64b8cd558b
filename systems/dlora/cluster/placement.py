"""Which adapters lie on which replica (sheet, 2.8).

The greedy keeps the *burst tolerance* from falling: the least, over adapters, of the serving capacity behind an adapter (free
memory of the replicas that host it) over its expected share of the load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from systems.common.errors import InputError

Hosts = list[set[int]]
"""Per replica, the adapters that it hosts."""


def burst_tolerance(hosts: Sequence[set[int]], free_bytes: Sequence[float], shares: Sequence[float]) -> float:
    """Least ratio of free memory behind an adapter to its share; infinite when nothing is placed."""
    capacity: dict[int, float] = {}
    for hosted, free in zip(hosts, free_bytes, strict=True):
        for adapter in hosted:
            capacity[adapter] = capacity.get(adapter, 0.0) + free
    return min((behind / shares[adapter] for adapter, behind in capacity.items() if shares[adapter] > 0), default=math.inf)


def fill(
    hosts: Sequence[set[int]],
    free_bytes: Sequence[float],
    shares: Sequence[float],
    adapter_bytes: float,
    slots: Sequence[int] | None = None,
) -> Hosts:
    """Add adapters to `hosts` greedily until nothing more can be added; unplaced ones first, and those whatever happens.

    Args:
        hosts: where adapters lie already.
        free_bytes: memory left per replica, their adapters deducted.
        shares: expected share of the load per adapter.
        adapter_bytes: size of one adapter.
        slots: most adapters per replica; None: as memory allows.

    Raises:
        InputError: an adapter finds no place at all.
    """
    placed, free = [set(hosted) for hosted in hosts], list(free_bytes)
    room = list(slots) if slots is not None else [len(shares)] * len(placed)
    copies = [sum(adapter in hosted for hosted in placed) for adapter in range(len(shares))]
    whole = sum(shares)
    while True:
        total = max(1, sum(copies))
        wanted = sorted(range(len(shares)), key=lambda k: (copies[k] > 0, copies[k] / total - shares[k] / whole, k))
        if not any(copies[k] < len(placed) and _add(k, placed, free, shares, adapter_bytes, room, copies) for k in wanted):
            break
    if 0 in copies:
        raise InputError("dlora", "adapters", len(shares), f"{copies.count(0)} of them find no slot: add replicas or memory")
    return placed


def _add(
    k: int, placed: Hosts, free: list[float], shares: Sequence[float], size: float, room: Sequence[int], copies: list[int]
) -> bool:
    """Place one more copy of `k` if the burst tolerance allows; whether it was placed."""
    engines = [e for e in range(len(placed)) if k not in placed[e] and len(placed[e]) < room[e] and free[e] >= size]
    engines.sort(key=lambda e: (len(placed[e]), e))
    if copies[k]:
        behind = {m: sum(free[e] for e in range(len(placed)) if m in placed[e]) for m in set().union(*placed)}
        least = burst_tolerance(placed, free, shares)
        # only adapters on the same replica lose by it, so only they can make the least ratio fall
        engines = [e for e in engines if all((behind[m] - size) >= least * shares[m] for m in placed[e])][:1]
    if not engines:
        return False
    placed[engines[0]].add(k)
    free[engines[0]] -= size
    copies[k] += 1
    return True


def replicate(hosts: Sequence[set[int]], adapters: int, rng: np.random.Generator | None = None) -> Hosts:
    """Extra copies up to G + M - 1 in all, which connects replicas and adapters.

    With `rng` one random adapter goes to every replica (migration type 3); without, adapters 0, 1, 2, ... get a second copy on
    successive replicas (types 1 and 2).
    """
    placed = [set(hosted) for hosted in hosts]
    if rng is not None:
        everywhere = int(rng.integers(adapters))
        return [hosted | {everywhere} for hosted in placed]
    for extra in range(len(placed) - 1):
        adapter = extra % adapters
        free = [(extra + step) % len(placed) for step in range(len(placed))]
        engine = next((e for e in free if adapter not in placed[e]), None)
        if engine is not None:
            placed[engine].add(adapter)
    return placed


def striped(adapters: int, engines: int) -> Hosts:
    """Adapter k on replica k // (M / G), fixed: the artifact's vLLM baseline."""
    per = -(-adapters // engines)
    return [set(range(e * per, min(adapters, (e + 1) * per))) for e in range(engines)]
