# mypy: disable-error-code="no-untyped-call"
"""The executor of an engine on several ranks: rank 0's own, and the same calls sent to all others.

with start(shape, layout(shape, tp=2), EngineConfig(...), device="cuda") as executor:
engine = Engine(executor.config, executor)
executor.attach(engine)
live = Live(engine, executor)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from systems.common.engine.config import EngineConfig
from systems.common.engine.executor import Batch, DecodeRun
from systems.common.models import ModelShape
from systems.common.torch_engine.comm import Links, leave
from systems.common.torch_engine.device import Device
from systems.common.torch_engine.executor import TorchExecutor, fitting_blocks
from systems.common.torch_engine.lora import Adapter, AdapterBank
from systems.common.torch_engine.mixed import Bucket
from systems.common.torch_engine.numerics import Numerics
from systems.common.torch_engine.parallel import plan
from systems.common.torch_engine.parallel.adapters import cut, pack
from systems.common.torch_engine.parallel.cluster import Cluster
from systems.common.torch_engine.parallel.spec import Spec, open_store, room
from systems.common.torch_engine.parallel.spec import links as join
from systems.common.torch_engine.parallel.wire import ADAPTER, PLAN
from systems.common.torch_engine.placement import Layout, Place
from systems.common.torch_engine.weights import Weights

Ints = NDArray[np.int64]


class Leader:
    """A device half that makes every call on all ranks; a step takes what was noted before it along in one message."""

    def __init__(self, mine: Device, cluster: Cluster) -> None:
        self.mine, self.cluster = mine, cluster
        self._noted: list[Ints] = []

    def rows(self, slots: Ints, wants: Ints) -> None:
        """See `DeviceHalf`."""
        self._noted.append(plan.encode("rows", slots, wants))
        self.mine.rows(slots, wants)

    def grow(self, places: Ints, blocks: Ints) -> None:
        """See `DeviceHalf`."""
        self._noted.append(plan.encode("grow", places, blocks))
        self.mine.grow(places, blocks)

    def tables(self, slots: Ints, blocks: Ints, adapters: Ints) -> None:
        """See `DeviceHalf`."""
        self._noted.append(plan.encode("tables", slots, blocks, adapters))
        self.mine.tables(slots, blocks, adapters)

    def decode(self, rows: int, greedy: bool, adapted: bool) -> Tensor:
        """See `DeviceHalf`."""
        self._tell("decode", rows, int(greedy), int(adapted))
        return self.mine.decode(rows, greedy, adapted)

    def mixed(self, packed: Ints, bucket: Bucket, chunks: Ints, greedy: bool, adapted: bool, wants: Ints) -> Tensor:
        """See `DeviceHalf`."""
        sizes = np.array([bucket.rows, bucket.tokens, bucket.chunks], np.int64)
        self._tell("mixed", packed, sizes, chunks, int(greedy), int(adapted), wants)
        return self.mine.mixed(packed, bucket, chunks, greedy, adapted, wants)

    def warm(self) -> None:
        """See `DeviceHalf`."""
        self._tell("warm")
        self.mine.warm()

    def score(self, prompt: Ints) -> Tensor:
        """See `DeviceHalf`."""
        self._tell("score", prompt)
        return self.mine.score(prompt)

    def sums(self, elements: int, count: int) -> Tensor:
        """See `DeviceHalf`."""
        self._tell("sums", elements, count)
        return self.mine.sums(elements, count)

    def _tell(self, name: str, *arguments: int | Ints) -> None:
        whole = np.concatenate([*self._noted, plan.encode(name, *arguments)])
        self._noted = []
        self.cluster.broadcast(PLAN, whole.tobytes())


class SharedBank:
    """The adapters' bank of all ranks, in the place of rank 0's own."""

    def __init__(self, mine: AdapterBank, cluster: Cluster, place: Place) -> None:
        self.mine, self.cluster, self.place = mine, cluster, place

    @property
    def index(self) -> Mapping[str, int]:
        """Where each adapter is."""
        return self.mine.index

    def load(self, name: str, adapter: Adapter) -> None:
        """Copy the whole `adapter` in, each rank its part. Raises InputError as `AdapterBank.load` does."""
        self.mine.load(name, cut(adapter, self.place))  # refuses before the others hear of it
        with self.cluster.guard():
            self.cluster.broadcast(ADAPTER, pack(name, adapter))

    def unload(self, name: str) -> None:
        """Free the place of an adapter that no sequence uses. Raises KeyError when there is none of that name."""
        self.mine.unload(name)
        self.cluster.tell(unload=name)


class ParallelExecutor(TorchExecutor):
    """See the module. Close it: the other ranks are processes.

    Attributes:
        cluster: the other ranks.
        spec: the model and its split.
        rooms: per rank the bytes of its weights, and what its GPU had free beside them.
    """

    def __init__(
        self,
        spec: Spec,
        cluster: Cluster,
        config: EngineConfig,
        rooms: list[dict[str, Any]],
        weights: Weights,
        links: Links,
        **options: Any,  # noqa: ANN401 - TorchExecutor's
    ) -> None:
        super().__init__(spec.shape, weights, config, given=spec.given, place=spec.place(0), links=links, **options)
        self.spec, self.cluster, self.rooms = spec, cluster, rooms
        assert isinstance(self.half, Device)
        self.half = Leader(self.half, cluster)
        if isinstance(self.adapters, AdapterBank):
            self.adapters = SharedBank(self.adapters, cluster, spec.place(0))

    def run(self, batch: Batch) -> float:
        """As `TorchExecutor`'s. Raises RankError when a rank is gone."""
        with self.cluster.guard():
            return super().run(batch)

    def decode_run(self, batch: Batch) -> DecodeRun:
        """As `TorchExecutor`'s. Raises RankError when a rank is gone."""
        with self.cluster.guard():
            return super().decode_run(batch)

    def drain(self) -> None:
        """As `TorchExecutor`'s. Raises RankError when a rank is gone."""
        with self.cluster.guard():
            super().drain()

    def warm(self) -> None:
        """As `TorchExecutor`'s. Raises RankError when a rank is gone."""
        with self.cluster.guard():
            super().warm()

    @torch.inference_mode()
    def score(self, prompt: Ints) -> Tensor:
        """Logits [tokens, vocab] of every token of `prompt`; only while nothing runs. Raises RankError when a rank is gone."""
        with self.cluster.guard():
            found = self.half.score(np.asarray(prompt, np.int64))
            return found.clone() if found.device.type == "cpu" else found.cpu()

    def close(self) -> None:
        """End the other ranks."""
        half = self.half
        self.cluster.end(close_mine=half.mine.close if isinstance(half, Leader) else leave)

    def __enter__(self) -> ParallelExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def start(
    shape: ModelShape,
    layout: Layout,
    config: EngineConfig | Callable[[int], EngineConfig],
    *,
    seed: int = 0,
    folder: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    given: Numerics | None = None,
    utilisation: float = 0.9,
    max_tokens: int = 8192,
    backend: str = "auto",
    graphs: bool = True,
    adapters: tuple[int, int, tuple[str, ...]] | None = None,
    lora: str = "auto",
    quantised: str = "auto",
    **own: Any,  # noqa: ANN401 - TorchExecutor's
) -> ParallelExecutor:
    """Start all ranks of `layout` on this host, with this process as rank 0.

    Args:
        shape: the whole model; it and all up to `given` as in `Spec`.
        layout: its split.
        config: the engine's limits, or what makes them of the KV blocks that fit on every rank's GPU.
        seed: of random weights.
        folder: of safetensors instead.
        dtype: `int8`, `int4` or None.
        device: `cpu` or `cuda`.
        given: numbers the shape leaves out.
        utilisation: share of each GPU's memory to use, where `config` is to be made.
        max_tokens: as this and the next five `TorchExecutor`'s, on every rank.
        backend: of attention.
        graphs: whether to capture CUDA graphs.
        adapters: capacity, rank and sites of the bank.
        lora: how adapters are applied.
        quantised: what computes products with quantised weights.
        own: `TorchExecutor`'s that concern rank 0 alone.

    Raises:
        InputError: a rank found its weights missing or wrong, or its GPU too small.
        RankError: a rank died.
    """
    spec = Spec(shape, layout, seed, folder, dtype, device, given)
    spec.place(0)  # refuse what cannot be split before any process starts
    options = {"max_tokens": max_tokens, "backend": backend, "graphs": graphs, "adapters": adapters, "lora": lora}
    options["quantised"] = quantised
    cluster = Cluster(layout.ranks)
    try:
        cluster.start()
        cluster.tell(spec=spec.to_json())
        weights = spec.weights(0)
        rooms: list[dict[str, Any]] = [room(spec, 0, weights), *cluster.answers()]
        if callable(config):
            kv_dtype = config(1).kv_dtype
            config = config(
                min(
                    fitting_blocks(spec.place(r).local(shape), utilisation, memory=_memory(rooms[r]), kv_dtype=kv_dtype)
                    for r in range(layout.ranks)
                )
            )
        with cluster.guard():
            store = open_store(cluster.host, layout.ranks)
            cluster.tell(store=[cluster.host, store.port], config=asdict(config), options=options)
            made = join(spec, 0, cluster.host, store.port, store)
            executor = ParallelExecutor(spec, cluster, config, rooms, weights, made, **options, **own)
        cluster.answers()
    except BaseException:
        cluster.end(patience_s=0.0)
        raise
    return executor


def _memory(found: dict[str, Any]) -> tuple[int, int]:
    free, total = found["free_bytes"], found["total_bytes"]
    assert free is not None, "KV blocks are counted on GPUs: give a whole EngineConfig on a CPU"
    return int(free), int(total)
