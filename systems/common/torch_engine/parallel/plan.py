"""A plan: calls to the device half as one int64 array, so that every rank makes the same calls in the same order.

call = number of the function, number of arguments, per argument its length (-1: a plain number), the arguments
plan = calls one after the other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from systems.common.torch_engine.device import Device
from systems.common.torch_engine.mixed import Bucket

Ints = NDArray[np.int64]
CALLS = ("rows", "grow", "tables", "decode", "mixed", "warm", "score", "sums")


def encode(name: str, *arguments: int | Ints) -> Ints:
    """One call."""
    lengths = [-1 if isinstance(a, int) else len(a) for a in arguments]
    head = np.array([CALLS.index(name), len(arguments), *lengths], np.int64)
    return np.concatenate([head, *(np.array([a], np.int64) if isinstance(a, int) else a for a in arguments)])


def decode(plan: Ints) -> Iterator[tuple[str, list[int | Ints]]]:
    """The calls of a plan."""
    at = 0
    while at < len(plan):
        name, count = CALLS[plan[at]], int(plan[at + 1])
        lengths, at = plan[at + 2 : at + 2 + count].tolist(), at + 2 + count
        arguments: list[int | Ints] = []
        for length in lengths:
            arguments.append(int(plan[at]) if length < 0 else plan[at : at + length])
            at += abs(length)
        yield name, arguments


def perform(half: Device, name: str, arguments: list[int | Ints]) -> Tensor | None:
    """Make one call of a plan."""
    if name == "mixed":
        packed, bucket, chunks, greedy, adapted, wants = arguments
        assert not isinstance(bucket, int)
        arguments = [packed, Bucket(*bucket.tolist()), chunks, greedy, adapted, wants]  # type: ignore[list-item]
    call: Callable[..., Tensor | None] = getattr(half, name)
    return call(*arguments)
