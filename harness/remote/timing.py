"""How long to wait for a host, and how often to try."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """All in seconds."""

    connect_s: float = 10.0
    """For a TCP connection, for the server's greeting, and for the login, each."""
    attempts: int = 3
    """How often to try to connect; commands are never tried again."""
    backoff_s: float = 0.5
    """Before the second attempt; twice as long before each further one, and up to half as much again at random."""
    probe_s: float = 5.0
    """How often a connection is asked whether it lives."""
    silence_s: float = 15.0
    """How long it may take to answer that before it counts as lost."""

    def pause_s(self, attempt: int) -> float:
        """How long to wait after attempt number `attempt`, counted from 0."""
        return self.backoff_s * float(2**attempt) * random.uniform(1.0, 1.5)
