"""How long tuning takes, as jobs of tasklets, for every system of the figures (sheet 2.5, 3).

All are LoRA on frozen base weights: the backward pass computes input gradients only, so its matrix products cost what
the forward ones do; attention's backward costs 2.5 times its forward (FlashAttention-2, section 3.2). Adapter products
are left out: rank 8 adds 0.06 % of the FLOPs. Prices come from the same operator costs as serving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from systems.common.hardware import Testbed
from systems.common.hardware.cost import Chunk, OperatorCosts
from systems.common.hardware.interference import MPS, Tenant
from systems.common.models import ModelShape
from systems.llmstation.tasklets import Phase, TuningJob

ATTENTION_BACKWARD = 2.5
ADAM_BYTES = 28  # per fp32 parameter: read weight, gradient, two moments; write weight and two moments
KERNELS_PER_LAYER = 5  # the large ones: q/k/v, attention, output, gate/up, down
COUNTED_TOKENS = 512  # every system's throughput is in samples of 512 tokens (sheet 3)


@dataclass(frozen=True, slots=True)
class Reach:
    """FLOP/s and bytes/s that a layer's matrix products reach on this cost model, by which loads are normalised."""

    flops: float
    bytes: float

    @classmethod
    def of(cls, costs: OperatorCosts, shape: ModelShape, tp: int) -> Reach:
        """From the cost of one layer at 2,048 tokens (bound by arithmetic) and at one (bound by memory)."""
        return cls(
            2048 * shape.layer_flops_per_token / tp / costs.layer_linear_s(2048),
            shape.layer_weight_bytes / tp / costs.layer_linear_s(1),
        )


@dataclass(frozen=True, slots=True)
class Layers:
    """Prices one decoder layer of `shape` on one of `tp` GPUs, serving and tuning alike, with the load it puts on the GPU."""

    costs: OperatorCosts
    shape: ModelShape
    tp: int
    reach: Reach

    @classmethod
    def of(cls, costs: OperatorCosts, shape: ModelShape, tp: int) -> Layers:
        """With the reach measured on `costs` itself."""
        return cls(costs, shape, tp, Reach.of(costs, shape, tp))

    def attention_s(self, tokens: int, past: int = 0) -> float:
        """One layer's causal attention of one sample."""
        return self.costs.attention_s([Chunk(tokens, past)], 0, 0)

    def reduces_s(self, tokens: int) -> float:
        """The two all-reduces of a layer."""
        return 2 * self.costs.all_reduce_s(int(tokens * self.shape.hidden * self.shape.dtype_bytes))

    def load(self, tokens: float, attention_flops: float, kv_bytes: float, busy_s: float, total_s: float) -> Tenant:
        """The load of `tokens` tokens through one layer's weights, busy for `busy_s` of `total_s` seconds."""
        flops = (tokens * self.shape.layer_flops_per_token + attention_flops) / self.tp
        moved = (self.shape.layer_weight_bytes + kv_bytes) / self.tp
        return Tenant(
            min(1.0, flops / self.reach.flops / total_s),
            min(1.0, moved / self.reach.bytes / total_s),
            busy_s / KERNELS_PER_LAYER,
            min(1.0, busy_s / total_s),
        )

    def decode(self, decodes: int, context: int) -> tuple[float, Tenant]:
        """One decode layer: seconds and load."""
        busy = self.costs.layer_linear_s(decodes) + self.costs.attention_s((), decodes, context)
        total = busy + self.reduces_s(decodes)
        kv_bytes = context * self.shape.layer_kv_bytes_per_token
        return total, self.load(decodes, 4 * self.shape.q_width * context, kv_bytes, busy, total)

    def forward(self, tokens: int) -> tuple[float, Tenant]:
        """One forward layer of a sequence of `tokens`, a prompt's or a sample's: seconds and load."""
        busy = self.costs.layer_linear_s(tokens) + self.attention_s(tokens)
        total = busy + self.reduces_s(tokens)
        return total, self.load(tokens, self.shape.layer_attention_flops(tokens), 0, busy, total)

    def backward(self, tokens: int) -> tuple[float, Tenant]:
        """One backward layer of a sample: seconds and load."""
        busy = self.costs.layer_linear_s(tokens) + ATTENTION_BACKWARD * self.attention_s(tokens)
        total = busy + self.reduces_s(tokens)
        flops = ATTENTION_BACKWARD * self.shape.layer_attention_flops(tokens)
        return total, self.load(tokens, flops, 0, busy, total)

    def tuning_s(self, phase: str, tokens: int) -> float:
        """One layer of a sample in `phase`, seconds; of `recompute` the products alone."""
        if phase == "recompute":
            return self.costs.layer_linear_s(tokens)
        return (self.forward(tokens) if phase == "forward" else self.backward(tokens))[0]

    def head(self, tokens: int) -> float:
        """LM head forward and backward over every position of a sample: seconds."""
        return 2 * 2 * tokens * self.shape.hidden * self.shape.vocab / self.tp / self.reach.flops


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Trainable parameters of LoRA on q, k and v."""
    return shape.layers * rank * (3 * shape.hidden + shape.q_width + 2 * shape.kv_width)


def shared_job(layers: Layers, tokens: int, rank: int) -> TuningJob:
    """LLMStation's and FineInfer's tuning: tensor parallel on the shared weights, no recomputation, AdamW every sample."""
    shape = layers.shape
    forward_s, forward = layers.forward(tokens)
    backward_s, backward = layers.backward(tokens)
    adam_s = ADAM_BYTES * lora_parameters(shape, rank) / layers.reach.bytes
    # the loss and the head, cut along the sequence into tasklets about as long as a layer's, open the backward phase; the
    # optimizer's step closes it
    head_s = layers.head(tokens)
    tasklets = shape.layers + max(1, round(head_s / backward_s))
    tasklet_s = (shape.layers * backward_s + head_s + adam_s) / tasklets
    return TuningJob(
        (Phase("forward", shape.layers, forward_s, forward), Phase("backward", tasklets, tasklet_s, backward)), tokens
    )


def sharded_job(whole: Layers, testbed: Testbed, tokens: int, sm_limit: float) -> TuningJob:
    """Torchtune's tuning: FSDP over all GPUs, each with its own packed sequence of `tokens`, activation checkpointing.

    A layer's weights are gathered from the other GPUs once for the forward pass and once for the backward pass (which
    recomputes the forward), overlapped with the previous layer's arithmetic; the slower of the two sets the pace.

    Args:
        whole: prices of undivided layers (tensor parallel degree 1).
        testbed: the GPUs, whose link carries the gathers.
        tokens: length of each sequence; `COUNTED_TOKENS` is one sample.
        sm_limit: share of the SMs that an MPS thread percentage leaves to the tuner.
    """
    gpus, shape = testbed.count, whole.shape
    gather_s = 0.0 if gpus == 1 else shape.layer_weight_bytes * (gpus - 1) / gpus / testbed.gpu.link(gpus)
    attention_s, linear_s = whole.attention_s(tokens), whole.costs.layer_linear_s(tokens)
    attention_flops = shape.layer_attention_flops(tokens)
    phases = []
    for name, products, attentions in (("forward", 1, 1.0), ("backward", 2, 1 + ATTENTION_BACKWARD)):
        head_s = whole.head(tokens) / shape.layers if name == "backward" else 0.0
        busy = products * linear_s + attentions * attention_s
        total = max(busy, gather_s)
        load = whole.load(products * tokens, attentions * attention_flops, 0, busy, total)
        kernel_s = busy / (products * KERNELS_PER_LAYER)
        limited = replace(load, kernel_s=kernel_s, sm_limit=sm_limit, way=MPS)
        phases.append(Phase(name, shape.layers, total + head_s, limited))
    return TuningJob(tuple(phases), tokens, gpus * tokens / COUNTED_TOKENS)


def precise_chunks_s(layers: Layers, tokens: int, chunk: int) -> float:
    """One sample of `tokens` by exact chunked training in chunks of `chunk` (Figure 4), alone on the GPU, seconds.

    Forward in order with a growing KV cache, backward in reverse with each chunk's attention recomputed: every weight is read
    twice per chunk (sheet 3).
    """
    total = 0.0
    for past in range(0, tokens, chunk):
        size = min(chunk, tokens - past)
        products = 2 * (layers.costs.layer_linear_s(size) + layers.reduces_s(size))
        attentions = (2 + ATTENTION_BACKWARD) * layers.attention_s(size, past)
        total += layers.shape.layers * (products + attentions) + layers.head(size)
    return total
