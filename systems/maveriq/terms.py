"""What latency and memory are made of: one row of physical terms per setting, so that both are linear in constants.

A request takes o passes over the model (prefill stands for the first), and what prefill takes beyond a pass:

    latency = o (rest + head bytes/TP + ranks + n (layer + weight bytes/TP + all-reduces) + KV bytes/TP + stages + batch)
            + start + ranks + n (FLOPs beyond the weights' time/TP + all-reduced bytes) + stages

Each constant has a unit of time per something that follows from shapes: per byte, per FLOP, per layer, per all-reduce. So
constants are the machine's, not the model's, and models of one machine can lend them to each other. TP overheads have a
constant at 2, 4 and 8 ranks, interpolated over log2(TP) between and extrapolated beyond. Latencies are in ms here, memory is
in GiB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from systems.common.errors import InputError
from systems.maveriq.configuration import DTYPES, Floats, ModelFacts
from systems.maveriq.fingerprint import Point, Setting
from systems.maveriq.hierarchy import Rows, noise_class

WEIGHT_BYTES: Mapping[str, float] = {"float16": 2, "int8": 1, "int4": 0.5, "int4_gptq": 0.5}
ALIASES: Mapping[str, str] = {
    "fp16": "float16", "bf16": "float16", "bfloat16": "float16", "half": "float16", "fp8": "int8", "w8": "int8", "w4": "int4",
}  # fmt: skip

# group -> its terms. A group is what another machine changes together: half the bandwidth halves all its constants.
LATENCY_GROUPS: Mapping[str, tuple[str, ...]] = {
    "host": ("rest", "layer"),
    "bandwidth": ("head_gb", *(f"weight_gb_{dtype}" for dtype in DTYPES), "depth", "kv_gb"),
    "ranks": ("rank_rest_2", "rank_rest_4", "rank_rest_8", "all_reduce_2", "all_reduce_4", "all_reduce_8"),
    "stages": ("stage",),
    "batch": ("sequence", "sequence_flops"),
    "start": ("start",),
    "flops": tuple(f"prefill_flops_{dtype}" for dtype in DTYPES),
    "rank_start": ("rank_start_2", "rank_start_4", "rank_start_8"),
    "links": ("reduced_2", "reduced_4", "reduced_8"),
    "slow_links": ("slow_4", "slow_8"),
    "stage_start": ("stage_start",),
}
LATENCY_TERMS = tuple(term for terms in LATENCY_GROUPS.values() for term in terms)

MEMORY_GROUPS: Mapping[str, tuple[str, ...]] = {
    "weights": ("layer_gib", "ends_gib"),
    "context": ("gpu",),
    "activations": ("activation", "kv_gib", "batch_activation"),
    "ranks": ("group", "pairs", "pair_buffers"),
    "stages": ("stage", "stage_ranks"),
}
MEMORY_TERMS = tuple(term for terms in MEMORY_GROUPS.values() for term in terms)

RIDGE_TOKENS = 87.5
"""Tokens per byte of a weight at which arithmetic takes as long as reading it, about: 155 TFLOP/s over 768 GB/s (A6000) and
989 over 4800 (H200) give 100 each. Below it, prefill is one more pass over the weights."""
DEPTH_POWER = 1.25
"""How a layer's time grows with the depth of its stage: stages of a pipeline save a little. Of 1, 1.25, 1.5 and 2 it has the
least error on each of the six sets of five models when each of the five is left out in turn (docs/maveriq.md)."""
LONG_PROMPT, SHORT_PROMPT = 923, 10
"""Prompt tokens of the authors' two regimes (2.3)."""
SLOW_BYTES = 8e6
"""Up to how many bytes more than two ranks all-reduce through peer memory in TensorRT-LLM, and not by NCCL.

Source: `CustomAllReduceHelper.max_workspace_size_auto` in its plugin.py (16 MB for two ranks, which the authors' prompts never
exceed). Over PCIe that path is many times slower for long prompts: the reason why 4096 wide models start so slowly at TP 4
and 8."""
MAX_INPUT = 923
"""Input tokens that the authors' engines set memory aside for, in both regimes of prompts (2.3)."""


class Settings(NamedTuple):
    """Many settings as arrays, with the facts of their models: what terms are computed from."""

    tp: Floats
    pp: Floats
    layers: Floats
    length: Floats
    batch: Floats
    prompt: Floats
    dtype: np.ndarray
    """Index in DTYPES."""
    kv_bytes: Floats
    hidden: Floats
    weights: Floats
    vocab: Floats
    kv_width: Floats
    attention_width: Floats
    all_reduces: Floats

    def asking(self, prompt: float) -> Settings:
        """The same with prompts of `prompt` tokens."""
        return self._replace(prompt=np.full_like(self.prompt, prompt))


def dtype_of(name: str, where: str = "fingerprints") -> str:
    """One of DTYPES, also for other spellings. Raises InputError for a number format whose size is not known."""
    plain = ALIASES.get(name, name)
    if plain not in WEIGHT_BYTES:
        raise InputError(where, "DTYPE", name, f"use one of {', '.join((*WEIGHT_BYTES, *ALIASES))}")
    return plain


def settings(found: Sequence[Setting], models: Mapping[str, ModelFacts], prompt: float) -> Settings:
    """The settings' arrays, all with prompts of `prompt` tokens. Raises InputError for an unknown number format."""
    rows = []
    known = {name: (models[name].filled, models[name].layer_weights) for name in {one.model for one in found}}
    for one in found:
        facts, weights = known[one.model]
        dtype = dtype_of(one.dtype)
        rows.append(
            (
                one.tp, one.pp, one.layers, one.output_length, one.batch, prompt, DTYPES.index(dtype), 1 if one.int8_kv else 2,
                facts.hidden, weights, facts.vocab, facts.kv_heads * facts.head_dim, facts.heads * facts.head_dim,
                facts.all_reduces,
            )
        )  # fmt: skip
    columns = np.array(rows, dtype=np.float64).reshape(-1, len(Settings._fields)).T
    return Settings(*columns)._replace(dtype=columns[6].astype(int))


def _by_ranks(tp: Floats) -> Floats:
    """How much of the constants at 2, 4 and 8 ranks `tp` ranks take: piecewise linear in log2(TP), 0 at one rank. [3, n]."""
    log = np.log2(tp)
    low = np.clip(np.floor(log), 0, 2)
    above = log - low
    return np.stack([np.where(low == at - 1, above, 0) + np.where(low == at, 1 - above, 0) for at in (1, 2, 3)])


def _depth(s: Settings) -> Floats:
    """What stages save over one deep stage: the sum of n^1.5 over stages (layers spread evenly) less N^1.5; 0 for one stage."""
    each, more = np.divmod(s.layers, s.pp)
    return np.asarray((s.pp - more) * each**DEPTH_POWER + more * (each + 1) ** DEPTH_POWER - s.layers**DEPTH_POWER)


def _one_of(values: Floats, index: np.ndarray) -> list[Floats]:
    """`values` in the column of its number format, 0 in the others."""
    return [np.where(index == place, values, 0.0) for place in range(len(DTYPES))]


_WEIGHT_BYTES = np.array([WEIGHT_BYTES[dtype] for dtype in DTYPES])


def latency_terms(s: Settings) -> tuple[Floats, Floats, Floats]:
    """Rows of `LATENCY_TERMS` in ms per unit, [n, terms] each: once per request, per output token, per token squared."""
    weight_bytes = s.weights * _WEIGHT_BYTES[s.dtype]
    ranks = _by_ranks(s.tp)
    tokens = s.prompt * s.batch
    flops = 2 * s.weights * np.maximum(0, tokens - RIDGE_TOKENS * _WEIGHT_BYTES[s.dtype])
    flops = flops + 2 * s.attention_width * s.prompt**2 * s.batch
    kv_gb = s.layers * 2 * s.kv_width * s.kv_bytes * s.batch / s.tp / 1e9
    reduced = tokens * s.hidden * 2
    slow = (reduced <= SLOW_BYTES) & (s.tp > 1)
    megabytes = s.layers * s.all_reduces * reduced / 1e6
    zero = np.zeros_like(s.tp)
    per_token = {
        "rest": zero + 1,
        "layer": s.layers,
        "head_gb": s.vocab * s.hidden * 2 / s.tp / 1e9,
        "depth": _depth(s),
        "kv_gb": kv_gb * s.prompt,
        "stage": s.pp - 1,
        "sequence": s.batch - 1,
        "sequence_flops": (s.batch - 1) * s.layers * 2 * s.weights / s.tp / 1e11,
    }
    per_token |= zip(LATENCY_GROUPS["bandwidth"][1:5], _one_of(s.layers * weight_bytes / s.tp / 1e9, s.dtype), strict=True)
    per_token |= zip(LATENCY_GROUPS["ranks"], [*ranks, *ranks * s.layers * s.all_reduces * s.hidden / 4096], strict=True)
    once = {"start": zero + 1, "stage_start": s.pp - 1}
    once |= zip(LATENCY_GROUPS["flops"], _one_of(s.layers * flops / s.tp / 1e11, s.dtype), strict=True)
    once |= zip(LATENCY_GROUPS["rank_start"], ranks, strict=True)
    fast = np.stack([np.ones_like(slow), ~slow, ~slow])
    once |= zip(LATENCY_GROUPS["links"], ranks * megabytes * fast, strict=True)
    once |= zip(LATENCY_GROUPS["slow_links"], ranks[1:] * megabytes * slow, strict=True)
    # on average o / 2 tokens of the answer are in the KV cache
    squared = {"kv_gb": kv_gb / 2}
    return tuple(np.stack([part.get(term, zero) for term in LATENCY_TERMS], axis=1) for part in (once, per_token, squared))  # type: ignore[return-value]


def memory_terms(s: Settings) -> Floats:
    """Rows of `MEMORY_TERMS` in GiB per unit, summed over GPUs. [n, terms]."""
    gib = 2.0**30
    prompt = np.maximum(s.prompt, MAX_INPUT)
    buffers = np.minimum(prompt * s.batch * s.hidden * 2, SLOW_BYTES * np.where(s.tp <= 2, 2, 1))
    pairs = s.pp * s.tp * (s.tp - 1)
    columns = {
        "layer_gib": s.layers * s.weights * _WEIGHT_BYTES[s.dtype] / gib,
        "ends_gib": 2 * s.vocab * s.hidden * 2 / gib,
        "gpu": s.tp * s.pp,
        "activation": s.tp * s.pp * prompt * s.hidden * 2 / gib,
        "kv_gib": s.layers * 2 * s.kv_width * s.kv_bytes * (prompt + s.length) * s.batch / gib,
        "batch_activation": (s.batch - 1) * s.tp * s.pp * prompt * s.hidden * 2 / gib,
        "group": np.where(s.tp > 1, 1.0, 0.0),
        "pairs": pairs,
        "pair_buffers": pairs * buffers / gib,
        "stage": s.pp - 1,
        "stage_ranks": s.tp * (s.pp - 1),
    }
    return np.stack([columns[term] for term in MEMORY_TERMS], axis=1)


def _divided(terms: Floats, measured: Sequence[float], found: Settings) -> Rows:
    return Rows(terms / np.array(measured)[:, None] if len(measured) else terms, noise_class(found.tp, found.pp))


def latency_rows(
    points: Mapping[Setting, Point], models: Mapping[str, ModelFacts], prompt: float, known: Settings | None = None
) -> Rows:
    """Latency measurements as rows for `hierarchy`. `known`: their settings, whatever the prompt, where they are there."""
    found = settings(list(points), models, prompt) if known is None else known.asking(prompt)
    once, token, squared = latency_terms(found)
    length = found.length[:, None]
    return _divided(once + length * token + length**2 * squared, [p.latency_s * 1e3 for p in points.values()], found)


def memory_rows(
    points: Mapping[Setting, Point], models: Mapping[str, ModelFacts], prompt: float, known: Settings | None = None
) -> Rows:
    """Memory measurements as rows for `hierarchy`. `known`: as in `latency_rows`."""
    found = settings(list(points), models, prompt) if known is None else known.asking(prompt)
    return _divided(memory_terms(found), [p.memory_gib for p in points.values()], found)
