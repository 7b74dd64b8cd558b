"""The engine against a naive one, and its invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.core import Request, Status
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine, serve
from systems.common.engine.executor import DecodeRun
from systems.common.errors import InputError
from tests.unit.naive_engine import NaiveEngine


class Priced:
    """An executor with a cost that is one straight line per batch size, or pieces of it `piece` tokens long."""

    def __init__(self, fixed, per_token, per_context, piece=None):
        self.fixed, self.per_token, self.per_context, self.piece = fixed, per_token, per_context, piece
        self.advances = 0

    def decode_s(self, decodes, context):
        bend = 0.0 if self.piece is None else (context // self.piece) * 0.31 * self.fixed
        return self.fixed + decodes * self.per_token + context * self.per_context + bend

    def price(self, chunks, decodes, context):
        prompt = sum(n * (1 + 0.001 * (past + n / 2)) for past, n in chunks)
        return self.decode_s(decodes, context) + 3 * self.per_token * prompt

    def run(self, batch):
        return self.price([(past, n) for _, past, n in batch.chunks], batch.decodes, batch.decode_context)

    def decode_run(self, batch):
        first = self.decode_s(batch.decodes, batch.decode_context)
        if self.piece is None:
            return DecodeRun(first, batch.decodes * self.per_context)
        edge = (batch.decode_context // self.piece + 1) * self.piece
        return DecodeRun(first, batch.decodes * self.per_context, -(-(edge - batch.decode_context) // batch.decodes))

    def advanced(self, steps):
        self.advances += steps

    def idle(self, now_s, until_s):
        return until_s


@st.composite
def workloads(draw):
    block_tokens = draw(st.sampled_from([1, 3, 16]))
    lengths = st.integers(1, 60)
    pairs = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=30))
    seed = draw(st.integers(0, 2**32 - 1))
    rate = draw(st.sampled_from([0.05, 1.0, 20.0]))
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(pairs)))
    requests = [Request(i, float(t), a, b) for i, (t, (a, b)) in enumerate(zip(arrivals, pairs, strict=True))]
    longest = max(-(-(a + b) // block_tokens) for a, b in pairs)
    config = EngineConfig(
        num_gpu_blocks=draw(st.integers(longest + 2, longest * 4 + 4)),
        policy=draw(st.sampled_from(["chunked-prefill", "prefill-first"])),
        block_tokens=block_tokens,
        max_num_batched_tokens=draw(st.sampled_from([128, 150, 400])),
        max_num_seqs=draw(st.sampled_from([1, 3, 8, 100])),
        watermark=draw(st.sampled_from([0.0, 0.02])),
        reserve_prompt=draw(st.booleans()),
    )
    executor = Priced(
        draw(st.floats(0.001, 0.5)),
        draw(st.floats(0.0001, 0.02)),
        draw(st.sampled_from([0.0, 1.7e-7, 3.3e-4])),
        draw(st.sampled_from([None, 7, 64])),
    )
    return requests, config, executor


@settings(max_examples=3000, deadline=None)
@given(workloads())
def test_the_jump_equals_stepping_one_by_one(case):
    requests, config, executor = case
    engine = Engine(config, executor)
    ours = serve(engine, requests)
    reference = NaiveEngine(config, executor.price)
    theirs = reference.run(requests)
    assert [s.index for s in ours] == [s.request.index for s in theirs]
    for sequence, tokens, naive in zip(ours, engine.token_times_s(ours), theirs, strict=True):
        assert sequence.scheduled_s == pytest.approx(naive.scheduled_s, rel=1e-9, abs=1e-9)
        assert sequence.finish_s == pytest.approx(naive.times[-1], rel=1e-9)
        assert sequence.preemptions == naive.preemptions
        np.testing.assert_allclose(tokens, naive.times, rtol=1e-9)
        assert len(tokens) == sequence.output_tokens
    assert engine.state.free_blocks == config.num_gpu_blocks
    assert not engine.has_work
    assert sum(entry[1] for entry in engine.steps_log) == engine.state.decoding.clock


@settings(max_examples=300, deadline=None)
@given(workloads(), st.floats(0.1, 5.0))
def test_a_run_that_is_cut_keeps_every_request_and_every_block(case, until_s):
    requests, config, executor = case
    engine = Engine(config, executor)
    sequences = serve(engine, requests, until_s)
    state = engine.state
    held = sum(state.held_blocks(s) for s in state.running.values())
    assert held + state.free_blocks == config.num_gpu_blocks
    assert len(state.waiting) + len(state.running) + len(engine.finished) == len(sequences)
    for sequence in sequences:
        done = sequence.record().status is Status.FINISHED
        assert done == (sequence in engine.finished)


def test_decode_run_adds_up_and_inverts():
    run = DecodeRun(0.02, 0.001)
    assert run.duration_s(4) == pytest.approx(0.02 + 0.021 + 0.022 + 0.023)
    for seconds in (0.0, 0.02, 0.0200001, 0.5, 3.0):
        steps = run.steps_until(seconds)
        assert run.duration_s(steps) >= seconds
        assert steps == 1 or run.duration_s(steps - 1) < seconds


@given(st.floats(1e-5, 1.0), st.floats(0, 1e-3), st.floats(0, 500))
def test_steps_until_is_the_fewest(first, increment, seconds):
    run = DecodeRun(first, increment)
    steps = run.steps_until(seconds)
    assert run.duration_s(steps) >= seconds
    assert steps == 1 or run.duration_s(steps - 1) < seconds


def test_prefill_first_makes_decodes_wait_and_chunked_does_not():
    requests = [Request(0, 0.0, 10, 50), Request(1, 0.5, 100, 5)]
    price = Priced(0.01, 0.001, 0.0)
    longest_gap = {}
    for policy in ("prefill-first", "chunked-prefill"):
        engine = Engine(EngineConfig(100, policy, max_num_batched_tokens=128, max_num_seqs=16), price)
        first = serve(engine, requests)[0]
        longest_gap[policy] = np.diff(engine.token_times_s([first])[0]).max()
    # prefill-first: one decode gap holds a whole prefill batch and a decode step; chunked: the mixed batch alone
    assert longest_gap["prefill-first"] > longest_gap["chunked-prefill"]


def test_fcfs_within_the_engine():
    requests = [Request(i, 0.01 * i, 30, 5) for i in range(40)]
    engine = Engine(EngineConfig(40, max_num_batched_tokens=64, max_num_seqs=4), Priced(0.01, 0.001, 0.0))
    scheduled = [s.scheduled_s for s in serve(engine, requests)]
    assert scheduled == sorted(scheduled)


@pytest.mark.parametrize(
    ("policy", "request_", "key"),
    [
        ("chunked-prefill", Request(0, 0.0, 1000, 700), "KV cache"),
        ("prefill-first", Request(0, 0.0, 1000, 300), "never splits"),
    ],
)
def test_a_request_that_can_never_fit_is_refused(policy, request_, key):
    engine = Engine(EngineConfig(100, policy, max_num_batched_tokens=1024, max_num_seqs=64), Priced(0.01, 0.001, 0.0))
    with pytest.raises(InputError, match=key):
        engine.submit(request_)
    assert not engine.has_work


@pytest.mark.parametrize(
    "bad",
    [
        {"num_gpu_blocks": 0},
        {"num_gpu_blocks": 10, "policy": "lifo"},
        {"num_gpu_blocks": 10, "watermark": 1.0},
        {"num_gpu_blocks": 10, "max_num_batched_tokens": 8, "max_num_seqs": 9},
        {"num_gpu_blocks": 1.5},
    ],
)
def test_impossible_limits_are_refused(bad):
    with pytest.raises(InputError):
        EngineConfig(**bad)


def test_times_that_never_came_are_nan():
    engine = Engine(EngineConfig(100, max_num_batched_tokens=300), Priced(0.01, 0.001, 0.0))
    record = engine.submit(Request(0, 0.0, 10, 10)).record()
    assert math.isnan(record.ttft_s) and record.status is Status.CUT
