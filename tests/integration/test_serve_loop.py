"""The engine's loop on a CPU, in a thread: jobs and aborts at any time; every token is right and nothing is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.serve import core  # noqa: E402
from systems.common.serve.core import EngineLoop  # noqa: E402
from systems.common.serve.messages import Abort, Job, Progress, Report, Stop  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.flights import Flight, Flights  # noqa: E402
from systems.common.torch_engine.sampling import Sampling  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402

SHAPE = model("tiny")
WEIGHTS = random_weights(SHAPE, 7)
CONFIGS = {
    "chunked": EngineConfig(200, "chunked-prefill", max_num_batched_tokens=32, max_num_seqs=8),
    "prefill-first": EngineConfig(200, "prefill-first", max_num_batched_tokens=128, max_num_seqs=8),
    "preempting": EngineConfig(12, "chunked-prefill", max_num_batched_tokens=40, max_num_seqs=8),
}
torch.set_num_threads(1)


def job(index: int, rng: np.random.Generator, **options) -> Job:
    prompt = rng.integers(0, SHAPE.vocab, int(rng.integers(1, 60)))
    wanted = {"max_tokens": int(rng.integers(1, 40)), "temperature": 0.0, "top_p": 1.0, "seed": index, **options}
    return Job(index, prompt, **wanted)


def expected(config: EngineConfig, jobs: list[Job]) -> list[list[int]]:
    """All at once, by `Live.generate`."""
    live = Live.build(
        SHAPE, WEIGHTS, config, max_tokens=256,
        prompt=lambda r: jobs[r.index].prompt, sampling=lambda r: Sampling(jobs[r.index].temperature, 1.0, jobs[r.index].seed),
    )  # fmt: skip
    return live.generate([Request(i, 0.0, len(j.prompt), j.max_tokens) for i, j in enumerate(jobs)])[1]


class Running:
    """A loop in its thread, and what it has reported."""

    def __init__(self, live: Live) -> None:
        self.live, self.reports = live, SimpleQueue()
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.loop = EngineLoop(live, self.reports.put)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.last = Progress(core.Load())
        self.thread.start()

    def next(self) -> None:
        report: Report = self.reports.get(timeout=60)
        assert isinstance(report, Progress) and not report.refused, report
        self.last = report
        for index, token, end in report.tokens:
            self.tokens.setdefault(index, []).append(token)
            if end is not None:
                assert index not in self.ends
                self.ends[index] = end

    def until(self, *ended: int) -> None:
        while not set(ended) <= set(self.ends):
            self.next()


@contextmanager
def running(config: EngineConfig) -> Iterator[Running]:
    live = Live.build(SHAPE, WEIGHTS, config, max_tokens=256)
    run = Running(live)
    yield run
    run.loop.put(Stop())
    run.thread.join(60)
    assert not run.thread.is_alive()
    assert live.engine.state.free_blocks == live.executor.tables.free_blocks == config.num_gpu_blocks


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_offline_generation_whoever_leaves(name: str) -> None:
    rng = np.random.default_rng(5)
    jobs = [job(i, rng, temperature=float(i % 2)) for i in range(24)]
    want = expected(CONFIGS[name], jobs)
    leavers = {3, 4, 9, 15, 16, 17}
    with running(CONFIGS[name]) as run:
        for j in jobs:
            run.loop.put(j)
            if j.index % 3 == 0:
                run.next()
            if j.index - 2 in leavers:  # while it waits, prefills, decodes or has ended: as it comes
                run.loop.put(Abort(j.index - 2))
        run.until(*(set(range(24)) - leavers))
        marker = job(99, rng, max_tokens=1)
        run.loop.put(marker)
        run.until(99)
        while run.last.load.running:
            run.next()
        assert run.last.load.blocks_used == 0
        if name == "preempting":
            assert run.last.load.preemptions > 0
    for index, tokens in enumerate(want):
        got = run.tokens.get(index, [])
        if index in leavers:
            assert got == tokens[: len(got)]
        else:
            assert got == tokens and run.ends[index] == "length"


def test_nothing_is_kept_of_jobs_that_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "LOG_STEPS", 50)
    rng = np.random.default_rng(6)
    with running(CONFIGS["chunked"]) as run:
        for index in range(0, 60, 2):
            run.loop.put(job(index, rng))
            run.loop.put(job(index + 1, rng, max_tokens=190))
            run.until(index)
            run.loop.put(Abort(index + 1))
    executor, engine = run.live.executor, run.live.engine
    executor.drain()
    run.loop._steps += core.SETTLED_AFTER
    run.loop._forget()
    assert not (executor.outputs or executor._samplings or executor._prompts or executor._over or executor._slots)
    assert not (run.loop._open or run.loop._known or run.loop._ended)
    executor.trim(keep=0)
    assert not (engine.finished or engine.steps_log or executor.flights.ended_s)


def test_stop_tokens_end_at_the_first_that_counts() -> None:
    rng = np.random.default_rng(8)
    plain = job(0, rng, max_tokens=30)
    (want,) = expected(CONFIGS["chunked"], [plain])
    stop = want[12]
    first = want.index(stop)
    spared = next(i for i, token in enumerate(want) if token == stop and i >= 5)
    with running(CONFIGS["chunked"]) as run:
        for index, least in ((1, 0), (2, 5), (3, 30)):
            run.loop.put(Job(index, plain.prompt, 30, 0.0, 1.0, 0, frozenset({stop}), least))
        run.until(1, 2, 3)
        while run.last.load.running:
            run.next()
    assert (run.tokens[1], run.ends[1]) == (want[: first + 1], "stop")
    assert (run.tokens[2], run.ends[2]) == (want[: spared + 1], "stop")
    assert run.tokens[3][:first] == want[:first] and run.ends[3] == "length"
    assert len(run.tokens[3]) == 30 and stop not in run.tokens[3], "before its minimum it is not even drawn"


def test_the_logs_of_a_long_run_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """And early ends still find their step in what is left of them."""
    monkeypatch.setattr(core, "LOG_STEPS", 20)
    rng = np.random.default_rng(9)
    plain = job(0, rng, max_tokens=60)
    (want,) = expected(CONFIGS["chunked"], [plain])
    with running(CONFIGS["chunked"]) as run:
        monkeypatch.setattr(run.live.executor, "trim", lambda trim=run.live.executor.trim: trim(10))
        for index in range(1, 6):
            run.loop.put(Job(index, plain.prompt, 60, 0.0, 1.0, 0, frozenset({want[40]})))
            run.until(index)
            assert run.tokens[index] == want[: want.index(want[40]) + 1]
        assert len(run.live.engine.steps_log) < 80


def test_late_launches_do_not_put_off_the_next_ones() -> None:
    """On a CPU a step has ended when its launch returns: nothing is gained by waiting, and waiting must not feed on itself."""
    rng = np.random.default_rng(10)
    with running(CONFIGS["chunked"]) as run:
        run.loop.put(job(0, rng, max_tokens=150))
        run.until(0)
        assert run.live.executor.flights._periods == {}


def test_only_steps_that_the_host_waited_for_say_how_long_steps_take() -> None:
    now = [0.0]

    class Event:
        """Over once the clock says so."""

        def __init__(self, at: float) -> None:
            self.at = at

        def synchronize(self) -> None:
            now[0] = max(now[0], self.at)

    flights = Flights(lambda: now[0])

    def step(launched_s: float, ends_s: float) -> None:
        now[0] = launched_s
        flights._flying.append(Flight([], torch.empty(0), Event(ends_s), None, 4))
        list(flights.settle(1))

    for number in range(4):  # 10 ms each on the GPU, launched 2 ms ahead
        step(0.010 * number - 0.002 * (number > 0), 0.010 * (number + 1))
    assert flights.spare_s() == pytest.approx(0.008)
    for number in range(20):  # the host is late now, by more and more
        step(0.1 + 0.02 * number, 0.1 + 0.02 * number + 0.010)
    assert min(flights._periods[1]) == pytest.approx(0.010)
