"""Which event loop runs: uvloop where it is installed (half the processor time per token), else Python's own."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the loop; None: Python's own."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    made: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return made


def name() -> str:
    """For provenance."""
    return "asyncio" if factory() is None else "uvloop"


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, on a loop of its own."""
    with asyncio.Runner(loop_factory=factory()) as runner:
        return runner.run(work)
