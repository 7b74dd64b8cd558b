"""`Engine.abort` on the simulated path: in any state, at any time, no block is lost and nobody else is harmed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.engine.executor import Batch, DecodeRun
from systems.common.engine.results import to_records
from systems.common.engine.sequence import Sequence
from systems.common.metrics import CUT


class OneSecond:
    """Every step takes a second."""

    def run(self, batch: Batch) -> float:
        return 1.0

    def decode_run(self, batch: Batch) -> DecodeRun:
        return DecodeRun(1.0)

    def advanced(self, steps: int) -> None: ...

    def idle(self, now_s: float, until_s: float) -> float:
        return until_s


def held(engine: Engine) -> int:
    return sum(engine.state.held_blocks(sequence) for sequence in engine.state.running.values())


@settings(max_examples=200, deadline=None)
@given(
    policy=st.sampled_from(["chunked-prefill", "prefill-first"]),
    blocks=st.integers(8, 40),
    actions=st.lists(st.tuples(st.sampled_from(["submit", "step", "step", "abort"]), st.integers(0, 99)), max_size=80),
)
def test_blocks_add_up_and_the_others_end(policy: str, blocks: int, actions: list[tuple[str, int]]) -> None:
    config = EngineConfig(blocks, policy, block_tokens=4, max_num_batched_tokens=32, max_num_seqs=4)
    engine = Engine(config, OneSecond())
    open_ones: list[Sequence] = []
    aborted: list[Sequence] = []
    everyone: list[Sequence] = []
    now = 0.0
    for action, number in actions:
        if action == "submit":
            sequence = engine.submit(Request(len(everyone), now, 1 + number % 14, 1 + number % 7))
            everyone.append(sequence)
            open_ones.append(sequence)
        elif action == "step" and engine.has_work:
            now = engine.step(now, now + 1 + number % 3)
        elif action == "abort" and open_ones:
            victim = open_ones.pop(number % len(open_ones))
            engine.abort(victim)
            aborted.append(victim)
        open_ones = [sequence for sequence in open_ones if math.isnan(sequence.finish_s)]
        assert engine.state.free_blocks + held(engine) == blocks
        assert engine.state.decoding.count == sum(s.finish_clock >= 0 for s in engine.state.running.values())
        assert engine.state.decoding.context == sum(
            engine.state.decoding.tokens(s) for s in engine.state.running.values() if s.finish_clock >= 0
        )
    while engine.has_work:
        now = engine.step(now)
    assert engine.state.free_blocks == blocks
    assert len(engine.finished) == len(everyone)
    for sequence in everyone:
        assert math.isnan(sequence.finish_s) == (sequence in aborted)
        assert sequence.end_reason == ("abort" if sequence in aborted else "length")


def engine_with(requests: list[Request], steps: int) -> tuple[Engine, list[Sequence], float]:
    config = EngineConfig(30, "chunked-prefill", block_tokens=4, max_num_batched_tokens=8, max_num_seqs=4)
    engine = Engine(config, OneSecond())
    sequences = [engine.submit(request) for request in requests]
    now = 0.0
    for _ in range(steps):
        now = engine.step(now, now)
    return engine, sequences, now


def test_abort_where_it_waits_prefills_and_decodes() -> None:
    requests = [Request(0, 0.0, 4, 9), Request(1, 0.0, 20, 3), Request(2, 0.0, 4, 3)]
    for victim, steps in ((2, 1), (1, 1), (0, 1)):  # after one step: 0 decodes, 1 has part of its prompt, 2 waits
        engine, sequences, now = engine_with(requests, steps)
        assert sequences[0].finish_clock >= 0 and engine.state.partial is sequences[1] and sequences[2] in engine.state.waiting
        engine.abort(sequences[victim])
        while engine.has_work:
            now = engine.step(now)
        assert engine.state.free_blocks == 30
        assert to_records(sequences).status.tolist().count(CUT) == 1


def test_who_has_ended_cannot_be_aborted() -> None:
    engine, (sequence,), _ = engine_with([Request(0, 0.0, 4, 1)], 1)
    with pytest.raises(ValueError):
        engine.abort(sequence)


def test_others_take_the_same_time_as_if_the_aborted_had_never_come() -> None:
    """One second a step whatever is in it: a waiting request that goes leaves no trace."""
    asked = [Request(i, 0.0, 8, 5) for i in range(4)]
    engine, sequences, now = engine_with(asked, 0)
    engine.abort(sequences[3])
    while engine.has_work:
        now = engine.step(now)
    alone, expected, then = engine_with(asked[:3], 0)
    while alone.has_work:
        then = alone.step(then)
    assert [s.finish_s for s in sequences[:3]] == [s.finish_s for s in expected]
