"""What is measured, as data: jobs, and how a grid becomes a list of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from systems.common.errors import InputError
from systems.common.models import model
from systems.maveriq.fingerprint import Layout

DTYPES = ("float16", "int8", "int4")
"""What our engine has: 16-bit weights (called float16 in tables, whichever of fp16 and bf16 computes), int8, int4."""
INT8_KV = "+kv8"
"""Behind a precision: with keys and values in int8."""
CLOCKS = ("launched", "served")
COMPUTE = ("fp16", "bf16", "fp32")
TABLES = ("fingerprints", "whole", "uneven", "scaling")
PROMPT_TOKENS = 923
"""The authors' long prompt (sheet 2.3)."""


@dataclass(frozen=True, slots=True)
class Job:
    """One engine: built, loaded, asked for each of `output_lengths`, ended. Sizes in layers, requests and tokens.

    `dtype` is one of DTYPES, with `INT8_KV` behind it for keys and values in int8. `clock` says which time becomes the latency:
    `served`, a request through the whole engine, or `launched`, its prompt through the engine and its decode steps launched one
    after the other without it, so that a model of one layer is bound by the GPU and not by Python (sheet 7). Both are always
    measured. `table` is the file that the rows go to.
    """

    model: str
    tp: int
    pp_map: tuple[int, ...]
    dtype: str = "float16"
    batch: int = 1
    output_lengths: tuple[int, ...] = (10, 20)
    prompt_tokens: int = PROMPT_TOKENS
    compute: str = "bf16"
    device: str = "cuda"
    clock: str = "launched"
    warmups: int = 2
    repeats: int = 20
    table: str = "fingerprints"

    @property
    def layers(self) -> int:
        """Decoder layers of the model that is measured."""
        return sum(self.pp_map)

    @property
    def gpus(self) -> int:
        """Ranks, and GPUs where there are any."""
        return self.tp * len(self.pp_map)

    @property
    def weights(self) -> str:
        """The precision of its weights, one of DTYPES."""
        return self.dtype.removesuffix(INT8_KV)

    @property
    def int8_kv(self) -> bool:
        """Whether its keys and values are int8."""
        return self.dtype.endswith(INT8_KV)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.model} TP {self.tp} layers {list(self.pp_map)} {self.dtype} batch {self.batch}"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """The inverse of `to_json`."""
        tuples = {key: tuple(values[key]) for key in ("pp_map", "output_lengths")}
        return cls(**{**values, **tuples})

    def check(self) -> None:
        """Raises InputError for a job that no machine could do."""
        shape = model(self.model, "--model")
        if self.layers > shape.layers:
            raise InputError("profile", "layers", self.layers, f"{self.model} has {shape.layers}: use 1 to {shape.layers}")
        for key, known in (("weights", DTYPES), ("compute", COMPUTE), ("clock", CLOCKS), ("table", TABLES)):
            if getattr(self, key) not in known:
                raise InputError("profile", key, getattr(self, key), f"use one of {', '.join(known)}")
        for key in ("tp", "batch", "prompt_tokens", "repeats"):
            if getattr(self, key) < 1:
                raise InputError("profile", key, getattr(self, key), "use a whole number above 0")
        if not self.output_lengths or min(self.output_lengths) < 1 or min(self.pp_map) < 1:
            raise InputError("profile", "output lengths, layers", self.output_lengths, "each must be at least 1")


def even_map(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as they go, the first stages one more. Raises InputError for more stages than layers."""
    if not 1 <= stages <= layers:
        raise InputError("profile", "pp", stages, f"give 1 to {layers} stages: every stage needs a layer")
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def fingerprint_jobs(
    base: Job,
    layouts: Iterable[Layout],
    dtypes: Sequence[str],
    batches: Sequence[int] = (1,),
    extra_layers: Sequence[int] = (0, 1),
) -> list[Job]:
    """The fingerprints of `base.model` (2.3): PP + extra layers each; `base` gives all that the arguments don't."""
    return [
        replace(base, tp=tp, pp_map=even_map(pp + extra, pp), dtype=dtype, batch=batch)
        for tp, pp in layouts
        for dtype in dtypes
        for batch in batches
        for extra in extra_layers
    ]


def whole_jobs(base: Job, layouts: Iterable[Layout], dtypes: Sequence[str], batches: Sequence[int] = (1,)) -> list[Job]:
    """The whole model on even pipelines, through the whole engine."""
    layers = model(base.model, "--model").layers
    return [
        replace(base, tp=tp, pp_map=even_map(layers, pp), dtype=dtype, batch=batch, clock="served", table="whole")
        for tp, pp in layouts
        for dtype in dtypes
        for batch in batches
    ]


def map_jobs(base: Job, maps: Iterable[Sequence[int]], batches: Sequence[int] = (1,)) -> list[Job]:
    """The whole model with these layers per stage, through the whole engine."""
    return [
        replace(base, pp_map=tuple(pp_map), batch=batch, clock="served", table="uneven") for pp_map in maps for batch in batches
    ]
