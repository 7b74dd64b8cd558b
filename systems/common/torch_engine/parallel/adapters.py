"""Adapters on their way to a rank: as bytes, and cut to its part.

Of a layer split by output B is cut to the rank's outputs; of one split by input A is cut to its inputs, and the low-rank
products of all ranks add up with the layer's own.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from systems.common.torch_engine.lora import Adapter
from systems.common.torch_engine.placement import Place


def pack(name: str, adapter: Adapter) -> bytes:
    """A whole adapter as bytes."""
    tensors = [(f"{module}/{side}", t) for module, pair in adapter.modules.items() for side, t in zip("ab", pair, strict=True)]
    listed = [[key, str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in tensors]
    head = json.dumps({"name": name, "scale": adapter.scale, "tensors": listed}).encode()
    raw = [t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for _, t in tensors]
    return b"".join([len(head).to_bytes(8, "little"), head, *raw])


def unpack(payload: bytearray, place: Place) -> tuple[str, Adapter]:
    """Its name, and the part of it that `place` holds."""
    size = int.from_bytes(payload[:8], "little")
    head = json.loads(bytes(payload[8 : 8 + size]))
    at, found = 8 + size, {}
    for key, dtype, sizes in head["tensors"]:
        kind: torch.dtype = getattr(torch, dtype)
        count = int(torch.tensor(sizes).prod()) * kind.itemsize
        found[key] = torch.frombuffer(payload, dtype=torch.uint8, count=count, offset=at).clone().view(kind).view(sizes)
        at += count
    modules = {key[:-2]: (found[key], found[key[:-1] + "b"]) for key in found if key.endswith("/a")}
    return head["name"], cut(Adapter(modules, head["scale"]), place)


def cut(adapter: Adapter, place: Place) -> Adapter:
    """The part of a whole adapter that `place` holds; its layers are numbered from 0."""
    outputs = {"q_proj": place.q, "k_proj": place.kv, "v_proj": place.kv, "gate_proj": place.mlp, "up_proj": place.mlp}
    inputs = {"o_proj": place.q, "down_proj": place.mlp}
    mine: dict[str, tuple[Tensor, Tensor]] = {}
    for module, (a, b) in adapter.modules.items():
        one, two, layer, kind = module.split(".", 3)
        if not place.layers.begin <= int(layer) < place.layers.end:
            continue
        last = kind.rpartition(".")[2]
        if span := outputs.get(last):
            b = b[span.begin : span.end]
        if span := inputs.get(last):
            a = a[:, span.begin : span.end]
        mine[f"{one}.{two}.{int(layer) - place.layers.begin}.{kind}"] = (a, b)
    return Adapter(mine, adapter.scale)
