"""One independent random stream per purpose, all from one seed.

Changing how lengths are drawn must not change when requests arrive, or two runs that should differ in one thing would
differ in two. So each purpose has a stream of its own, spawned from the seed by numpy's `SeedSequence`.
"""

from __future__ import annotations

import numpy as np

from systems.common.errors import InputError

PURPOSES: tuple[str, ...] = ("arrivals", "lengths", "adapters", "modulation", "prompts", "service", "training")
"""A purpose's position is its spawn key, so new ones go to the end: inserting one would change every workload."""


def stream(seed: int, purpose: str) -> np.random.Generator:
    """The random stream of `purpose` under `seed`: the same two give the same numbers on every machine.

    Raises InputError when `seed` is negative.
    """
    if seed < 0:
        raise InputError("workload", "seed", seed, "give a whole number that is not negative")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose),))))
