"""What a user may want: the four cost functions of the search (2.7). Each takes arrays over configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from systems.maveriq.configuration import Floats

Cost = Callable[[Floats, Floats, Floats], Floats]
"""From estimated latency (s), memory of all GPUs (GiB) and number of GPUs to what is minimised."""


def min_cost(latency_s: Floats, memory_gib: Floats, _gpus: Floats) -> Floats:
    """GiB x s: what a request costs where memory is paid by time. The default."""
    return latency_s * memory_gib


def min_lat(latency_s: Floats, _memory_gib: Floats, _gpus: Floats) -> Floats:
    """Seconds of one whole request."""
    return latency_s


def min_mem(_latency_s: Floats, memory_gib: Floats, _gpus: Floats) -> Floats:
    """GiB over all GPUs."""
    return memory_gib


def min_gpu_cost(latency_s: Floats, _memory_gib: Floats, gpus: Floats) -> Floats:
    """GPU x s of one request."""
    return latency_s * gpus


INTENTS: Mapping[str, Cost] = {"min_cost": min_cost, "min_lat": min_lat, "min_mem": min_mem, "min_gpu_cost": min_gpu_cost}
