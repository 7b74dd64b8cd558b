"""`OperatorCosts` from tables that `snakemake calibrate` measured on the engine of this project: the `calibrated` source.

Unlike a profiler's folder (tables.py), which times kernels one by one, a calibration times what the engine really runs:

* `layer.csv` (`tokens,time_us`): all token-wise operators of one decoder layer, as part of a step's CUDA graph;
* `embedding.csv` (`tokens,time_us`), `head.csv` (`sequences,time_us`): what comes before the first layer, and after the last;
* `attention.csv` (`prefill_chunk,kv_prefill,n_decode,kv_decode,time_us`): one layer's attention, with rotary and cache writes;
* `prompts.csv` (`prompts,tokens,n_decode,kv_decode,time_us`): the same where several whole prompts share a step (optional);
* `steps.csv` (`rows,context,chunk,past,time_us`): whole steps at the sizes that have a graph; less their attention they are
  what the simulator charges for all the rest (step_rest.py);
* `engine.yaml`: the engine's resolved limits, sizes that have a graph, host time per step;
* `meta.yaml`: GPU, model, number format, and where all this comes from.

Other tables lie beside them (`check.csv`: whole steps at other sizes, to check against; `adapters.csv`, `copies.csv`,
`all_reduce.csv`, `corun.csv`), read by those who need them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from systems.common.engine.padding import Padding
from systems.common.errors import InputError
from systems.common.hardware.cost import Affine, Chunk
from systems.common.hardware.curve import Curve
from systems.common.hardware.readings import read_numbers
from systems.common.hardware.roofline import RooflineCosts
from systems.common.hardware.step_rest import StepRest
from systems.common.hardware.table_costs import AttentionTable, Listed
from systems.common.hardware.tables import AttentionPoint, PromptsPoint, read_attention, read_prompts

LIMITS = ("num_gpu_blocks", "block_tokens", "max_num_batched_tokens", "max_num_seqs")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the measured engine resolved when it started.

    Attributes:
        num_gpu_blocks, block_tokens, max_num_batched_tokens, max_num_seqs: limits (see `EngineConfig`).
        padding: sizes that have a CUDA graph.
        host_s: host time per step that the GPU waits for, seconds.
        launch_ahead_s: how long before a decode step's end it forms the next batch, seconds; None where it waits for the end.
    """

    num_gpu_blocks: int
    block_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int
    padding: Padding
    host_s: float
    launch_ahead_s: float | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """One folder of measured tables; times in seconds."""

    folder: Path
    gpu: str
    model: str
    dtype: str
    layer: Curve
    head: Curve
    embedding: Curve
    attention: Mapping[AttentionPoint, float]
    several: Mapping[PromptsPoint, float]
    steps: Mapping[AttentionPoint, float]
    engine: EngineFacts


def read_calibration(folder: Path) -> Calibration:
    """Read a folder that `snakemake calibrate` wrote.

    Raises:
        InputError: a file, key or column is missing; a value is no finite number above 0.
    """
    if not folder.is_dir():
        raise InputError(folder, "calibration", folder.name, "run `snakemake calibrate` on that GPU, or name another folder")
    meta = _yaml(folder / "meta.yaml")
    names = [_text(folder / "meta.yaml", meta, key) for key in ("gpu", "model", "dtype")]
    return Calibration(
        folder,
        names[0],
        names[1],
        names[2],
        _curve(folder / "layer.csv", "tokens"),
        _curve(folder / "head.csv", "sequences"),
        _curve(folder / "embedding.csv", "tokens"),
        read_attention(folder / "attention.csv"),
        read_prompts(folder / "prompts.csv"),
        _steps(folder / "steps.csv"),
        _engine(folder / "engine.yaml"),
    )


class CalibratedCosts:
    """`OperatorCosts` from a calibration of one GPU.

    Attributes:
        calibration: the tables.
        rest_s: all of a step but attention, from whole steps (see `StepRest`).
    """

    def __init__(self, calibration: Calibration, rest: RooflineCosts) -> None:
        """Everything from `calibration`; `rest` says what is to be simulated.

        Raises InputError when the calibration is of another model, GPU or number format, or `rest` of several GPUs.
        """
        wanted = (rest.gpu.name, rest.model.name, rest.model.dtype)
        for key, found, ours in zip(
            ("gpu", "model", "dtype"), (calibration.gpu, calibration.model, calibration.dtype), wanted, strict=True
        ):
            if found != ours:
                raise InputError(calibration.folder / "meta.yaml", key, found, f"use a calibration of {ours}")
        if rest.tp != 1:
            raise InputError(
                calibration.folder, "tp", rest.tp, "calibrations are of one GPU: use the roofline for tensor parallelism"
            )
        self.calibration = calibration
        self.layer_linear_s = Listed(calibration.layer)
        self.embedding_s = Listed(calibration.embedding)
        self.head_s = Listed(calibration.head, 1024)
        self._table = AttentionTable(calibration.attention, calibration.several)
        self.rest_s = StepRest(calibration.steps, rest.model.layers, self.attention_s, calibration.engine.padding)

    @property
    def source(self) -> str:
        """For a figure's footer."""
        return f"calibrated on {self.calibration.gpu}"

    def attention_s(self, chunks: Sequence[Chunk], decodes: int, decode_context: int) -> float:
        """See `OperatorCosts`; several chunks as in `TableCosts`."""
        return self._table.batch_s(chunks, decodes, decode_context)

    def decode_attention(self, decodes: int, decode_context: int) -> Affine:
        """See `OperatorCosts`."""
        return self._table.decode_line(decodes, decode_context)

    def all_reduce_s(self, size_bytes: int) -> float:
        """0: one GPU."""
        return 0.0


def _curve(path: Path, axis: str) -> Curve:
    columns = read_numbers(path, (axis, "time_us"))
    return Curve.of((x, _seconds(path, row, us)) for row, (x, us) in enumerate(zip(*columns.values(), strict=True), start=2))


def _steps(path: Path) -> dict[AttentionPoint, float]:
    found: dict[AttentionPoint, float] = {}
    rows = zip(*read_numbers(path, ("rows", "context", "chunk", "past", "time_us")).values(), strict=True)
    for row, (decodes, context, chunk, past, us) in enumerate(rows, start=2):
        found[int(chunk), int(past), int(decodes), int(context)] = _seconds(path, row, us)
    for column, present in (("rows", any(not chunk for chunk, *_ in found)), ("chunk", any(chunk for chunk, *_ in found))):
        if not present:
            raise InputError(path, f"column {column}", 0, "add steps with prompts and steps without")
    return found


def _engine(path: Path) -> EngineFacts:
    facts = _yaml(path)
    limits = {key: _whole(path, facts, key) for key in LIMITS}
    graphs = facts.get("graphs") or {}
    if not isinstance(graphs, dict):
        raise InputError(path, "graphs", graphs, "give a mapping with decode, rows, tokens, prompt_tokens, chunks")
    decode, rows, tokens = (_sizes(path, graphs, key) for key in ("decode", "rows", "tokens"))
    padding = Padding(decode, rows, tokens, int(graphs.get("prompt_tokens", 0)), int(graphs.get("chunks", 0)))
    ahead = facts.get("launch_ahead_us")
    return EngineFacts(
        **limits,
        padding=padding,
        host_s=_microseconds(path, "host_us", facts.get("host_us", 0.0)),
        launch_ahead_s=None if ahead is None else _microseconds(path, "launch_ahead_us", ahead),
    )


def _microseconds(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise InputError(path, key, value, "give microseconds, 0 or more")
    return float(value) * 1e-6


def _sizes(path: Path, graphs: Mapping[str, Any], key: str) -> tuple[int, ...]:
    sizes = graphs.get(key, [])
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes) or sizes != sorted(set(sizes)):
        raise InputError(path, f"graphs.{key}", sizes, "give whole numbers in rising order")
    return tuple(sizes)


def _whole(path: Path, facts: Mapping[str, Any], key: str) -> int:
    value = facts.get(key)
    if type(value) is not int or value < 1:
        raise InputError(path, key, value, "give a whole number of at least 1")
    return value


def _text(path: Path, meta: Mapping[str, Any], key: str) -> str:
    value = meta.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(path, key, value, "give its name as text")
    return value


def _yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(path, "file", type(error).__name__, "run `snakemake calibrate` again: it writes this file") from None
    if not isinstance(loaded, dict):
        raise InputError(path, "file", loaded, "give a mapping of keys to values")
    return loaded


def _seconds(path: Path, row: int, us: float) -> float:
    if us <= 0:
        raise InputError(path, f"column time_us, row {row}", us, "give a time above 0")
    return us * 1e-6
