"""The paper's closed formulas (sheet 2.4 and 2.6), on arrays: depth, output length, parallelism, batch, memory. Pure.

Every argument may be a number or an array; arrays broadcast.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from systems.maveriq.configuration import Floats

Number = float | Floats


class Exponents(NamedTuple):
    """The four exponents of the parallelism law, one set per precision (or arrays of them)."""

    alpha: Number
    beta: Number
    gamma: Number
    delta: Number


class Line(NamedTuple):
    """A whole request at full depth: `ttft_s` before, `tpot_s` for every output token."""

    ttft_s: float
    tpot_s: float


def extend_line(first: float, second: float, first_at: int, second_at: int, target: int) -> float:
    """The straight line through two points, at `target`."""
    return first + (second - first) / (second_at - first_at) * (target - first_at)


def full_depth(
    latency_s: tuple[tuple[float, float], tuple[float, float]], layers: tuple[int, int], lengths: tuple[int, int], depth: int
) -> Line:
    """Step A: from four fingerprint latencies to the whole model on the same layout.

    Args:
        latency_s: seconds, `latency_s[i][j]` at `layers[i]` and `lengths[j]`.
        layers: the two depths n1 < n2.
        lengths: the two output lengths o1 < o2.
        depth: layers of the whole model, N.

    Decode time per token and layer is the growth with length, per layer; what remains of it belongs to embedding, head and
    overheads. What the first token took is what decode leaves over.
    """
    (short1, long1), (short2, long2) = latency_s
    (n1, n2), (o1, o2) = layers, lengths
    decode_layer_s = ((long2 - long1) - (short2 - short1)) / (o2 - o1) / (n2 - n1)
    decode_rest_s = (long1 - short1) / (o2 - o1) - n1 * decode_layer_s
    prefill_layer_s = (short2 - short1) / (n2 - n1) - o1 * decode_layer_s
    prefill_rest_s = short1 - n1 * prefill_layer_s - o1 * (n1 * decode_layer_s + decode_rest_s)
    return Line(depth * prefill_layer_s + prefill_rest_s, depth * decode_layer_s + decode_rest_s)


def parallel_latency_s(
    single_s: Number, split_s: Number, staged_s: Number, tp: Number, pp: Number, exponents: Exponents
) -> Floats:
    """Step B: the latency of (TP, PP) from those of (1,1), (2,1) and (1,2), all whole models at one output length, seconds.

    R / (TP PP^alpha) + (TP - 1)^beta / PP^gamma TPo + (PP - 1)^delta PPo, with TPo = max(0, L(2,1) - R/2) and
    PPo = max(0, L(1,2) - R/2^alpha). A model that can't be split has TPo = 0: pass half of `single_s` as `split_s`.
    """
    alpha, beta, gamma, delta = exponents
    tp_overhead_s = np.maximum(0.0, split_s - single_s / np.float64(2))
    pp_overhead_s = np.maximum(0.0, staged_s - single_s / np.power(2.0, alpha))
    shared = single_s / (tp * np.power(pp, alpha))
    # 0^0 would be 1: one rank or one stage has no overhead, whatever the exponent
    tensor = np.where(np.asarray(tp) > 1, np.power(np.maximum(np.asarray(tp) - 1.0, 1e-300), beta), 0.0) / np.power(pp, gamma)
    stages = np.where(np.asarray(pp) > 1, np.power(np.maximum(np.asarray(pp) - 1.0, 1e-300), delta), 0.0)
    return np.asarray(shared + tensor * tp_overhead_s + stages * pp_overhead_s, dtype=np.float64)


def parallel_memory_gib(single: Number, staged: Number, split: Number, tp: Number, pp: Number) -> Floats:
    """Memory of (TP, PP) over all GPUs, GiB, from those of (1,1), (1,2) and (2,1) at full depth (2.6)."""
    rank = np.maximum(0.0, split - np.asarray(single))
    stage = np.maximum(0.0, staged - np.asarray(single))
    return np.asarray(
        np.maximum(0.0, single) + (tp - np.float64(1)) * rank + tp * (pp - np.float64(1)) * stage, dtype=np.float64
    )


def batched(one: Number, two: Number, batch: Number) -> Floats:
    """Step C: the line through batches 1 and 2, never falling, at `batch`."""
    return np.asarray(one + (batch - np.float64(1)) * np.maximum(0.0, two - np.asarray(one)), dtype=np.float64)
