"""When requests and adapters are moved, and between whom (sheet, 2.10). Pure: sees counts, gives a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from systems.common.errors import InputError

TYPES = ("round_robin", "proactive", "dlora", "none")
"""Migration types 1, 2 and 3 of the artifact; `none` dispatches to hosts by fresh counts and moves nothing."""
SCOPES = ("pair", "cluster")


@dataclass(frozen=True, slots=True)
class MigrationRules:
    """Constants of reactive migration.

    Attributes:
        interval_s: time between two looks.
        memory_share: of its KV blocks in use, from which a replica is full.
        load_excess: requests above the average, from which a replica is overloaded.
        limit_s: most seconds for the solver.
        scope: `pair` (the artifact: most and least loaded) or `cluster` (all replicas in one program).
        copy_kv: move KV blocks with their request instead of computing them again.
    """

    interval_s: float = 10.0
    memory_share: float = 0.9
    load_excess: float = 16.0
    limit_s: float = 10.0
    scope: str = "pair"
    copy_kv: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for a rule that means nothing."""
        for key in ("interval_s", "load_excess", "limit_s"):
            if not getattr(self, key) > 0:
                raise InputError("dlora", key, getattr(self, key), "give a number above 0")
        if not 0 < self.memory_share <= 1:
            raise InputError("dlora", "memory_share", self.memory_share, "give a share above 0, at most 1")
        if self.scope not in SCOPES:
            raise InputError("dlora", "scope", self.scope, f"use one of {', '.join(SCOPES)}")


def trigger(
    used_blocks: Sequence[int], blocks: Sequence[int], requests: Sequence[int], rules: MigrationRules
) -> tuple[int, int] | None:
    """The overloaded and the underloaded replica, or None: first by memory, then by load; the first among equals.

    Args:
        used_blocks: KV blocks in use per replica.
        blocks: KV blocks that it has.
        requests: unfinished requests per replica.
        rules: thresholds.
    """
    if len(requests) < 2:
        return None
    shares = [used / total for used, total in zip(used_blocks, blocks, strict=True)]
    fullest, emptiest = max(range(len(shares)), key=shares.__getitem__), min(range(len(shares)), key=shares.__getitem__)
    if shares[fullest] >= rules.memory_share > shares[emptiest]:
        return fullest, emptiest
    most, least = max(range(len(requests)), key=requests.__getitem__), min(range(len(requests)), key=requests.__getitem__)
    if requests[most] - sum(requests) / len(requests) >= rules.load_excess:
        return most, least
    return None
