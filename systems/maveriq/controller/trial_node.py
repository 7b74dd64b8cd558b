"""The nodes that `trial` plays on: GPUs, the models that come to them, and how much room each finds.

Layouts are not given but decided, by the same search as always: a model finds the node as other tenants would have left it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from systems.maveriq.configuration import Configuration
from systems.maveriq.controller.memory import Budgets
from systems.maveriq.search import Search, Wish

H200_GIB, IDLE_GIB = 139.8, 0.6
VIRTUAL, VIRTUAL_GIB = 4, 34.9
FIRST_STAGE = 0.625
"""Share of the layers that the first stage of an uneven pipeline of two gets: 20 of 32."""

Room = Callable[[Search, Wish], tuple[float, ...]]
"""GiB that a model finds free on each GPU."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A model that comes: its name on the node, what is wished for it, and the room that it finds (None: all there is)."""

    name: str
    wish: Wish
    room: Room | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """GPUs (`devices[i]` is the real one behind GPU i; none on a CPU), and who comes to them."""

    total_gib: tuple[float, ...]
    devices: tuple[int, ...]
    tenants: tuple[Tenant, ...]

    def budgets(self) -> Budgets:
        """Its books, empty."""
        return Budgets(self.total_gib, (IDLE_GIB,) * len(self.total_gib), self.devices)


def one_gpu(models: Sequence[str], tokens: int) -> Node:
    """Four virtual GPUs on one device, a model on each: dense, what costs least GPU time, what takes least memory."""
    first, second = models[0], models[1 % len(models)]
    wishes = (
        Wish(first, "min_gpu_cost", fp16_only=True, output_length=tokens, strategy="none"),
        Wish(second, "min_gpu_cost", output_length=tokens, strategy="none"),
        Wish(first, "min_mem", output_length=tokens, strategy="none"),
    )
    names = ("dense", "cheap", "small")
    tenants = tuple(Tenant(name, wish) for name, wish in zip(names, wishes, strict=True))
    return Node((VIRTUAL_GIB,) * VIRTUAL, (0,) * VIRTUAL, tenants)


def two_gpus(models: Sequence[str], tokens: int) -> Node:
    """Two GPUs: one model over an uneven pipeline, one split over both, one on a single GPU."""
    first, second = models[0], models[1 % len(models)]
    dense = Wish(first, "min_lat", fp16_only=True, output_length=tokens, strategy="none")
    tenants = (
        Tenant("pipeline", dense, _fragments),
        Tenant("tensor", replace(dense, model=second), _halves),
        Tenant("small", Wish(first, "min_mem", output_length=tokens, strategy="none")),
    )
    return Node((H200_GIB, H200_GIB), (0, 1), tenants)


def _fragments(search: Search, wish: Wish) -> tuple[float, ...]:
    """Two fragments, neither with room for the whole model: one takes 20 of 32 layers, one the other 12."""
    layers = search.facts[wish.model].layers
    per_layer = _gib(search, wish, Configuration(1, 2)) / layers
    first = round(FIRST_STAGE * layers)
    return (first + 0.4) * per_layer, (layers - first + 0.4) * per_layer


def _halves(search: Search, wish: Wish) -> tuple[float, ...]:
    """Room for half of the model on each GPU, and not for all of it on one."""
    return (0.56 * _gib(search, wish, Configuration(2, 1)),) * 2


def _gib(search: Search, wish: Wish, configuration: Configuration) -> float:
    return search.estimator.estimate(wish.model, configuration, batch=wish.batch, output_length=wish.output_length).memory_gib


NODES: Mapping[int, Callable[[Sequence[str], int], Node]] = {1: one_gpu, 2: two_gpus}
