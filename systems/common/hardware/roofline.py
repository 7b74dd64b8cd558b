"""Operator times from a datasheet: max(FLOPs / (peak x efficiency), bytes / (bandwidth x efficiency)) + launch.

Contents:

* `Efficiencies`: which share of the datasheet's peaks each class of operator reaches. All ones is the bare datasheet.
* `gemm_s`, `elementwise_s`: the two roofline formulas, used by `RooflineCosts` and by the fit, so that both mean the same.
* `RooflineCosts`: the roofline as an `OperatorCosts` for one model shape, GPU and tensor-parallel degree.

Tensor parallelism follows Megatron-LM (arXiv 1909.08053, section 3): q, k, v, gate and up are split by column, output
and down by row, the vocabulary across the GPUs; norms are repeated on every GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from systems.common.hardware.cost import Affine, Chunk
from systems.common.hardware.datasheet import Gpu
from systems.common.models import ModelShape

SAMPLER_KERNELS = 8  # soft-max, top-k/top-p filter, draw: what vLLM's greedy-plus-temperature sampler launches
SAMPLER_BYTES_PER_LOGIT = 14  # read in 16 bits, written as fp32, read twice more


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """The reached share of each peak, by class of operator, and the fixed times that no datasheet states.

    A share above 1 is possible for `elementwise` and `decode_attention`: data that stay in L2 beat the memory's
    bandwidth. `launch_s` is added to every kernel, `all_reduce_latency_s` to every all-reduce per GPU in the ring
    beyond the first. `source` says where the numbers come from and is shown in figure footers.
    """

    gemm_compute: float = 1.0
    gemm_memory: float = 1.0
    prefill_attention: float = 1.0
    decode_attention: float = 1.0
    elementwise: float = 1.0
    all_reduce: float = 1.0
    launch_s: float = 3e-6
    all_reduce_latency_s: float = 10e-6
    source: str = "datasheet"

    def __post_init__(self) -> None:
        shares = (self.gemm_compute, self.gemm_memory, self.prefill_attention, self.decode_attention)
        assert min(*shares, self.elementwise, self.all_reduce) > 0, self
        assert self.launch_s >= 0 and self.all_reduce_latency_s >= 0, self


@dataclass(frozen=True, slots=True)
class Work:
    """What one kernel does: floating-point operations and bytes that cross the memory bus."""

    flops: float
    bytes: float


def gemm_work(rows: int, inner: float, columns: float, dtype_bytes: float) -> Work:
    """A product of (rows x inner) activations with (inner x columns) weights; both and the result cross the bus once."""
    moved = (inner * columns + rows * (inner + columns)) * dtype_bytes
    return Work(2.0 * rows * inner * columns, moved)


def gemm_s(work: Work, gpu: Gpu, flops_per_s: float, efficiencies: Efficiencies) -> float:
    """Seconds of one matrix product."""
    compute = work.flops / (flops_per_s * efficiencies.gemm_compute)
    memory = work.bytes / (gpu.bandwidth * efficiencies.gemm_memory)
    return max(compute, memory) + efficiencies.launch_s


def elementwise_s(moved_bytes: float, gpu: Gpu, efficiencies: Efficiencies) -> float:
    """Seconds of one kernel that only moves bytes."""
    return moved_bytes / (gpu.bandwidth * efficiencies.elementwise) + efficiencies.launch_s


def gemm_shapes(model: ModelShape, tp: int) -> dict[str, tuple[float, float]]:
    """(inner, columns) of one layer's matrix products on one of `tp` GPUs, by operator name."""
    return {
        "qkv_proj": (model.hidden, (model.q_width + 2 * model.kv_width) / tp),
        "o_proj": (model.q_width / tp, model.hidden),
        "gate_up_proj": (model.hidden, model.up_width / tp),
        "down_proj": (model.mlp / tp, model.hidden),
    }


def elementwise_bytes(model: ModelShape, tp: int) -> dict[str, float]:
    """Bytes per token that one layer's other kernels move on one of `tp` GPUs, by operator name.

    `layernorm` (there are two) adds the residual in the same kernel: it reads and writes two rows.
    """
    size = model.dtype_bytes
    rotary = 0.0 if model.positions else 2 * (model.q_width + model.kv_width) / tp * size
    return {
        "layernorm": 4 * model.hidden * size,
        "rotary_emb": rotary,
        "act_fn": (model.up_width + model.mlp) / tp * size,
    }


@dataclass(frozen=True)
class RooflineCosts:
    """`OperatorCosts` from a datasheet and `Efficiencies`, for `model` on one of `tp` GPUs of type `gpu`."""

    model: ModelShape
    gpu: Gpu
    tp: int = 1
    efficiencies: Efficiencies = Efficiencies()
    _linear: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    _heads: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.tp >= 1, self

    @property
    def source(self) -> str:
        """For a figure's footer, e.g. `roofline rtx3090, efficiencies of rtx4090`."""
        computed = self.gpu.dtype(self.model.dtype)
        swapped = "" if computed == self.model.dtype else f" in {computed}"
        return f"roofline {self.gpu.name}{swapped}, {self.efficiencies.source}"

    @property
    def flops_per_s(self) -> float:
        """The GPU's peak in the model's number format."""
        return self.gpu.flops[self.gpu.dtype(self.model.dtype)]

    def gemm_s(self, rows: int, inner: float, columns: float) -> float:
        """Seconds of a product of (rows x inner) with (inner x columns) in the model's number format."""
        work = gemm_work(rows, inner, columns, self.model.dtype_bytes)
        return gemm_s(work, self.gpu, self.flops_per_s, self.efficiencies)

    def elementwise_s(self, moved_bytes: float) -> float:
        """Seconds of a kernel that moves `moved_bytes`."""
        return elementwise_s(moved_bytes, self.gpu, self.efficiencies)

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
        found = self._heads.get(sequences)
        if found is None:
            found = self._heads[sequences] = self._head_s(sequences) if sequences else 0.0
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
        """See `OperatorCosts`. One fused kernel: its parts add, its launch is counted once."""
        if not chunks:
            return self.decode_attention(decodes, decode_context).at(decode_context)
        parts = sum(self._chunk_s(chunk) for chunk in chunks)
        return parts + self.efficiencies.launch_s + self._decode_part_s(decodes, decode_context)

    def decode_attention(self, decodes: int, decode_context: int) -> Affine:  # noqa: ARG002 (one line for every context)
        """See `OperatorCosts`: one straight line for all contexts."""
        if not decodes:
            return Affine(0.0, 0.0)
        return Affine(self.efficiencies.launch_s + decodes * self._row_s, self._key_s)

    def _decode_part_s(self, decodes: int, decode_context: int) -> float:
        return decodes * self._row_s + decode_context * self._key_s if decodes else 0.0

    @property
    def _row_s(self) -> float:
        """Seconds to read one token's query and write its output."""
        moved = 2 * self.model.q_width / self.tp * self.model.dtype_bytes
        return moved / (self.gpu.bandwidth * self.efficiencies.decode_attention)

    @property
    def _key_s(self) -> float:
        """Seconds that a decode spends per token in its KV cache."""
        memory = self.model.layer_kv_bytes_per_token / self.tp / (self.gpu.bandwidth * self.efficiencies.decode_attention)
        compute = 4 * self.model.q_width / self.tp / (self.flops_per_s * self.efficiencies.prefill_attention)
        return max(memory, compute)

    def _chunk_s(self, chunk: Chunk) -> float:
        """Seconds of one prefill chunk, without the launch."""
        flops = self.model.layer_attention_flops(chunk.tokens, chunk.past) / self.tp
        rows = 2 * chunk.tokens * self.model.q_width * self.model.dtype_bytes
        keys = (chunk.tokens + chunk.past) * self.model.layer_kv_bytes_per_token
        compute = flops / (self.flops_per_s * self.efficiencies.prefill_attention)
        memory = (rows + keys) / self.tp / (self.gpu.bandwidth * self.efficiencies.decode_attention)
        return max(compute, memory)

    def all_reduce_s(self, size_bytes: int) -> float:
        """See `OperatorCosts`: a ring, 2 (tp - 1) / tp of the bytes over the slowest hop."""
        if self.tp == 1 or not size_bytes:
            return 0.0
        steps = 2 * (self.tp - 1)
        moved = steps / self.tp * size_bytes
        return self.efficiencies.all_reduce_latency_s * (self.tp - 1) + moved / (
            self.gpu.link(self.tp) * self.efficiencies.all_reduce
        )
