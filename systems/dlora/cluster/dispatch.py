"""Which replica a new request goes to (sheet, 2.9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

MERGED_RATIO = 0.6
"""Time of a merged batch over that of an unmerged one that the artifact reckons with."""


@dataclass(frozen=True, slots=True)
class View:
    """What the dispatcher knows of one replica: outstanding requests per adapter, and adapters hosted."""

    counts: Mapping[int, int]
    hosted: Set[int]


def load_cost(counts: Mapping[int, int], batch: int, merged_ratio: float = MERGED_RATIO) -> float:
    """Outstanding work in batches: full batches of one adapter run merged, what is left is mixed."""
    full = rest = 0
    for count in counts.values():
        full += count // batch
        rest += count % batch
    return merged_ratio * full + rest // batch


def choose(
    views: Sequence[View], adapter: int, batch: int, proactive_s: float | None = None, copies: Mapping[int, int] | None = None
) -> tuple[int, int | None]:
    """The cheapest replica for a request of `adapter`, the first among equals; and the idle adapter that makes room there.

    Args:
        views: per replica that may take it: of those alive, where `proactive_s` is not given the hosts of `adapter`.
        adapter: the request's.
        batch: largest batch.
        proactive_s: cost of loading an adapter; given, replicas qualify that do not host `adapter` but host one that is idle
            and has another copy (migration type 2). None: hosts only.
        copies: copies of each adapter, for that.

    Returns:
        Replica, and the adapter to be replaced there or None. Replica -1 when nobody can take it.
    """
    best, engine, victim = float("inf"), -1, None
    for index, view in enumerate(views):
        if adapter in view.hosted:
            cost, idle = load_cost(view.counts, batch), None
        elif proactive_s is not None and copies is not None:
            idle = next((k for k in sorted(view.hosted) if not view.counts.get(k) and copies.get(k, 0) > 1), None)
            if idle is None:
                continue
            cost = load_cost(view.counts, batch) + proactive_s
        else:
            continue
        if cost < best:
            best, engine, victim = cost, index, idle
    return engine, victim
