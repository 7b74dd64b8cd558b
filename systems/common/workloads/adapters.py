"""Which LoRA adapter each request names: `adapter-0`, `adapter-1`, ...

| pattern | choice | used by |
| --- | --- | --- |
| `round-robin` | request i takes adapter i mod n | LLMStation Figure 13, uniform (and skewed: n = 2, artifact) |
| `uniform` | independent, all equally likely | LLMStation Figure 13, as the paper words it |
| `zipf` | independent, adapter k with weight 1 / (k + 1)^exponent | skew in general |
"""

from __future__ import annotations

import numpy as np

from systems.common.errors import InputError

PATTERNS = ("round-robin", "uniform", "zipf")


def assign(rng: np.random.Generator, requests: int, adapters: int, pattern: str, exponent: float = 1.0) -> tuple[str, ...]:
    """The adapter of each of `requests` requests.

    Raises InputError for a pattern that does not exist or a number of adapters below 1.
    """
    if adapters < 1:
        raise InputError("workload", "adapters", adapters, "give at least 1, or leave the key out for the base model")
    if pattern == "round-robin":
        chosen = np.arange(requests) % adapters
    elif pattern == "uniform":
        chosen = rng.integers(0, adapters, size=requests)
    elif pattern == "zipf":
        weights = (1.0 + np.arange(adapters)) ** -exponent
        chosen = np.searchsorted(np.cumsum(weights / weights.sum())[:-1], rng.random(requests), side="right")
    else:
        raise InputError("workload", "adapter_pattern", pattern, f"use one of {', '.join(PATTERNS)}")
    names = [f"adapter-{k}" for k in range(adapters)]
    return tuple(names[k] for k in chosen.tolist())
