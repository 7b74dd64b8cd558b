"""Readers of operator tables that somebody measured.

Contents:

* `KernelTables`, `read_kernel_tables`: a folder with one time per kernel (LLMServingSim's profiler writes it, in us):
  token-wise operators over tokens, head and sampler over sequences, attention over a grid of prefill and decode.
* `LinearTable`, `read_linear_table`: one CSV of linear operators over tokens and tensor-parallel degree (Vidur's, in ms).
* `read_all_reduce`: one CSV of all-reduce times over bytes and GPUs (Vidur's, in ms).

Readers check every value; what they return is in seconds. docs/hardware.md describes the formats for those who measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from systems.common.errors import InputError
from systems.common.hardware.curve import Curve
from systems.common.hardware.readings import read_columns, read_numbers
from systems.common.hardware.table_meta import TableMeta, read_meta
from systems.common.models import ModelShape

# How often each operator runs. The table has one row set for both norms of a layer.
PER_LAYER: Mapping[str, int] = {
    "qkv_proj": 1, "o_proj": 1, "gate_up_proj": 1, "down_proj": 1, "act_fn": 1, "layernorm": 2, "rotary_emb": 1, "qk_norm": 1,
}  # fmt: skip
PER_ITERATION = ("embedding", "final_layernorm")
PER_SEQUENCE = ("lm_head", "sampler")
OPTIONAL = ("rotary_emb", "qk_norm")  # absent from models with learned positions, without QK norm

# Vidur's names. `add` is the one residual that is not fused into a norm, once per layer as Vidur counts it.
VIDUR_LAYER = (
    "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm",
    "mlp_up_proj", "mlp_act", "mlp_down_proj", "add",
)  # fmt: skip

AttentionPoint = tuple[int, int, int, int]  # prefill chunk, its past, decodes, context of each decode (tokens)
PromptsPoint = tuple[int, int, int, int]  # prompts, tokens of each, decodes, context of each decode


@dataclass(frozen=True, slots=True)
class KernelTables:
    """One folder: a curve of seconds per operator, and seconds per attention point."""

    folder: Path
    dense: Mapping[str, Curve]
    per_sequence: Mapping[str, Curve]
    attention: Mapping[AttentionPoint, float]
    meta: TableMeta


@dataclass(frozen=True, slots=True)
class LinearTable:
    """One model's linear operators at one tensor-parallel degree: a curve of seconds over tokens per operator."""

    path: Path
    operators: Mapping[str, Curve]


def read_kernel_tables(folder: Path, tp: int = 1) -> KernelTables:
    """Read a folder of kernel times measured at tensor-parallel degree `tp`.

    Files are `profile_dense.csv`, `profile_per_sequence.csv`, `profile_attention.csv` and optionally `profile_meta.yaml`,
    with or without `profile_`, in `folder/tp<tp>` or, for the one degree measured, in `folder` itself.

    Raises:
        InputError: a file, column or operator is missing, a value is no finite number or negative, a time is 0.
    """
    if not folder.is_dir():
        raise InputError(folder, "operators", folder.name, "give a folder of operator tables; docs/hardware.md describes it")
    nested = folder / f"tp{tp}"
    inside = nested if nested.is_dir() else folder
    meta = read_meta(folder)
    if inside is folder and tp not in meta.tp_degrees:
        raise InputError(folder, "tp", tp, f"put tables measured at that degree into {nested.name}/")
    dense = _curves(_file(inside, "dense"), "tokens", tuple(PER_LAYER) + PER_ITERATION)
    per_sequence = _curves(_file(inside, "per_sequence"), "sequences", PER_SEQUENCE)
    return KernelTables(folder, dense, per_sequence, read_attention(_file(inside, "attention")), meta)


def read_linear_table(path: Path, tp: int, model: ModelShape | None = None) -> LinearTable:
    """Read linear-operator times (medians, ms) at degree `tp` from a CSV in Vidur's format.

    Args:
        path: the CSV.
        tp: tensor-parallel degree, one of those in column `num_tensor_parallel_workers`.
        model: if given, its shape must be the table's.

    Raises:
        InputError: missing column, bad value, a degree that was not measured, or a table of another shape.
    """
    names = ("emb", *VIDUR_LAYER)
    shape = {"n_head": "heads", "n_kv_head": "kv_heads", "n_embd": "hidden", "n_expanded_embd": "mlp"} if model else {}
    keys = ("num_tokens", "num_tensor_parallel_workers", *shape)
    columns = read_numbers(path, (*keys, *(f"time_stats.{name}.median" for name in names)))
    for column, attribute in shape.items():
        for row, value in enumerate(columns[column], start=2):
            if value != getattr(model, attribute):
                mend = f"use a table of {model.name if model else ''}, where it is {getattr(model, attribute)}"
                raise InputError(path, f"column {column}, row {row}", value, mend)
    rows = [i for i, degree in enumerate(columns["num_tensor_parallel_workers"]) if degree == tp]
    if not rows:
        measured = sorted({int(degree) for degree in columns["num_tensor_parallel_workers"]})
        raise InputError(path, "num_tensor_parallel_workers", tp, f"it holds {', '.join(map(str, measured))}")
    tokens = columns["num_tokens"]
    return LinearTable(
        path, {n: _medians([(tokens[i], columns[f"time_stats.{n}.median"][i] * 1e-3) for i in rows]) for n in names}
    )


def read_all_reduce(path: Path, gpus: int) -> Curve:
    """Seconds of an all-reduce over bytes, among `gpus` GPUs of one machine, from a CSV in Vidur's format (medians, ms).

    Raises InputError for a missing column, a bad value or a number of GPUs that was not measured.
    """
    columns = read_numbers(path, ("num_workers", "devices_per_node", "size", "time_stats.all_reduce.median"))
    rows = zip(*columns.values(), strict=True)
    points = [(size, ms * 1e-3) for workers, per_node, size, ms in rows if workers == per_node == gpus]
    if not points:
        raise InputError(path, "num_workers", gpus, "use a number of GPUs that was measured inside one machine")
    return _medians(points)


def _medians(points: list[tuple[float, float]]) -> Curve:
    """A curve through the median of each x (Vidur's tables repeat some)."""
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    return Curve.of((x, median(ys)) for x, ys in by_x.items())


def _file(folder: Path, name: str) -> Path:
    bare = folder / f"{name}.csv"
    return bare if bare.is_file() else folder / f"profile_{name}.csv"


def _curves(path: Path, axis: str, operators: tuple[str, ...]) -> dict[str, Curve]:
    """One curve of seconds per operator from columns layer, `axis`, time_us."""
    numbers, words = read_columns(path, (axis, "time_us"), ("layer",))
    points: dict[str, list[tuple[float, float]]] = {}
    for row, (name, x, us) in enumerate(zip(words["layer"], numbers[axis], numbers["time_us"], strict=True), start=2):
        if name not in operators:
            raise InputError(path, f"column layer, row {row}", name, f"use one of {', '.join(operators)}")
        points.setdefault(name, []).append((x, _seconds(path, row, us)))
    for name in operators:
        if name not in points and name not in OPTIONAL:
            raise InputError(path, "column layer", name, "add rows for this operator")
    return {name: Curve.of(points[name]) for name in operators if name in points}


def read_attention(path: Path) -> dict[AttentionPoint, float]:
    """Seconds of attention by point, from a CSV with times in us.

    Raises InputError for a missing column, a bad value, or no row of decodes or of a chunk alone.
    """
    axes = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    columns = read_numbers(path, (*axes, "time_us"))
    found: dict[AttentionPoint, float] = {}
    for row, (chunk, past, decodes, context, us) in enumerate(zip(*columns.values(), strict=True), start=2):
        found[int(chunk), int(past), int(decodes), int(context)] = _seconds(path, row, us)
    alone = {
        "n_decode": any(decodes and not chunk for chunk, _, decodes, _ in found),
        "prefill_chunk": any(chunk and not decodes for chunk, _, decodes, _ in found),
    }
    for column, present in alone.items():
        if not present:
            raise InputError(path, f"column {column}", 0, f"add rows where {column} alone is above 0")
    return found


def read_prompts(path: Path) -> dict[PromptsPoint, float]:
    """Seconds of attention over several whole prompts in one step, from a CSV with times in us; empty without the file.

    Raises InputError for a missing column or a bad value.
    """
    if not path.is_file():
        return {}
    columns = read_numbers(path, ("prompts", "tokens", "n_decode", "kv_decode", "time_us"))
    rows = enumerate(zip(*columns.values(), strict=True), start=2)
    return {(int(k), int(tokens), int(n), int(c)): _seconds(path, row, us) for row, (k, tokens, n, c, us) in rows}


def _seconds(path: Path, row: int, us: float) -> float:
    if us == 0:
        raise InputError(path, f"column time_us, row {row}", us, "give a time above 0")
    return us * 1e-6
