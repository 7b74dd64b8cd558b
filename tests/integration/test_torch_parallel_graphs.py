"""Pipeline stages whose decode steps are graphs, without GPUs: two stages in two threads, graphs that replay by calling.

A capture runs its work once before, as on a GPU: what it overwrites must be put back.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.engine.engine import Engine  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine import graphs  # noqa: E402
from systems.common.torch_engine.comm import Links  # noqa: E402
from systems.common.torch_engine.device import Device  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.executor import TorchExecutor  # noqa: E402
from systems.common.torch_engine.parallel import plan  # noqa: E402
from systems.common.torch_engine.parallel.executor import Leader  # noqa: E402
from systems.common.torch_engine.placement import layout  # noqa: E402
from systems.common.torch_engine.sampling import Sampling  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402

SHAPE = replace(model("tiny"), layers=3)
CONFIG = EngineConfig(200, max_num_batched_tokens=48, max_num_seqs=8)
torch.set_num_threads(1)


class Replayed(graphs.Graphs[Any]):
    """Stands in for CUDA graphs."""

    captures = 0

    def __init__(self) -> None:
        self._captured: dict[Any, Callable[[], Any]] = {}  # type: ignore[assignment]

    def run(self, key: object) -> Any:
        return self._captured[key]()

    def capture(self, key: object, work: Callable[[], Any]) -> None:
        work()
        self._captured[key] = work
        Replayed.captures += 1


class Threads(Links):
    """Links between stages that are threads."""

    def __init__(self, stage: int, on: queue.Queue, back: queue.Queue) -> None:
        super().__init__(stages=2, stage=stage)
        self.on, self.back = on, back

    def send_on(self, x) -> None:
        self.on.put(x.clone())

    def receive(self, x):
        return x.copy_(self.on.get(timeout=60))

    def send_back(self, x) -> None:
        self.back.put(x.clone())

    def receive_back(self, x):
        return x.copy_(self.back.get(timeout=60))


class Second:
    """The second stage, which does what it is told in a thread."""

    def __init__(self, device: Device) -> None:
        self.device, self.told = device, queue.Queue()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def broadcast(self, kind: bytes, payload: bytes) -> None:
        self.told.put(bytearray(payload))

    @torch.inference_mode()
    def serve(self) -> None:
        try:
            while (payload := self.told.get()) is not None:
                for name, arguments in plan.decode(np.frombuffer(payload, np.int64)):
                    plan.perform(self.device, name, arguments)
        except BaseException as error:
            self.error = error


@pytest.mark.parametrize("sampled", [False, True])
def test_captured_stages_equal_one_rank(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Graphs", Replayed)
    Replayed.captures = 0

    def sampling(request: Request) -> Sampling:
        stops = frozenset(range(0, SHAPE.vocab, 2)) if sampled and request.index % 3 == 0 else frozenset()
        return Sampling(0.9 if sampled and request.index % 2 else 0.0, 1.0, request.index, stops, min_tokens=5)

    asked = [Request(i, 0.0, 5 + 3 * i, 9 + 5 * i) for i in range(7)]
    whole = Live.build(SHAPE, random_weights(SHAPE, 7), CONFIG, max_tokens=128, sampling=sampling)
    expected = whole.generate(asked)[1]
    split, on, back = layout(SHAPE, pp_map=[1, 2]), queue.Queue(), queue.Queue()
    stages = [Threads(stage, on, back) for stage in range(2)]
    places = [split.place(SHAPE, rank) for rank in range(2)]
    parts = [random_weights(SHAPE, 7, place=place) for place in places]
    executor = TorchExecutor(SHAPE, parts[0], CONFIG, max_tokens=128, place=places[0], links=stages[0], sampling=sampling)
    device = Device(SHAPE, parts[1], CONFIG, max_tokens=128, place=places[1], links=stages[1])
    for each in (executor.half, device):
        each.steps = graphs.Steps(each.model, each.cache, CONFIG.max_num_seqs, True, CONFIG.max_num_batched_tokens)
        assert each.steps.mixed_rows == []  # reference attention cannot capture prompts
    executor.steps = executor.half.steps
    second = Second(device)
    executor.half = Leader(executor.half, second)
    live = Live(Engine(CONFIG, executor), executor)
    executor.attach(live.engine)
    try:
        assert live.generate(asked)[1] == expected
    finally:
        second.told.put(None)
    assert second.error is None
    assert Replayed.captures >= 6
