# mypy: disable-error-code="no-untyped-call, no-any-return"
"""A PEFT folder, checked against the model it is meant for, as the matrices that the engine copies to the GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.lora import MODULES, Adapter, AdapterBank

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter as a slot of the bank holds it: per site A [layers, parts * rank, inputs] and B [layers, outputs, rank].

    The scale is in B; where the adapter's rank is lower than the bank's the rest is zeros. Pinned where there is a GPU.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of all its matrices."""
        return sum(t.numel() * t.itemsize for side in (self.a, self.b) for t in side.values())


def packed(shape: ModelShape, adapter: Adapter, rank: int, sites: tuple[str, ...], pin: bool) -> HostAdapter:
    """`adapter` in host memory in the bank's layout; in pinned memory when `pin`."""
    room = AdapterBank(shape, 1, rank, 0, sites, "cpu", "bmm")
    room.load("adapter", adapter)

    def kept(tensor: Tensor) -> Tensor:
        whole = tensor[:, 1].contiguous()
        return whole.pin_memory() if pin else whole

    return HostAdapter({s: kept(room.a[s]) for s in sites}, {s: kept(room.b[s]) for s in sites})


def read(folder: Path, shape: ModelShape, base: str | None = None, rank: int | None = None) -> Adapter:
    """A PEFT checkpoint (`adapter_config.json`, `adapter_model.safetensors`) for a model of `shape`.

    Args:
        folder: where the two files are.
        shape: the base model's.
        base: the base model's name; an adapter that names another one is refused (the last part of a path counts).
        rank: highest rank that there is room for.

    Raises:
        InputError: a file is missing, cut off or no PEFT checkpoint; rank, shape, number format or base model do not fit.
    """
    from systems.common.serve.loading import read_adapter  # brings the whole server: not needed where adapters are random

    adapter = read_adapter(folder)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    named = config.get("base_model_name_or_path")
    if base is not None and named and Path(named).name.lower() != Path(base).name.lower():
        mend = f"trained on another base model than {base}: load it there, or train it anew"
        raise InputError(folder / "adapter_config.json", "base_model_name_or_path", named, mend)
    check(adapter, shape, folder / "adapter_model.safetensors", rank)
    return adapter


def check(adapter: Adapter, shape: ModelShape, where: str | Path, most: int | None = None) -> None:
    """Raises InputError unless every matrix fits a model of `shape`, with its pair's rank, and that is at most `most`."""
    if not adapter.modules:
        raise InputError(where, "tensors", "none", "holds no lora_A and lora_B: is it a LoRA checkpoint?")
    for module, (a, b) in adapter.modules.items():
        inputs, outputs = _widths(shape, module, where)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            mend = "A and B are not of one rank: save the adapter again"
            raise InputError(where, module, (tuple(a.shape), tuple(b.shape)), mend)
        if (a.shape[1], b.shape[0]) != (inputs, outputs):
            mend = f"does not fit {shape.name}: A needs {inputs} inputs, B {outputs} outputs; is it another model's adapter?"
            raise InputError(where, module, (tuple(a.shape), tuple(b.shape)), mend)
        for tensor in (a, b):
            if tensor.dtype not in FLOATS:
                mend = "the engine takes float32, float16 and bfloat16: save the adapter in one of them"
                raise InputError(where, module, str(tensor.dtype).removeprefix("torch."), mend)
        if most is not None and a.shape[0] > most:
            raise InputError(where, "r", int(a.shape[0]), f"higher than the engine's {most}: raise max_lora_rank")


def _widths(shape: ModelShape, module: str, where: str | Path) -> tuple[int, int]:
    """Inputs and outputs of `model.layers.<i>.<kind>`."""
    widths = {
        "self_attn.q_proj": (shape.hidden, shape.q_width),
        "self_attn.k_proj": (shape.hidden, shape.kv_width),
        "self_attn.v_proj": (shape.hidden, shape.kv_width),
        "self_attn.o_proj": (shape.q_width, shape.hidden),
        "mlp.gate_proj": (shape.hidden, shape.mlp),
        "mlp.up_proj": (shape.hidden, shape.mlp),
        "mlp.down_proj": (shape.mlp, shape.hidden),
    }
    head, _, rest = module.partition("model.layers.")
    layer, _, kind = rest.partition(".")
    if head or kind not in widths or not layer.isdecimal():
        known = ", ".join(kind for kinds in MODULES.values() for kind in kinds)
        raise InputError(where, "module", module, f"the engine applies adapters to {known} of the layers only")
    if int(layer) >= shape.layers:
        raise InputError(where, "module", module, f"{shape.name} has {shape.layers} layers: is it another model's adapter?")
    return widths[kind]
