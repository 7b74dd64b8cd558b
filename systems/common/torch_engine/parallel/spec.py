"""What a rank must know to build its part of the model, and its links to the other ranks."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.comm import Links
from systems.common.torch_engine.numerics import Llama3Scaling, Numerics
from systems.common.torch_engine.placement import Layout, Place, mlp_unit
from systems.common.torch_engine.quantised import group_of
from systems.common.torch_engine.weights import Weights, load_safetensors, random_weights, weight_bytes

ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_GRAPH_REGISTER": "0"}
"""NVLink multicast stays off: on a shared host it can take the other users' GPUs down with it. Graphs are many and their sums
small: registering each one's buffers would cost more than it saves."""
ONE_HOST = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
START_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Spec:
    """A model on several ranks.

    Attributes:
        shape: the whole model.
        layout: its split.
        seed: random weights by this seed, unless there is a `folder` of safetensors.
        dtype: `int8` or `int4` weights; None: the shape's own format.
        device: `cpu` (gloo) or `cuda` (NCCL, rank r on GPU r).
        given: numbers that the shape leaves out, where they are not the model's own.
    """

    shape: ModelShape
    layout: Layout
    seed: int = 0
    folder: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    given: Numerics | None = None

    def place(self, rank: int) -> Place:
        """Where `rank` stands. Raises InputError when columns, or groups of int4, cannot be dealt out."""
        shape, tp = self.shape, self.layout.tp
        group = group_of(shape.mlp) if self.dtype == "int4" else 1
        place = self.layout.place(shape, rank, mlp_unit(shape, tp, group))
        if self.dtype == "int4" and place.q.size % group_of(shape.q_width):
            mend = (
                f"a rank's heads are {place.q.size} wide and would cut a group of {group_of(shape.q_width)}: use fewer, or int8"
            )
            raise InputError("parallel", "tp", tp, mend)
        return place

    def on(self, rank: int) -> torch.device:
        """The device of `rank`, made the current one."""
        if self.device == "cpu":
            return torch.device("cpu")
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def weights(self, rank: int) -> Weights:
        """The part of `rank`. Raises InputError as `weights.load_safetensors` does."""
        device, place = self.on(rank), self.place(rank)
        if self.folder is not None:
            return load_safetensors(self.shape, Path(self.folder), device, place=place, dtype=self.dtype)
        return random_weights(self.shape, self.seed, device, place=place, dtype=self.dtype)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Spec:
        """The inverse of `to_json`."""
        given = values["given"]
        if given is not None:
            given = Numerics(**given | {"scaling": Llama3Scaling(**given["scaling"]) if given["scaling"] else None})
        layout = Layout(values["layout"]["tp"], tuple(values["layout"]["pp_map"]))
        return cls(**values | {"shape": ModelShape(**values["shape"]), "layout": layout, "given": given})


def open_store(host: str, ranks: int) -> TCPStore:
    """Rank 0's store, on a free port of its own choosing (`.port`)."""
    return TCPStore(host, 0, ranks, True, timedelta(seconds=START_TIMEOUT_S), wait_for_workers=False)


def links(spec: Spec, rank: int, host: str, port: int, store: TCPStore | None = None) -> Links:
    """Join the other ranks; communicators are made here, not at the first step. `store` is rank 0's own."""
    os.environ.update(ENVIRONMENT)
    layout = spec.layout
    if store is None:
        store = TCPStore(host, port, layout.ranks, False, timedelta(seconds=START_TIMEOUT_S))
    backend = "gloo" if spec.device == "cpu" else "nccl"
    limit = timedelta(seconds=START_TIMEOUT_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.ranks, timeout=limit)
    stage, tp_rank = divmod(rank, layout.tp)
    groups = [dist.new_group(list(range(s * layout.tp, (s + 1) * layout.tp))) for s in range(layout.stages)]
    made = Links(layout.tp, tp_rank, layout.stages, stage, groups[stage])
    probe = made.reduce(torch.ones(1, device=spec.on(rank)))
    assert float(probe) == layout.tp
    if layout.stages > 1:
        if not made.first:
            made.receive(probe)
        if not made.last:
            made.send_on(probe)
        if made.last:
            made.send_back(probe)
        elif made.first:
            made.receive_back(probe)
        assert float(probe) == layout.tp
    return made


def room(spec: Spec, rank: int, weights: Weights) -> dict[str, int | None]:
    """Bytes of a rank's weights, and its GPU's free and total ones (None without a GPU)."""
    free = total = None
    if spec.device != "cpu":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(spec.on(rank))
    return {"rank": rank, "weight_bytes": weight_bytes(weights), "free_bytes": free, "total_bytes": total}
