"""What the servers count, for `/metrics`: all replicas together, and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from systems.common.serve.messages import Family, Load
from systems.dlora.serving.control import Control


@dataclass(slots=True)
class Totals:
    """What the manager did since the start."""

    moved: int = 0
    deaths: int = 0
    solves: int = 0
    timeouts: int = 0
    solver_s: float = 0.0


def together(loads: Sequence[Load], control: Control, totals: Totals) -> Load:
    """The load of all replicas, whose own are `loads`, and what is counted for each and by the manager."""
    own = (
        _gauge("replicas_alive", "Replicas that serve.", sum(control.alive)),
        _gauge("requests_moving", "Requests asked back from their replica.", control.moving),
        _count("requests_moved", "Requests that moved to another replica.", totals.moved),
        _count("replica_deaths", "Replicas that ended.", totals.deaths),
        _count("solves", "Integer programs solved.", totals.solves),
        _count("solver_timeouts", "Integer programs without an answer in time.", totals.timeouts),
        _count("solver_seconds", "Time that answers took.", totals.solver_s),
        Family(
            "dlora_requests", "gauge", "Unfinished requests.", _by_label([control.outstanding(i) for i in range(len(loads))])
        ),
    )
    return Load(
        sum(load.waiting for load in loads), sum(load.running for load in loads),
        sum(load.blocks_used for load in loads), sum(load.preemptions for load in loads), (*own, *_side_by_side(loads)),
    )  # fmt: skip


def _by_label(values: Sequence[float]) -> dict[str, float]:
    return {_label(replica): value for replica, value in enumerate(values)}


def _label(replica: int) -> str:
    return f'{{replica="{replica}"}}'


def _gauge(name: str, about: str, value: float) -> Family:
    return Family(f"dlora_{name}", "gauge", about, {"": value})


def _count(name: str, about: str, value: float) -> Family:
    return Family(f"dlora_{name}_total", "counter", about, {"": value})


def _side_by_side(loads: Sequence[Load]) -> list[Family]:
    """What replicas count themselves."""
    found: dict[str, tuple[Family, dict[str, float]]] = {}
    for replica, load in enumerate(loads):
        for family in load.more:
            found.setdefault(family.name, (family, {}))[1][_label(replica)] = family.samples[""]
    return [Family(family.name, family.kind, family.about, samples) for family, samples in found.values()]
