"""The executor under the real engine and policies, on a CPU: tokens, blocks, times."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.engine.results import to_records  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine import attention  # noqa: E402
from systems.common.torch_engine.attention import Chunks  # noqa: E402
from systems.common.torch_engine.cache import BlockTables, KVCache  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.graphs import buckets  # noqa: E402
from systems.common.torch_engine.mixed import Bucket, Inputs, mixed_step, pack  # noqa: E402
from systems.common.torch_engine.model import Transformer  # noqa: E402
from systems.common.torch_engine.numerics import numerics, rope_table  # noqa: E402
from systems.common.torch_engine.sampling import Sampling, sample, uniform  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402

SHAPE = model("tiny")
WEIGHTS = random_weights(SHAPE, 7)
torch.set_num_threads(1)


def live(config: EngineConfig, **options) -> Live:
    return Live.build(SHAPE, WEIGHTS, config, max_tokens=256, **options)


def requests(count: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [Request(i, 0.0, int(rng.integers(1, 60)), int(rng.integers(1, 40))) for i in range(count)]


def alone(prompt: list[int], steps: int) -> list[int]:
    """Greedy tokens by running the whole text through a fresh cache for each token: the yardstick."""
    tokens = list(prompt)
    for _ in range(steps):
        cache = KVCache(SHAPE, 1, 16, 16)
        cache.tables[0] = torch.arange(1, 17)
        transformer = Transformer(SHAPE, WEIGHTS, attention.choose("sdpa", SHAPE, cache, rope_table(16, 256, numerics(SHAPE))))
        none = torch.empty(0, dtype=torch.int64)
        logits = transformer.forward(torch.tensor(tokens), None, none, Chunks.of([0], [len(tokens)], [0]), None)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


CONFIGS = {
    "chunked": EngineConfig(200, "chunked-prefill", max_num_batched_tokens=32, max_num_seqs=8),
    "prefill-first": EngineConfig(200, "prefill-first", max_num_batched_tokens=128, max_num_seqs=8),
    "preempting": EngineConfig(9, "chunked-prefill", max_num_batched_tokens=40, max_num_seqs=8),
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_equals_each_request_alone(name: str, overlap: bool) -> None:
    engine = live(CONFIGS[name], overlap=overlap)
    asked = requests(12)
    sequences, outputs = engine.generate(asked)
    if name == "preempting":
        assert sum(s.preemptions for s in sequences) > 0
    for request, output in zip(asked, outputs, strict=True):
        assert output == alone(engine.executor.prompt(request).tolist(), request.output_tokens), request
    engine.executor._reconcile()
    assert engine.executor.tables.free_blocks == engine.engine.state.free_blocks == CONFIGS[name].num_gpu_blocks


def test_blocks_agree_with_the_scheduler_after_every_step() -> None:
    engine = live(CONFIGS["preempting"])
    for request in requests(10, seed=3):
        engine.submit(request)
    now = 0.0
    while engine.engine.has_work:
        now = engine.engine.step(now)
        engine.executor._reconcile()
        tables = engine.executor.tables
        held = [tables.tables[slot, : tables.held[slot]].tolist() for slot in range(8)]
        used = [block for blocks in held for block in blocks]
        assert len(used) == len(set(used)) == tables.blocks - tables.free_blocks
        assert tables.free_blocks == engine.engine.state.free_blocks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "grow", "step", "release"]), st.integers(0, 63)), max_size=60))
def test_block_tables_never_leak_or_share(actions: list[tuple[str, int]]) -> None:
    tables, slots = BlockTables(4, 40, 10, block_tokens=4), []
    for action, number in actions:
        if action == "take" and len(slots) < 4:
            slots.append(tables.take_slot())
        elif slots and action == "grow":
            slot = slots[number % len(slots)]
            tokens = int(tables.lengths[slot]) + number % 5
            if -(-tokens // 4) <= 10:
                tables.grow(slot, tokens)
                tables.lengths[slot] = tokens
        elif slots and action == "step" and max(tables.lengths[s] for s in slots) < 40:
            rows = np.array(slots, np.int64)
            places, blocks = tables.grow_one(rows)
            assert tables.tables.reshape(-1)[places].tolist() == blocks.tolist()
            tables.lengths[rows] += 1
        elif slots and action == "release":
            tables.release(slots.pop(number % len(slots)))
        held = [b for s in slots for b in tables.tables[s, : tables.held[s]].tolist()]
        assert len(held) == len(set(held)) and 0 not in held
        assert len(held) + tables.free_blocks == 40
        assert all(tables.held[s] == -(-int(tables.lengths[s]) // 4) for s in slots)


def test_times_are_those_of_the_steps_that_ran() -> None:
    """On a clock that counts its readings: every token of a sequence has its own step, in order, within the run."""
    ticks = iter(range(10**9))
    engine = live(CONFIGS["chunked"], clock=lambda: float(next(ticks)))
    asked = [Request(i, 40.0 * i, 20, 10) for i in range(6)]
    sequences = engine.serve(asked, sleep=lambda seconds: None)
    ended = [end - 0.0 for end in engine.executor.flights.ended_s]
    records = to_records(sequences, engine.engine)
    assert (records.first_token_s >= records.scheduled_s).all() and (records.finish_s >= records.first_token_s).all()
    assert len(records.token_s) == 60
    for times in np.split(records.token_s, records.token_ends[:-1]):
        assert (np.diff(times) > 0).all()
        assert set(times) <= set(ended)


def test_waits_for_arrivals() -> None:
    now = [0.0]
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    engine = live(CONFIGS["chunked"], clock=lambda: now[0])
    sequences = engine.serve([Request(0, 1.0, 5, 3), Request(1, 9.0, 5, 3)], sleep=sleep)
    assert slept == [1.0, 8.0]
    assert [s.first_token_s for s in sequences] == [1.0, 9.0]


def test_stop_tokens_end_a_sequence_early() -> None:
    plain = live(CONFIGS["chunked"])
    asked = [Request(i, 0.0, 10 + i, 30) for i in range(6)]
    _, full = plain.generate(asked)
    stops = {i: tokens[4 + i] for i, tokens in enumerate(full)}
    for name in ("chunked", "preempting"):
        engine = live(CONFIGS[name], sampling=lambda request: Sampling(stop_tokens=frozenset({stops[request.index]})))
        sequences, outputs = engine.generate(asked)
        for sequence, output, whole in zip(sequences, outputs, full, strict=True):
            assert output == whole[: whole.index(stops[sequence.index]) + 1]
            assert sequence.output_tokens == len(output)
            assert not math.isnan(sequence.finish_s)
        assert len(to_records(sequences, engine.engine).token_s) == sum(map(len, outputs))
        engine.executor._reconcile()
        assert engine.executor.tables.free_blocks == engine.engine.state.free_blocks == CONFIGS[name].num_gpu_blocks


def test_draws_depend_on_the_request_alone() -> None:
    want = {i: Sampling(temperature=(0.0, 0.7, 1.3)[i % 3], top_p=(1.0, 0.8)[i % 2], seed=i) for i in range(9)}
    asked = requests(9, seed=5)
    _, together = live(CONFIGS["preempting"], sampling=lambda r: want[r.index]).generate(asked)
    for request, tokens in zip(asked, together, strict=True):
        _, single = live(CONFIGS["chunked"], sampling=lambda r: want[r.index]).generate([request])
        assert single == [tokens]


def test_sample_follows_the_distribution() -> None:
    draws = uniform(torch.arange(20_000), torch.full((20_000,), 3))
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    assert abs(float(draws.mean()) - 0.5) < 0.01 and abs(float(draws.var()) - 1 / 12) < 0.005
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).expand(20_000, 4)
    temperature = torch.full((20_000,), 2.0)
    expected = torch.softmax(logits[0] / 2, -1)
    seen = torch.bincount(sample(logits, temperature, None, draws), minlength=4) / 20_000
    torch.testing.assert_close(seen, expected, atol=0.015, rtol=0)
    seen = torch.bincount(sample(logits, temperature, torch.full((20_000,), 0.7), draws), minlength=4) / 20_000
    assert seen[0] == seen[3] == 0  # the two likeliest reach 0.7 together
    torch.testing.assert_close(seen[1], expected[1] / (expected[1] + expected[2]), atol=0.015, rtol=0)
    assert sample(logits[:5], torch.zeros(5), None, draws[:5]).tolist() == [1] * 5


def test_requests_that_cannot_fit() -> None:
    engine = live(CONFIGS["preempting"])
    with pytest.raises(InputError, match="longer than the KV cache"):
        engine.submit(Request(0, 0.0, 140, 60))
    with pytest.raises(InputError, match="context"):
        engine.submit(Request(0, 0.0, 250, 60))
    assert engine.generate([Request(1, 0.0, 4, 2)])[1][0]


def test_a_padded_batch_gives_what_the_bare_one_gives() -> None:
    """As in a CUDA graph: rows, tokens and chunks padded to a bucket."""
    new, past, slots, rows = [5, 9, 30], [0, 16, 3], [2, 0, 4], np.array([5, 1])
    prompts = [np.random.default_rng(i).integers(0, SHAPE.vocab, n) for i, n in enumerate(new)]
    found = []
    for bucket in (Bucket(2, 44, 3), Bucket(8, 64, 5)):
        cache = KVCache(SHAPE, 6, 24, 4)
        cache.tables[:6] = torch.arange(1, 25).view(6, 4)
        cache.k.normal_(generator=torch.Generator().manual_seed(1))
        cache.v.normal_(generator=torch.Generator().manual_seed(2))
        cache.lengths[torch.tensor([5, 1])] = torch.tensor([11, 31], dtype=torch.int32)
        cache.last_token[torch.tensor([5, 1])] = torch.tensor([7, 9])
        transformer = Transformer(SHAPE, WEIGHTS, attention.choose("sdpa", SHAPE, cache, rope_table(16, 256, numerics(SHAPE))))
        ended = np.array([True, False, True])
        packed = torch.from_numpy(pack(bucket, prompts, rows, np.array([12, 32]), np.array(past), np.array(slots), ended, 6))
        assert len(packed) == bucket.length
        host = np.array([(0, 0, 5, 2), (5, 16, 9, 0), (14, 3, 30, 4)], np.int32)
        with torch.inference_mode():
            step = mixed_step(transformer, cache, Inputs.of(packed, bucket, host), greedy=True)
        kept = [0, 1, *(bucket.rows + i for i in range(3))]
        found.append((step.tokens[kept], step.logits[kept], cache.lengths[:6].clone(), cache.last_token[[5, 1, 2, 4]].clone()))
        assert cache.lengths.tolist() == [25, 32, 5, 0, 33, 12, 0]
        assert cache.last_token[0] == 0  # its prompt goes on: no token yet
    for bare, padded in zip(*found, strict=True):
        torch.testing.assert_close(bare, padded)


def test_tiles_cover_every_query_once() -> None:
    bucket = Bucket(0, 512, 8)
    new = [1, 128, 129, 200]
    prompts = [np.zeros(n, np.int64) for n in new]
    none = np.empty(0, np.int64)
    packed = pack(bucket, prompts, none, none, np.zeros(4, np.int64), np.arange(4), np.ones(4, bool), 9)
    inputs = Inputs.of(torch.from_numpy(packed), bucket, None)
    covered = [
        (c, q)
        for c, first in inputs.chunks.tiles.tolist()
        for q in range(first, min(first + 128, int(inputs.chunks.table[c, 2])))
    ]
    assert sorted(covered) == [(c, q) for c, n in enumerate(new) for q in range(n)]


def test_buckets_cover_every_batch() -> None:
    for most in (1, 3, 8, 100, 256, 512):
        sizes = buckets(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
