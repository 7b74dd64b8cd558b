"""Operator times from a datasheet: max(FLOPs / (peak x efficiency), bytes / (bandwidth x efficiency)) + launch.

The maximum is rounded where its two sides meet (`Efficiencies.knee`): a kernel that is bound by both overlaps them
imperfectly, and decode batches of 64 to 256 sequences live there. What each operator does is in `work`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from systems.common.hardware.attention import TILE_ROWS, keys_walked
from systems.common.hardware.cost import Affine, Chunk
from systems.common.hardware.curve import Curve
from systems.common.hardware.datasheet import Gpu
from systems.common.hardware.efficiencies import Efficiencies, rounded_max
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

SAMPLER_KERNELS = 8  # soft-max, top-k/top-p filter, draw: what vLLM's greedy-plus-temperature sampler launches
SAMPLER_BYTES_PER_LOGIT = 14  # read in 16 bits, written as fp32, read twice more


@dataclass(frozen=True)
class RooflineCosts:
    """`OperatorCosts` from a datasheet and `Efficiencies`, for `model` on one of `tp` GPUs of type `gpu`.

    `ring`: seconds of an all-reduce among those GPUs by bytes, where it was measured.
    """

    model: ModelShape
    gpu: Gpu
    tp: int = 1
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    ring: Curve | None = None
    _linear: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    _head: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.tp >= 1, self

    @property
    def source(self) -> str:
        """For a figure's footer, e.g. `roofline rtx3090, efficiencies of rtx4090`."""
        computed = self.gpu.dtype(self.model.dtype)
        swapped = "" if computed == self.model.dtype else f" in {computed}"
        measured = "" if self.ring is None or self.tp == 1 else ", all-reduces measured"
        return f"roofline {self.gpu.name}{swapped}, {self.efficiencies.source}{measured}"

    @property
    def flops_per_s(self) -> float:
        """The GPU's peak in the model's number format."""
        return self.gpu.flops[self.gpu.dtype(self.model.dtype)]

    def gemm_s(self, rows: int, inner: float, columns: float) -> float:
        """Seconds of a product of (rows x inner) with (inner x columns) in the model's number format."""
        work = gemm_work(rows, inner, columns, self.model.dtype_bytes)
        compute = work.flops / (self.flops_per_s * self.efficiencies.gemm_compute)
        memory = work.bytes / (self.gpu.bandwidth * self.efficiencies.gemm_memory)
        return rounded_max(compute, memory, self.efficiencies.knee) + self.efficiencies.gemm_launch_s

    def elementwise_s(self, moved_bytes: float) -> float:
        """Seconds of a kernel that only moves `moved_bytes`."""
        return moved_bytes / (self.gpu.bandwidth * self.efficiencies.elementwise) + self.efficiencies.launch_s

    def operators_s(self, tokens: int) -> dict[str, float]:
        """Seconds per token-wise operator of one layer; the two norms appear as one entry for each of them."""
        times = {name: self.gemm_s(tokens, *shape) for name, shape in gemm_shapes(self.model, self.tp).items()}
        for name, size in elementwise_bytes(self.model, self.tp).items():
            times[name] = self.elementwise_s(tokens * size) if size else 0.0
        return times

    def layer_linear_s(self, tokens: int) -> float:
        """See `OperatorCosts`; remembered per token count."""
        found = self._linear.get(tokens)
        if found is None:
            times = self.operators_s(tokens)
            found = self._linear[tokens] = sum(times.values()) + times["layernorm"] if tokens else 0.0
        return found

    def head_s(self, sequences: int) -> float:
        """See `OperatorCosts`. The head is split over the vocabulary; its rows are gathered before sampling."""
        found = self._head.get(sequences)
        if found is None:
            found = self._head[sequences] = self._head_s(sequences) if sequences else 0.0
        return found

    def _head_s(self, sequences: int) -> float:
        return self.lm_head_s(sequences) + self.gather_s(sequences) + self.sampler_s(sequences)

    def lm_head_s(self, sequences: int) -> float:
        """Seconds of the LM head's product alone."""
        return self.gemm_s(sequences, self.model.hidden, self.model.vocab / self.tp)

    def sampler_s(self, sequences: int) -> float:
        """Seconds of sampling from whole rows of logits."""
        moved = sequences * self.model.vocab * SAMPLER_BYTES_PER_LOGIT
        return self.elementwise_s(moved) + (SAMPLER_KERNELS - 1) * self.efficiencies.launch_s

    def gather_s(self, sequences: int) -> float:
        """Seconds to gather the vocabulary's shards: half of an all-reduce of the logits."""
        return self.all_reduce_s(int(sequences * self.model.vocab * self.model.dtype_bytes)) / 2

    def embedding_s(self, tokens: int) -> float:
        """See `OperatorCosts`: one gather and one norm."""
        if not tokens:
            return 0.0
        row = self.model.hidden * self.model.dtype_bytes
        return self.elementwise_s(2 * tokens * row) + self.elementwise_s(4 * tokens * row)

    def attention_s(self, chunks: Sequence[Chunk], decodes: int, decode_context: int) -> float:
        """See `OperatorCosts`. One fused kernel: its parts add, its launch is counted once.

        Beside a prefill, a decode is a tile with one row of its 64 in use: it walks its keys at the prefill's pace, or
        at the memory's where that is slower.
        """
        if not chunks:
            return self.decode_attention(decodes, decode_context).at(decode_context)
        decode = decodes * self._row_s + decode_context * self._mixed_key_s
        return self.efficiencies.attention_launch_s + self._prefill_s(chunks) + decode

    def decode_attention(self, decodes: int, decode_context: int) -> Affine:
        """See `OperatorCosts`: one straight line holds for every context."""
        if not decodes:
            return Affine(0.0, 0.0)
        return Affine(self.efficiencies.attention_launch_s + decodes * self._row_s, self._key_s)

    @cached_property
    def _heads(self) -> int:
        return ceil(self.model.heads / self.tp)

    @cached_property
    def _row_s(self) -> float:
        """Seconds per decode whatever its context: its query and output, and a thread block per KV head."""
        blocks = kv_heads_per_gpu(self.model, self.tp) / self.gpu.sms
        return self._attention_bytes_s(decode_row_bytes(self.model, self.tp)) + blocks * self.efficiencies.attention_block_s

    @cached_property
    def _key_s(self) -> float:
        """Seconds per token in the KV cache of a decode: the query heads of a group share what is read."""
        compute = 4 * self.model.q_width / self.tp / (self.flops_per_s * self.efficiencies.prefill_attention)
        return max(self._attention_bytes_s(self._key_bytes), compute)

    @cached_property
    def _mixed_key_s(self) -> float:
        """Seconds per token in the KV cache of a decode that shares its kernel with a prefill."""
        return max(self._attention_bytes_s(self._key_bytes), self._heads * self._tile_key_s / self.gpu.sms)

    @cached_property
    def _tile_key_s(self) -> float:
        """Seconds in which one SM takes a tile past one key."""
        flops = 4 * TILE_ROWS * self.model.head_dim
        return flops / (self.flops_per_s / self.gpu.sms * self.efficiencies.prefill_attention)

    @cached_property
    def _key_bytes(self) -> float:
        return kv_heads_per_gpu(self.model, self.tp) / self.model.kv_heads * self.model.layer_kv_bytes_per_token

    def _attention_bytes_s(self, moved_bytes: float) -> float:
        return moved_bytes / (self.gpu.bandwidth * self.efficiencies.decode_attention)

    def _prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """Seconds of prefill chunks, without the launch."""
        compute = keys_walked(chunks, self._heads, self.gpu.sms) * self._tile_key_s
        memory = self._attention_bytes_s(prefill_bytes(self.model, self.tp, chunks))
        return rounded_max(compute, memory, self.efficiencies.knee)

    def all_reduce_s(self, size_bytes: int) -> float:
        """See `OperatorCosts`: as measured, or a ring, 2 (tp - 1) / tp of the bytes over the slowest hop."""
        if self.tp == 1 or not size_bytes:
            return 0.0
        if self.ring is not None:
            return self.ring.at(size_bytes)
        bandwidth = self.gpu.link(self.tp) * self.efficiencies.all_reduce
        return self.efficiencies.all_reduce_latency_s + ring_bytes(size_bytes, self.tp) / bandwidth
