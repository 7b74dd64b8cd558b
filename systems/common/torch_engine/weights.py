# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Weights of a decoder-only transformer: random ones, or safetensors with Hugging Face names.

q, k and v are one matrix, and so are gate and up: one product instead of three or two. All matrices are [outputs, inputs].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.numerics import DTYPES


@dataclass(slots=True)
class Norm:
    """Gain and, for LayerNorm, shift; [hidden]."""

    gain: Tensor
    shift: Tensor | None = None


@dataclass(slots=True)
class Linear:
    """A matrix [outputs, inputs] and its bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(slots=True)
class Layer:
    """One decoder layer; `qkv` holds q | k | v, `up` holds gate | up where the MLP is gated."""

    norm1: Norm
    qkv: Linear
    o: Linear
    norm2: Norm
    up: Linear
    down: Linear


@dataclass(slots=True)
class Weights:
    """A whole model. `head` is `embedding` itself where the two are tied; `positions` is the learned position table."""

    embedding: Tensor
    positions: Tensor | None
    layers: list[Layer]
    norm: Norm
    head: Tensor


Source = Callable[[str, tuple[int, ...]], Tensor]
"""Gives the tensor of a Hugging Face name, which must have the given shape."""


@dataclass(frozen=True, slots=True)
class Names:
    """Where Hugging Face keeps what; `{i}` is the layer."""

    embedding: str
    positions: str
    norm: str
    layer: str
    norm1: str
    norm2: str
    o: str
    ups: tuple[str, ...]
    down: str


LLAMA = Names(
    "model.embed_tokens", "", "model.norm", "model.layers.{i}.", "input_layernorm", "post_attention_layernorm",
    "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
)  # fmt: skip
OPT = Names(
    "model.decoder.embed_tokens",
    "model.decoder.embed_positions",
    "model.decoder.final_layer_norm",
    "model.decoder.layers.{i}.",
    "self_attn_layer_norm",
    "final_layer_norm",
    "self_attn.out_proj",
    ("fc1",),
    "fc2",
)


def _names(shape: ModelShape) -> Names:
    return LLAMA if shape.gated else OPT


def build(shape: ModelShape, source: Source) -> Weights:
    """Weights of `shape`, every tensor taken from `source` by its Hugging Face name."""
    names, hidden = _names(shape), shape.hidden

    def norm(name: str) -> Norm:
        return Norm(source(name + ".weight", (hidden,)), source(name + ".bias", (hidden,)) if shape.biases else None)

    def linear(modules: list[tuple[str, int]], inputs: int, biased: bool) -> Linear:
        parts = [source(name + ".weight", (outputs, inputs)) for name, outputs in modules]
        biases = [source(name + ".bias", (outputs,)) for name, outputs in modules] if biased else []
        return Linear(_joined(parts), _joined(biases) if biased else None)

    def layer(i: int) -> Layer:
        at = names.layer.format(i=i)
        qkv = [
            (at + f"self_attn.{x}_proj", width) for x, width in zip("qkv", (shape.q_width, *[shape.kv_width] * 2), strict=True)
        ]
        return Layer(
            norm(at + names.norm1),
            linear(qkv, hidden, shape.biases or shape.qkv_biases),
            linear([(at + names.o, hidden)], shape.q_width, shape.biases),
            norm(at + names.norm2),
            linear([(at + up, shape.mlp) for up in names.ups], hidden, shape.biases),
            linear([(at + names.down, hidden)], shape.mlp, shape.biases),
        )

    embedding = source(names.embedding + ".weight", (shape.vocab, hidden))
    positions = source(names.positions + ".weight", (shape.positions, hidden)) if shape.positions else None
    head = embedding if shape.tied else source("lm_head.weight", (shape.vocab, hidden))
    return Weights(embedding, positions, [layer(i) for i in range(shape.layers)], norm(names.norm), head)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def random_weights(shape: ModelShape, seed: int = 0, device: torch.device | str = "cpu") -> Weights:
    """Normal weights with deviation 1 / sqrt(inputs), gains near 1, the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[shape.dtype]

    def source(name: str, size: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(size, dtype=dtype, device=device)
        if len(size) == 2:
            return tensor.normal_(0, 1 / math.sqrt(size[1]), generator=generator)
        tensor.normal_(0, 0.1, generator=generator)
        return tensor if name.endswith(".bias") else tensor.add_(1)

    return build(shape, source)


def load(
    shape: ModelShape, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu", where: str = "weights"
) -> Weights:
    """Weights from `tensors` by Hugging Face name, in the shape's number format on `device`.

    Raises:
        InputError: a tensor is missing, or has another shape than the model's.
    """
    dtype = DTYPES[shape.dtype]

    def source(name: str, size: tuple[int, ...]) -> Tensor:
        if name not in tensors:
            raise InputError(where, "tensor", name, f"missing: {shape.name} needs it; is this another model's file?")
        if tuple(tensors[name].shape) != size:
            raise InputError(where, name, tuple(tensors[name].shape), f"has the wrong shape: {shape.name} needs {size}")
        return tensors[name].to(device=device, dtype=dtype)

    return build(shape, source)


def load_safetensors(shape: ModelShape, folder: Path, device: torch.device | str = "cpu") -> Weights:
    """Weights from all `*.safetensors` files in `folder`.

    Raises:
        InputError: no file, a file that is not safetensors, or what `load` refuses.
    """
    from safetensors import SafetensorError, safe_open  # only who loads a real model needs the package

    class Files(Mapping[str, Tensor]):
        """All tensors of the folder, read when asked for."""

        def __init__(self) -> None:
            self.files: dict[str, Path] = {}
            for file in sorted(folder.glob("*.safetensors")):
                try:
                    with safe_open(file, framework="pt") as opened:
                        self.files.update(dict.fromkeys(opened.keys(), file))
                except (SafetensorError, OSError) as error:
                    raise InputError(file, "weights", str(error), "not a whole safetensors file: copy it again") from error

        def __getitem__(self, name: str) -> Tensor:
            with safe_open(self.files[name], framework="pt") as opened:
                return opened.get_tensor(name)

        def __iter__(self) -> Iterator[str]:
            return iter(self.files)

        def __len__(self) -> int:
            return len(self.files)

    files = Files()
    if not files:
        raise InputError(folder, "weights", "*.safetensors", "no such file in the folder: name the one that holds the model")
    return load(shape, files, device, where=str(folder))
