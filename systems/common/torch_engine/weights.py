# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Weights of a decoder-only transformer: random ones, or safetensors with Hugging Face names.

q, k and v are one matrix, and so are gate and up: one product instead of three or two. All matrices are [outputs, inputs].
A rank of several builds its `Place` of the whole; `dtype` "int8" or "int4" quantises the layers' matrices on the way
(embedding, head and norms keep the model's format). Whatever the place, the numbers are those of the whole model.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine import quantised
from systems.common.torch_engine.linear import Linear
from systems.common.torch_engine.memory import or_say_what_to_lower
from systems.common.torch_engine.numerics import DTYPES
from systems.common.torch_engine.placement import Place, Span

__all__ = ["Layer", "Linear", "Norm", "Weights", "build", "load", "load_safetensors", "random_weights", "weight_bytes"]


@dataclass(slots=True)
class Norm:
    """Gain and, for LayerNorm, shift; [hidden]."""

    gain: Tensor
    shift: Tensor | None = None


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
    """A model, or a rank's part of one, where what other stages hold is empty.

    `head` is `embedding` itself where the two are tied; `positions` is the learned position table.
    """

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


def build(shape: ModelShape, source: Source, place: Place | None = None, dtype: str | None = None) -> Weights:
    """Weights of `shape`, every tensor taken from `source` by its Hugging Face name.

    Args:
        shape: the whole model.
        source: where tensors come from, whole.
        place: the part to keep; None: all.
        dtype: `int8` or `int4` to quantise the layers' matrices; None: as they are.
    """
    names, hidden, lead = _names(shape), shape.hidden, place is None or place.tp_rank == 0

    def norm(name: str) -> Norm:
        return Norm(source(name + ".weight", (hidden,)), source(name + ".bias", (hidden,)) if shape.biases else None)

    def matrix(name: str, size: tuple[int, int], outputs: Span | None, inputs: Span | None, biased: bool) -> Linear:
        weight, bias = source(name + ".weight", size), source(name + ".bias", size[:1]) if biased else None
        if bias is not None and outputs is not None:
            bias = bias[outputs.begin : outputs.end].clone()
        if inputs is not None and not lead:
            bias = None  # the ranks' parts are summed: one of them brings the bias
        if dtype is not None:
            whole = quantised.quantise(weight, bias, dtype)
            return whole if outputs is None and inputs is None else quantised.part(whole, outputs, inputs)
        if outputs is not None:
            weight = weight[outputs.begin : outputs.end].clone()
        if inputs is not None:
            weight = weight[:, inputs.begin : inputs.end].clone()
        return Linear(weight, bias)

    def layer(i: int) -> Layer:
        at = names.layer.format(i=i)
        q, kv, mlp = (place.q, place.kv, place.mlp) if place is not None else (None, None, None)
        widths = (shape.q_width, shape.kv_width, shape.kv_width)
        qkv = [
            matrix(at + f"self_attn.{x}_proj", (width, hidden), part, None, shape.biases or shape.qkv_biases)
            for x, width, part in zip("qkv", widths, (q, kv, kv), strict=True)
        ]
        ups = [matrix(at + up, (shape.mlp, hidden), mlp, None, shape.biases) for up in names.ups]
        return Layer(
            norm(at + names.norm1),
            _joined(qkv),
            matrix(at + names.o, (hidden, shape.q_width), None, q, shape.biases),
            norm(at + names.norm2),
            _joined(ups),
            matrix(at + names.down, (hidden, shape.mlp), None, mlp, shape.biases),
        )

    def table(name: str) -> Tensor:
        whole = source(name, (shape.vocab, hidden))
        if place is None or place.layout.tp == 1:
            return whole
        mine = whole[place.vocab.begin : place.vocab.end]
        return torch.cat([mine, mine.new_zeros(place.vocab.size - len(mine), hidden)])

    first, last = place is None or place.first, place is None or place.last
    layers = [layer(i) for i in (range(shape.layers) if place is None else range(place.layers.begin, place.layers.end))]
    none = torch.empty(0, hidden, dtype=DTYPES[shape.dtype], device=layers[0].norm1.gain.device)
    tokens = table(names.embedding + ".weight") if first or (last and shape.tied) else none
    positions = source(names.positions + ".weight", (shape.positions, hidden)) if shape.positions and first else None
    head = none if not last else tokens if shape.tied else table("lm_head.weight")
    return Weights(tokens, positions, layers, norm(names.norm) if last else Norm(none), head)


def _joined(parts: list[Linear]) -> Linear:
    if len(parts) == 1:
        return parts[0]
    several = [part for part in parts if isinstance(part, quantised.Quantised)]
    if several:
        return quantised.joined(several)
    biases = [part.bias for part in parts if part.bias is not None]
    return Linear(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)


def weight_bytes(weights: Weights) -> int:
    """Bytes that the weights take on the device; a tied head counts once."""
    tensors = {id(t): t for t in _tensors(weights)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _tensors(part: object) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        for name in getattr(part, "tensor_data_names", ()):  # torchao's
            yield from _tensors(getattr(part, name))
        if not hasattr(part, "tensor_data_names"):
            yield part
    elif isinstance(part, list):
        for one in part:
            yield from _tensors(one)
    elif isinstance(part, (Weights, Layer, Norm, Linear)):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))


def random_weights(
    shape: ModelShape,
    seed: int = 0,
    device: torch.device | str = "cpu",
    *,
    place: Place | None = None,
    dtype: str | None = None,
) -> Weights:
    """Normal weights with deviation 1 / sqrt(inputs), gains near 1, the same for the same seed and kind of device.

    Every tensor has a seed of its own, made of `seed` and its name: a rank draws its part without drawing the rest.

    Raises:
        InputError: the device has too little memory.
    """
    generator = torch.Generator(device)
    format_ = DTYPES[shape.dtype]

    def source(name: str, size: tuple[int, ...]) -> Tensor:
        generator.manual_seed(seed * 0x9E3779B1 + zlib.crc32(name.encode()) & 0x7FFFFFFFFFFFFFFF)
        tensor = torch.empty(size, dtype=format_, device=device)
        if len(size) == 2:
            return tensor.normal_(0, 1 / math.sqrt(size[1]), generator=generator)
        tensor.normal_(0, 0.1, generator=generator)
        return tensor if name.endswith(".bias") else tensor.add_(1)

    with or_say_what_to_lower(shape, place, dtype):
        return build(shape, source, place, dtype)


def load(
    shape: ModelShape,
    tensors: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    where: str | Callable[[str], str] = "weights",
    *,
    place: Place | None = None,
    dtype: str | None = None,
) -> Weights:
    """Weights from `tensors` by Hugging Face name, in the shape's number format on `device`.

    Raises:
        InputError: a tensor is missing, or has another shape than the model's; the device has too little memory.
    """
    format_ = DTYPES[shape.dtype]

    def source(name: str, size: tuple[int, ...]) -> Tensor:
        at = where if isinstance(where, str) else where(name)
        if name not in tensors:
            raise InputError(at, "tensor", name, f"missing: {shape.name} needs it; is this another model's file?")
        tensor = tensors[name]
        if tuple(tensor.shape) != size:
            raise InputError(at, name, tuple(tensor.shape), f"has the wrong shape: {shape.name} needs {size}")
        return tensor.to(device=device, dtype=format_)

    with or_say_what_to_lower(shape, place, dtype):
        return build(shape, source, place, dtype)


def load_safetensors(
    shape: ModelShape,
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    place: Place | None = None,
    dtype: str | None = None,
) -> Weights:
    """Weights from all `*.safetensors` files in `folder`.

    Raises:
        InputError: no file, a file that is cut off or not safetensors, or what `load` refuses; names file and tensor.
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
            try:
                with safe_open(self.files[name], framework="pt") as opened:
                    return opened.get_tensor(name)
            except (SafetensorError, OSError, RuntimeError, ValueError) as error:
                raise InputError(self.files[name], name, str(error), "cannot be read: copy the file again") from error

        def __iter__(self) -> Iterator[str]:
            return iter(self.files)

        def __len__(self) -> int:
            return len(self.files)

    files = Files()
    if not files:
        raise InputError(folder, "weights", "*.safetensors", "no such file in the folder: name the one that holds the model")
    return load(shape, files, device, lambda name: str(files.files.get(name, folder)), place=place, dtype=dtype)
