"""From a decision to the command of its engine: layout over GPUs, precision of weights, room for its requests. Pure.

Rank r of the engine is part r of the placement (rank r % TP of stage r // TP), so part i runs on `gpus[i]` and holds the layers
that `pp_map` gives its stage. What our engine can't do as decided is not passed over: `Launch.differs` says it.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from systems.common.errors import InputError
from systems.common.models import MODELS, ModelShape
from systems.common.torch_engine.placement import layout, mlp_unit
from systems.maveriq.controller.core import Deployment

PROMPT_TOKENS = 923
"""Longest prompt that engines make room for, unless their options say otherwise: the cap of the artifact's clients (2.10)."""
SPARE_TOKENS = 16
BLOCK_TOKENS = 16
INT4_GROUP = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that serves a deployment.

    Attributes:
        argv: the command.
        devices: the real GPU of each rank; empty where there is none.
        differs: in what the engine is not what was decided.
    """

    argv: tuple[str, ...]
    devices: tuple[int, ...] = ()
    differs: tuple[str, ...] = ()


Launcher = Callable[[Deployment, Sequence[int]], Launch]
"""From a deployment and the real devices of its parts (none on a CPU) to its command."""


def serving(shape: str = "model", options: Sequence[str] = (), weights: Path | None = None, one_rank: bool = False) -> Launcher:
    """`python -m systems.common.serve` for every deployment, on as many ranks as were decided.

    Args:
        shape: whose shape random weights have; `model` is the deployment's own.
        options: further options of the server; they win over what is chosen here.
        weights: a folder that holds a folder of safetensors for each model, in place of random weights.
        one_rank: run every engine in one process, whatever was decided.
    """

    def launch(deployment: Deployment, devices: Sequence[int]) -> Launch:
        model = deployment.decision.wish.model
        random = ("--model", model if shape == "model" else shape, "--random-weights")
        source = ("--weights", str(weights / model)) if weights else random
        depth, stand_in = _engine_of(deployment, shape, weights)
        ranks, notes = _ranks(deployment, devices, depth, stand_in, one_rank)
        quantised, missing = _precision(deployment)
        split = ("--tensor-parallel-size", str(ranks.tp), "--pipeline-layers", ",".join(map(str, ranks.pp_map)))
        argv = (sys.executable, "-m", "systems.common.serve", *source, "--port", "0", *split, *quantised, *_room(deployment))
        return Launch((*argv, *options), ranks.devices, (*notes, *missing))

    return launch


@dataclass(frozen=True, slots=True)
class _Ranks:
    tp: int
    pp_map: tuple[int, ...]
    devices: tuple[int, ...]


def _ranks(
    deployment: Deployment, devices: Sequence[int], depth: int, stand_in: ModelShape | None, one_rank: bool
) -> tuple[_Ranks, list[str]]:
    decided, placed = deployment.decision.configuration, deployment.decision.placement
    if one_rank or len(set(devices)) < len(devices):
        why = "engines run on one rank each" if one_rank else "its GPUs are one device"
        notes = [f"{decided.gpus} ranks run as one: {why}"] if decided.gpus > 1 else []
        return _Ranks(1, (depth,), tuple(devices[:1])), notes
    tp = decided.tp if stand_in is None else _splits(stand_in, decided.tp, decided.dtype)
    pp_map = placed.pp_map if depth == sum(placed.pp_map) else scaled(placed.pp_map, depth)
    notes = []
    if (tp, pp_map) != (decided.tp, placed.pp_map):
        notes.append(f"TP {decided.tp}, layers {list(placed.pp_map)} run as TP {tp}, layers {list(pp_map)} of another shape")
    parts = [stage * decided.tp + rank for stage in range(len(pp_map)) for rank in range(tp)]
    return _Ranks(tp, pp_map, tuple(devices[part] for part in parts) if devices else ()), notes


def scaled(pp_map: Sequence[int], layers: int) -> tuple[int, ...]:
    """The same shares of a model of `layers` layers: at least one each, the last stages dropped where there are too few."""
    stages = min(len(pp_map), layers)
    spare, whole = layers - stages, sum(pp_map[:stages])
    ends = [round(spare * sum(pp_map[:stage]) / whole) for stage in range(stages + 1)]
    return tuple(1 + end - begin for begin, end in itertools.pairwise(ends))


def _engine_of(deployment: Deployment, shape: str, weights: Path | None) -> tuple[int, ModelShape | None]:
    """Decoder layers of what will run, and its shape where it only stands in for the model."""
    decided = sum(deployment.decision.placement.pp_map)
    if weights is not None:
        return _depth(weights / deployment.decision.wish.model / "config.json", decided), None
    if shape not in ("model", deployment.decision.wish.model):
        stand_in = MODELS.get(shape)
        return (decided if stand_in is None else stand_in.layers), stand_in
    return decided, None


def _depth(file: Path, decided: int) -> int:
    """The layers that a config.json tells of; what is wrong with it the server will say."""
    try:
        return int(json.loads(file.read_bytes())["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return decided


def _splits(shape: ModelShape, tp: int, dtype: str) -> int:
    """The most ranks up to `tp` that `shape` can be split over."""
    for ranks in range(tp, 1, -1):
        try:
            layout(shape, ranks)
            mlp_unit(shape, ranks, INT4_GROUP if "int4" in dtype else 1)
        except InputError:
            continue
        if "int4" not in dtype or shape.q_width // ranks % INT4_GROUP == 0:
            return ranks
    return 1


def _precision(deployment: Deployment) -> tuple[tuple[str, ...], list[str]]:
    """The server's options, and what it has not got."""
    decided = deployment.decision.configuration
    weights = () if decided.dtype == "float16" else ("--quantization", decided.dtype.removesuffix("_gptq"))
    cache = ("--kv-dtype", "int8") if decided.int8_kv else ()
    return (*weights, *cache), ["int4 by rounding, not GPTQ"] if decided.dtype == "int4_gptq" else []


def _room(deployment: Deployment) -> tuple[str, ...]:
    """Limits that hold one request (or batch) of the artifact's longest prompt: what the fingerprints' memory is about."""
    wish = deployment.decision.wish
    longest = PROMPT_TOKENS + wish.output_length + SPARE_TOKENS
    tokens = min(8192, -(-wish.batch * PROMPT_TOKENS // 128) * 128)
    blocks = wish.batch * -(-longest // BLOCK_TOKENS) + 1
    return (
        "--max-model-len", str(longest), "--kv-blocks", str(blocks), "--max-num-seqs", str(wish.batch),
        "--max-num-batched-tokens", str(max(tokens, wish.batch)),
    )  # fmt: skip
