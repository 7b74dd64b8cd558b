"""What the HTTP process and the engine process say to each other, pickled through a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from systems.common.engine.config import EngineConfig
from systems.common.errors import InputError

# ---- to the engine


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to answer; `index` is never used twice. The rest as in `torch_engine.sampling.Sampling`."""

    index: int
    prompt: NDArray[np.int64]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """End a job at once, wherever it is; one that has ended is left alone. Tokens already reported stay so."""

    index: int


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Load an adapter between two steps; `Done` answers."""

    ticket: int
    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Free an adapter that no job uses; `Done` answers."""

    ticket: int
    name: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End, jobs or not."""


Command = Job | Abort | LoadAdapter | UnloadAdapter | Stop

# ---- from the engine


@dataclass(frozen=True, slots=True)
class Family:
    """Something that an engine counts beside what all do, for `/metrics`: values by labels (`{replica="0"}`, or none)."""

    name: str
    kind: str
    about: str
    samples: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is: sequences, KV blocks in use, preemptions since the start; `more` that it counts."""

    waiting: int = 0
    running: int = 0
    blocks_used: int = 0
    preemptions: int = 0
    more: tuple[Family, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is warm and serves: its limits, its vocabulary, the device and number format it runs on, its adapters.

    `about`: what else the server says of it once it serves.
    """

    config: EngineConfig
    max_tokens: int
    vocab: int
    device: str
    dtype: str
    adapters: tuple[str, ...]
    about: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step gave: per token the job, the token, and why the answer ends with it (`stop`, `length`), if it does.

    `refused`: jobs that the engine would not take, and why.
    """

    load: Load
    tokens: list[tuple[int, int, str | None]] = field(default_factory=list)
    refused: list[tuple[int, InputError]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Done:
    """An adapter has been loaded or unloaded, or not: why."""

    ticket: int
    error: InputError | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine is over: as asked (no `reason`), or for a reason. `fault`: what a user must mend; `trace`: of a defect."""

    reason: str | None = None
    fault: InputError | None = None
    trace: str = ""


Report = Ready | Progress | Done | Ended
