"""No stop token before `min_tokens` tokens: made impossible on the device, in greedy and sampled rows, by graph or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine import attention, graphs  # noqa: E402
from systems.common.torch_engine.attention import Chunks  # noqa: E402
from systems.common.torch_engine.cache import KVCache  # noqa: E402
from systems.common.torch_engine.device import Device, packed_wants  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.model import Transformer  # noqa: E402
from systems.common.torch_engine.numerics import numerics, rope_table  # noqa: E402
from systems.common.torch_engine.sampling import Sampling, sample, uniform  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402

SHAPE = model("tiny")
WEIGHTS = random_weights(SHAPE, 7)
CONFIGS = {
    "chunked": EngineConfig(200, "chunked-prefill", max_num_batched_tokens=32, max_num_seqs=8),
    "prefill-first": EngineConfig(200, "prefill-first", max_num_batched_tokens=128, max_num_seqs=8),
    "preempting": EngineConfig(9, "chunked-prefill", max_num_batched_tokens=40, max_num_seqs=8),
}
STOPS = frozenset(range(0, SHAPE.vocab, 2)) | {SHAPE.vocab, 10**9}
"""Half of the vocabulary, and two numbers beyond it."""
torch.set_num_threads(1)


def wanted(request: Request) -> Sampling:
    """Of any five requests: greedy, sampled and nucleus rows with a minimum, one with none, one that never stops."""
    i = request.index
    if i % 5 == 4:
        return Sampling(temperature=0.8, seed=i)
    stops = STOPS if i % 5 < 3 else frozenset({1, 3})
    return Sampling((0.0, 0.9, 1.2, 0.0)[i % 5], (1.0, 1.0, 0.7, 1.0)[i % 5], i, stops, (6, 9, 13, 0)[i % 5])


def alone(prompt: list[int], most: int, want: Sampling) -> list[int]:
    """The tokens of one request, each by running the whole text through a fresh cache: the yardstick."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < most:
        cache = KVCache(SHAPE, 1, 16, 16)
        cache.tables[0] = torch.arange(1, 17)
        backend = attention.choose("sdpa", SHAPE, cache, rope_table(16, 256, numerics(SHAPE)))
        none = torch.empty(0, dtype=torch.int64)
        chunks = Chunks.of([0], [len(tokens)], [0])
        logits = Transformer(SHAPE, WEIGHTS, backend).forward(torch.tensor(tokens), None, none, chunks, None)[-1:]
        if len(tokens) - len(prompt) < want.min_tokens:
            logits[0, [t for t in want.stop_tokens if t < SHAPE.vocab]] = float("-inf")
        draw = uniform(torch.tensor([want.seed]), torch.tensor([len(tokens)]))
        top_p = torch.tensor([want.top_p]) if want.top_p < 1 else None
        tokens.append(int(sample(logits, torch.tensor([want.temperature]), top_p, draw)[0]))
        if tokens[-1] in want.stop_tokens and len(tokens) - len(prompt) > want.min_tokens:
            break
    return tokens[len(prompt) :]


ASKED = [Request(i, 0.0, 5 + 7 * i % 40, 12 + 5 * i % 17) for i in range(10)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    prompt = Live.build(SHAPE, WEIGHTS, CONFIGS["chunked"], max_tokens=256).executor.prompt
    return [alone(prompt(r).tolist(), r.output_tokens, wanted(r)) for r in ASKED]


def test_the_requests_are_of_all_kinds(expected: list[list[int]]) -> None:
    ended = [len(tokens) < r.output_tokens for r, tokens in zip(ASKED, expected, strict=True)]
    assert any(ended) and not all(ended)
    for request, tokens in zip(ASKED, expected, strict=True):
        want = wanted(request)
        assert not set(tokens[: want.min_tokens]) & want.stop_tokens


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_equals_each_request_alone(name: str, overlap: bool, expected: list[list[int]]) -> None:
    live = Live.build(SHAPE, WEIGHTS, CONFIGS[name], max_tokens=256, overlap=overlap, sampling=wanted)
    sequences, outputs = live.generate(ASKED)
    if name == "preempting":
        assert sum(s.preemptions for s in sequences) > 0
    assert outputs == expected


class Replayed(graphs.Graphs[Any]):
    """Stands in for CUDA graphs."""

    def __init__(self) -> None:
        self._captured: dict[Any, Callable[[], Any]] = {}  # type: ignore[assignment]

    def run(self, key: object) -> Any:
        return self._captured[key]()

    def capture(self, key: object, work: Callable[[], Any]) -> None:
        work()
        self._captured[key] = work


def captured(live: Live) -> Live:
    half = live.executor.half
    assert isinstance(half, Device)
    config = live.engine.config
    half.steps = live.executor.steps = graphs.Steps(half.model, half.cache, config.max_num_seqs, True)
    return live


def test_steps_by_graph(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Graphs", Replayed)
    live = captured(Live.build(SHAPE, WEIGHTS, CONFIGS["chunked"], max_tokens=256, sampling=wanted))
    assert live.generate(ASKED)[1] == expected


def test_steps_choose_by_graph_again_as_soon_as_all_may_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows: masked until the last minimum is reached, by the graph that commits its own tokens after that."""
    monkeypatch.setattr(graphs, "Graphs", Replayed)
    want = {i: Sampling(stop_tokens=frozenset({i}), min_tokens=3 * i) for i in range(4)}
    live = captured(Live.build(SHAPE, WEIGHTS, CONFIGS["prefill-first"], max_tokens=256, sampling=lambda r: want[r.index]))
    steps, kinds = live.executor.steps, []
    decode = steps.decode
    monkeypatch.setattr(steps, "decode", lambda rows, greedy=True: (kinds.append(greedy), decode(rows, greedy))[1])
    live.generate([Request(i, 0.0, 10, 25) for i in range(4)])
    # the prompts' step gives token 1 of each; tokens 2 to 9 of request 3 come from masked steps
    assert kinds[:8] == [False] * 8 and all(kinds[8:]) and len(kinds) > 12


def test_who_asks_for_no_minimum_never_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live.build(
        SHAPE, WEIGHTS, CONFIGS["chunked"], max_tokens=256, sampling=lambda r: Sampling(stop_tokens=frozenset({r.index}))
    )
    kinds = []
    rows = live.executor.half.rows
    monkeypatch.setattr(live.executor.half, "rows", lambda slots, wants: (kinds.append(len(wants)), rows(slots, wants))[1])
    live.generate(ASKED)
    assert kinds and not any(kinds)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(0.01, 1), st.integers(-(1 << 63), (1 << 63) - 1)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, SHAPE.vocab - 1), st.integers(0, 1 << 40)), max_size=5),
)
def test_wants_travel_as_numbers(rows: list[tuple[float, float, int]], banned: list[tuple[int, int, int]]) -> None:
    device = Live.build(SHAPE, WEIGHTS, CONFIGS["chunked"], max_tokens=64).executor.half
    assert isinstance(device, Device)
    packed = packed_wants([Sampling(*row) for row in rows], banned)
    if not banned and all(row[0] == 0 for row in rows):
        assert not len(packed)
        return
    found = device._unpacked(packed)
    torch.testing.assert_close(found.temperature, torch.tensor([row[0] for row in rows]))
    assert found.seeds.tolist() == [row[2] for row in rows]
    assert (found.top_p is None) == all(row[1] >= 1 - 2**-25 for row in rows)
    assert (found.banned.T.tolist() if found.banned is not None else []) == [list(ban) for ban in banned]
