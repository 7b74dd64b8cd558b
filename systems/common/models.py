"""Shapes of the decoder-only transformers that the papers serve, and what follows from a shape.

Contents:

* `ModelShape`: layers, widths, vocabulary and number format of one model; parameters, bytes and FLOPs as properties.
* `MODELS`: the shapes by name. `model(name)` finds one or says which names are close.

A shape holds no weights: the simulated backend prices it, the measured backend fills it with random numbers. Sizes
are bytes, FLOPs count a multiply and an add as two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from systems.common.errors import InputError

DTYPE_BYTES: Mapping[str, float] = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One decoder-only transformer.

    `gated` MLPs have three matrices (gate, up, down: LLaMA), others two (up, down: GPT, OPT). `biases` adds a bias to
    every projection and to the norms (LayerNorm instead of RMSNorm); `qkv_biases` only to q, k and v (Qwen2).
    `positions` is the length of a learned position table (0 for rotary embeddings). `tied` models share the token
    embedding with the head.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    gated: bool = True
    tied: bool = False
    biases: bool = False
    qkv_biases: bool = False
    positions: int = 0
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.mlp, self.vocab)
        assert min(sizes) >= 1 and self.positions >= 0, self
        assert self.heads % self.kv_heads == 0, self
        assert self.dtype in DTYPE_BYTES, self

    def with_dtype(self, dtype: str) -> ModelShape:
        """This shape stored and computed in `dtype`.

        Raises InputError for a number format that is not in `DTYPE_BYTES`.
        """
        if dtype not in DTYPE_BYTES:
            raise InputError("model", "dtype", dtype, f"use one of {', '.join(DTYPE_BYTES)}")
        return replace(self, dtype=dtype)

    @property
    def dtype_bytes(self) -> float:
        """Bytes per weight, activation and KV entry."""
        return DTYPE_BYTES[self.dtype]

    @property
    def q_width(self) -> int:
        """Width of the query projection's output and of the attention output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the key projection's output (the value's is the same)."""
        return self.kv_heads * self.head_dim

    @property
    def up_width(self) -> int:
        """Width of the first MLP product: gate and up side by side where the MLP is gated."""
        return (2 if self.gated else 1) * self.mlp

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's q, k, v and output projections."""
        qkv = self.q_width + 2 * self.kv_width
        biases = (qkv + self.hidden) * self.biases + qkv * self.qkv_biases
        return self.hidden * (qkv + self.q_width) + biases

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one layer's MLP."""
        return self.hidden * (self.up_width + self.mlp) + (self.up_width + self.hidden) * self.biases

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm: a scale, and a shift where the model has biases."""
        return self.hidden * (1 + self.biases)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: attention, MLP and two norms."""
        return self.attention_parameters + self.mlp_parameters + 2 * self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding and of learned positions."""
        return (self.vocab + self.positions) * self.hidden

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head; 0 where it is the token embedding."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters: layers, embedding, head, final norm."""
        ends = self.embedding_parameters + self.head_parameters + self.norm_parameters
        return self.layers * self.layer_parameters + ends

    @property
    def layer_weight_bytes(self) -> int:
        """Bytes of one decoder layer's weights."""
        return int(self.layer_parameters * self.dtype_bytes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return int(self.parameters * self.dtype_bytes)

    @property
    def layer_kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in one layer's KV cache."""
        return int(2 * self.kv_width * self.dtype_bytes)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in the KV cache, all layers."""
        return self.layers * self.layer_kv_bytes_per_token

    @property
    def layer_flops_per_token(self) -> int:
        """FLOPs of one layer's matrix products for one token, attention scores left out."""
        return 2 * self.hidden * (2 * self.q_width + 2 * self.kv_width + self.up_width + self.mlp)

    def layer_attention_flops(self, tokens: int, past: int = 0) -> int:
        """FLOPs of one layer's causal attention: `tokens` new tokens that follow `past` cached ones.

        Token i sees past + i + 1 keys; scores and values cost 2 FLOPs per key and head dimension each.
        """
        keys_seen = tokens * past + tokens * (tokens + 1) // 2
        return 4 * self.q_width * keys_seen


def _gpt(name: str, layers: int, hidden: int, vocab: int, heads: int = 0, positions: int = 2048) -> ModelShape:
    """A GPT-shaped model: MLP four times the width, biases, learned positions, tied head, heads of 128."""
    heads = heads or hidden // 128
    return ModelShape(
        name, layers, hidden, heads, heads, 128, 4 * hidden, vocab, gated=False, tied=True, biases=True, positions=positions
    )


# Sources: each model's config.json on the Hugging Face hub, except SpotServe's gpt-20b and llama-30b-standin
# (ASPLOS '24 artifact, FasterTransformer configurations `h6144` and `h7168`, fp32 in that paper). Its "LLaMA-30B" is a
# GPT-shaped stand-in of LLaMA's size. Its OPT-6.7B pads the vocabulary to 51,200 and runs in fp32: use with_dtype("fp32").
_SHAPES = (
    ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
    ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256),
    ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000, dtype="fp16"),
    ModelShape("llama-2-13b", 40, 5120, 40, 40, 128, 13824, 32000, dtype="fp16"),
    ModelShape("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000, dtype="fp16"),
    replace(_gpt("opt-6.7b", 32, 4096, vocab=50272, positions=2050), dtype="fp16"),
    replace(_gpt("gpt-20b", 44, 6144, vocab=51200), dtype="fp32"),
    replace(_gpt("llama-30b-standin", 48, 7168, vocab=50304), dtype="fp32"),
    ModelShape("qwen2-0.5b", 24, 896, 14, 2, 64, 4864, 151936, tied=True, qkv_biases=True),
    # small enough for a CPU: our own shape, of no published model
    ModelShape("tiny", 2, 64, 4, 2, 16, 128, 256, dtype="fp32"),
)
MODELS: Mapping[str, ModelShape] = {shape.name: shape for shape in _SHAPES}


def model(name: str, where: str = "model") -> ModelShape:
    """The shape called `name`; `where` is the file or option that an error must blame.

    Raises InputError with the closest names when there is none.
    """
    if name in MODELS:
        return MODELS[name]
    raise InputError(where, "model", name, f"use one of {', '.join(close_names(name, MODELS))}")


def close_names(name: object, known: Mapping[str, object]) -> list[str]:
    """The names in `known` that look like `name`, best first; all of them when none does."""
    return get_close_matches(str(name).lower(), list(known), n=3, cutoff=0.6) or sorted(known)
