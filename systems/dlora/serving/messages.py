"""What manager and replicas say to each other beside the messages that every engine knows (`systems.common.serve.messages`)."""

from __future__ import annotations

from dataclasses import dataclass

# ---- to a replica


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Let go of these requests after the iteration under way; `Withdrawn` answers."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Host:
    """Requests of these adapters will come: bring them in beside what runs, as far as slots reach."""

    adapters: tuple[str, ...]


# ---- from a replica


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Requests that were let go, with the seconds that each spent in executed iterations here.

    All their tokens have been reported before. One that was asked for and is missing had ended.
    """

    executed: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Spent:
    """The same seconds of requests that end with the report that follows."""

    executed: tuple[tuple[int, float], ...]
