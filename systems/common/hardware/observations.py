"""Measured points beside what the roofline says of them, in the form that a fit needs.

The roofline of every operator is the rounded maximum of one or two bounds plus fixed times, all linear in the unknowns: for a
matrix product `flops / peak * (1 / gemm_compute)`, `bytes / bandwidth * (1 / gemm_memory)` and `gemm_launch_s`. So a point
is its measured seconds, a tuple of bounds and the fixed part, each a `Term` from unknown to coefficient. Unknowns are
named as in `Efficiencies`; shares enter by their inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from math import inf, log2

from systems.common.hardware.attention import TILE_ROWS, keys_walked
from systems.common.hardware.cost import Chunk
from systems.common.hardware.curve import Curve
from systems.common.hardware.datasheet import Gpu
from systems.common.hardware.efficiencies import Efficiencies, rounded_max
from systems.common.hardware.layer_profile import LayerTimes
from systems.common.hardware.tables import KernelTables, LinearTable
from systems.common.hardware.work import (
    decode_row_bytes,
    elementwise_bytes,
    gemm_shapes,
    gemm_work,
    kv_heads_per_gpu,
    prefill_bytes,
    ring_bytes,
)
from systems.common.models import ModelShape

Term = Mapping[str, float]
Bounds = tuple[tuple[Term, ...], Term]  # bounds, fixed part
BoundsOf = Callable[[float], Bounds]
SHARES = ("gemm_compute", "gemm_memory", "prefill_attention", "decode_attention", "elementwise", "all_reduce")
FIXED = ("launch_s", "gemm_launch_s", "attention_launch_s", "attention_block_s", "all_reduce_latency_s")

# Vidur's name, ours, and how many rows of `hidden` a kernel moves per token where we have no such kernel.
VIDUR_GEMMS = {
    "attn_pre_proj": "qkv_proj",
    "attn_post_proj": "o_proj",
    "mlp_up_proj": "gate_up_proj",
    "mlp_down_proj": "down_proj",
}
VIDUR_ELEMENTWISE = {"attn_rope": "rotary_emb", "mlp_act": "act_fn"}
VIDUR_ROWS = {"input_layernorm": 2, "post_attention_layernorm": 2, "add": 3, "emb": 2}


@dataclass(frozen=True, slots=True)
class Observation:
    """One measured time of one operator; `x` is its size in tokens, sequences or bytes.

    `weight` is how many octaves of `x` the point stands for. Tables hold a point every 16 tokens, most of them large:
    unweighted, the few that a decode step meets would not count.
    """

    operator: str
    x: float
    seconds: float
    bounds: tuple[Term, ...]
    fixed: Term
    weight: float = 1.0

    def predict(self, unknowns: Mapping[str, float], knee: float) -> float:
        """The roofline's seconds."""
        return reduce(partial(rounded_max, knee=knee), (value(b, unknowns) for b in self.bounds)) + value(self.fixed, unknowns)

    def linear_in(self, unknowns: Mapping[str, float], knee: float) -> dict[str, float]:
        """The gradient of `predict`: each bound weighs (bound / rounded maximum)^(knee - 1).

        `predict` is homogeneous of degree 1, so the gradient times `unknowns` is `predict` itself.
        """
        sums = [value(b, unknowns) for b in self.bounds]
        top = reduce(partial(rounded_max, knee=knee), sums)
        found = dict(self.fixed)
        for bound, size in zip(self.bounds, sums, strict=True):
            weight = (size / top) ** (knee - 1) if knee < inf else float(size == top)
            for name, coefficient in bound.items():
                found[name] = found.get(name, 0.0) + weight * coefficient
        return found


def value(term: Term, unknowns: Mapping[str, float]) -> float:
    """Seconds of one sum."""
    return sum(coefficient * unknowns[name] for name, coefficient in term.items())


def unknowns_of(efficiencies: Efficiencies) -> dict[str, float]:
    """`efficiencies` as a fit sees them: inverse shares, and fixed seconds."""
    inverse = {name: 1 / getattr(efficiencies, name) for name in SHARES}
    return inverse | {name: getattr(efficiencies, name) for name in FIXED}


@dataclass(frozen=True, slots=True)
class Bench:
    """The model shape, GPU and tensor-parallel degree that points were measured with."""

    model: ModelShape
    gpu: Gpu
    tp: int = 1

    @property
    def flops_per_s(self) -> float:
        """Peak in the model's number format."""
        return self.gpu.flops[self.gpu.dtype(self.model.dtype)]

    def gemm(self, inner: float, columns: float) -> BoundsOf:
        """Bounds of a matrix product over its rows."""

        def bounds(rows: float) -> Bounds:
            work = gemm_work(rows, inner, columns, self.model.dtype_bytes)
            compute, memory = work.flops / self.flops_per_s, work.bytes / self.gpu.bandwidth
            return ({"gemm_compute": compute}, {"gemm_memory": memory}), {"gemm_launch_s": 1.0}

        return bounds

    def elementwise(self, bytes_per_token: float) -> BoundsOf:
        """The bound over tokens of a kernel that only moves bytes."""
        return lambda tokens: (({"elementwise": tokens * bytes_per_token / self.gpu.bandwidth},), {"launch_s": 1.0})

    def prefill(self, chunk: Chunk) -> Bounds:
        """Bounds of one chunk's attention."""
        walked = keys_walked((chunk,), -(-self.model.heads // self.tp), self.gpu.sms)
        compute = walked * 4 * TILE_ROWS * self.model.head_dim / (self.flops_per_s / self.gpu.sms)
        memory = prefill_bytes(self.model, self.tp, (chunk,)) / self.gpu.bandwidth
        return ({"prefill_attention": compute}, {"decode_attention": memory}), {"attention_launch_s": 1.0}

    def decode(self, decodes: int, total_context: float) -> Bounds:
        """The bound of decode attention alone: memory and thread blocks (FLOPs bind on none of the measured GPUs)."""
        held = kv_heads_per_gpu(self.model, self.tp)
        keys = total_context * held / self.model.kv_heads * self.model.layer_kv_bytes_per_token
        moved = decodes * decode_row_bytes(self.model, self.tp) + keys
        memory, blocks = moved / self.gpu.bandwidth, decodes * held / self.gpu.sms
        return ({"decode_attention": memory},), {"attention_block_s": blocks, "attention_launch_s": 1.0}

    def all_reduce(self, size_bytes: float) -> Bounds:
        """The bound of an all-reduce."""
        moved = ring_bytes(size_bytes, self.tp) / self.gpu.link(self.tp)
        return ({"all_reduce": moved},), {"all_reduce_latency_s": 1.0}


def kernel_observations(tables: KernelTables, bench: Bench) -> list[Observation]:
    """Token-wise operators, head, prefill-only and decode-only attention of a folder of kernel times.

    Mixed batches and the sampler are left out: nothing is fitted on them.
    """
    gemms = {name: bench.gemm(*shape) for name, shape in gemm_shapes(bench.model, bench.tp).items()}
    others = {name: bench.elementwise(size) for name, size in elementwise_bytes(bench.model, bench.tp).items() if size}
    found = [o for name, terms in (gemms | others).items() for o in _along(name, tables.dense[name], terms)]
    head = bench.gemm(bench.model.hidden, bench.model.vocab / bench.tp)
    found += _along("lm_head", tables.per_sequence["lm_head"], head)
    for (tokens, past, decodes, context), seconds in sorted(tables.attention.items()):
        if tokens and not decodes:
            found.append(Observation("prefill attention", tokens, seconds, *bench.prefill(Chunk(tokens, past))))
        elif decodes and not tokens:
            total = decodes * context
            found.append(Observation("decode attention", total, seconds, *bench.decode(decodes, total)))
    return found


def linear_observations(table: LinearTable, bench: Bench) -> list[Observation]:
    """Linear operators of a table in Vidur's format, under our names where we have the same kernel."""
    shapes, sizes = gemm_shapes(bench.model, bench.tp), elementwise_bytes(bench.model, bench.tp)
    row = bench.model.hidden * bench.model.dtype_bytes
    terms = {theirs: (ours, bench.gemm(*shapes[ours])) for theirs, ours in VIDUR_GEMMS.items()}
    terms |= {theirs: (ours, bench.elementwise(sizes[ours])) for theirs, ours in VIDUR_ELEMENTWISE.items()}
    terms |= {name: (name, bench.elementwise(rows * row)) for name, rows in VIDUR_ROWS.items()}
    return [o for theirs, (ours, of) in terms.items() for o in _along(ours, table.operators[theirs], of)]


def all_reduce_observations(curve: Curve, bench: Bench) -> list[Observation]:
    """All-reduce times over bytes."""
    return _along("all_reduce", curve, bench.all_reduce)


def _along(operator: str, curve: Curve, bounds: BoundsOf) -> list[Observation]:
    """One observation per point of `curve`. Points of 0 (a clock too coarse) are left out."""
    points = zip(curve.xs, curve.ys, _octaves(curve.xs), strict=True)
    return [Observation(operator, x, seconds, *bounds(x), weight) for x, seconds, weight in points if seconds > 0]


def _octaves(xs: Sequence[float]) -> list[float]:
    """Octaves between the middles of each point's two gaps."""
    logs = [log2(x) for x in xs]
    return [(right - left) / 2 for left, right in zip([logs[0], *logs], [*logs[1:], logs[-1]], strict=False)]


LAYER_PROMPT, LAYER_CONTEXT = 512, 576  # SpotServe profiles a 512-token prompt, then the mean step of 128
LAYER_KERNELS = 12  # kernels that FasterTransformer launches per layer


def layer_observations(times: LayerTimes, bench: Bench) -> list[Observation]:
    """Whole layers as SpotServe profiled them (FasterTransformer, fp32): prefill is all compute, decode all memory.

    Attention is not fused there: in prefill it is two more matrix products. Degrees above `bench.tp` cross machines and
    are left out; those above 1 hold two all-reduces.
    """
    model, found = bench.model, []
    for (tp, batch), (init_s, incr_s) in sorted(times.items()):
        if tp > bench.tp:
            continue
        tokens, size = batch * LAYER_PROMPT, model.hidden * model.dtype_bytes
        flops = tokens * model.layer_flops_per_token + 2 * batch * model.layer_attention_flops(LAYER_PROMPT)
        fixed = {"launch_s": LAYER_KERNELS, "all_reduce_latency_s": 2.0 * (tp > 1)}
        link = bench.gpu.link(tp)
        kv = batch * LAYER_CONTEXT * model.layer_kv_bytes_per_token
        prefill = {"gemm_compute": flops / tp / bench.flops_per_s, "all_reduce": 2 * ring_bytes(tokens * size, tp) / link}
        decode = {
            "gemm_memory": model.layer_weight_bytes / tp / bench.gpu.bandwidth,
            "decode_attention": kv / tp / bench.gpu.bandwidth,
            "all_reduce": 2 * ring_bytes(batch * size, tp) / link,
        }
        found.append(Observation(f"layer prefill tp{tp}", tokens, init_s, (prefill,), fixed))
        found.append(Observation(f"layer decode tp{tp}", batch, incr_s, (decode,), fixed))
    return found
