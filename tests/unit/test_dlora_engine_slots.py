"""Which adapter is in which slot: unit and property tests of the decisions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.dlora.lora_engine.slots import Load, Residents
from systems.dlora.slots import Slots


def residents(capacity: int, known: str) -> Residents:
    made = Residents(capacity)
    for adapter in known:
        made.add(adapter)
    return made


def test_the_adapter_with_fewest_requests_goes_then_the_one_used_longest_ago() -> None:
    slots = residents(3, "abcdef")
    assert [load.slot for load in slots.place("abc")] == [1, 2, 3]
    for adapter in "aab":
        slots.begin(adapter)
    assert slots.place("d") == [Load("d", 3, "c")]
    slots.begin("d")
    slots.begin("d")
    assert slots.place("e") == [Load("e", 2, "b")]  # one request, against two of a and of d
    slots.begin("e")
    slots.begin("e")
    slots.place("a")
    assert slots.place("f") == [Load("f", 3, "d")]  # two requests each: d was used before e and a


def test_a_batch_with_more_adapters_than_slots_waits() -> None:
    slots = residents(2, "abcd")
    assert slots.fitting("aabacda") == ["a", "b"]
    with pytest.raises(InputError, match="let some wait"):
        slots.place("abc")
    slots.place("ab")
    slots.pin("a")
    assert slots.fitting("bc") == ["b"]
    assert slots.fitting("ca") == ["c", "a"]
    slots.unpin("a")
    assert slots.fitting("bc") == ["b", "c"]


def test_a_pinned_adapter_stays_though_it_is_used_least() -> None:
    slots = residents(2, "abc")
    slots.place("ab")
    slots.pin("a")
    slots.begin("b")
    assert slots.place("c") == [Load("c", 2, "b")]
    slots.unpin("a")
    assert slots.place("b") == [Load("b", 1, "a")]


def test_an_adapter_in_use_is_refused_or_goes_with_its_last_request() -> None:
    slots = residents(2, "ab")
    slots.begin("a")
    slots.begin("a")
    slots.place("a")
    with pytest.raises(InputError, match="2 requests use it"):
        slots.remove("a")
    assert not slots.remove("a", wait=True)
    with pytest.raises(InputError, match="being removed"):
        slots.begin("a")
    with pytest.raises(InputError, match="remove it first"):
        slots.add("a")
    assert not slots.end("a")
    assert slots.end("a")
    assert "a" not in slots.slot_of and "a" not in slots.outstanding
    slots.add("a")  # another adapter of that name, later
    assert slots.remove("b")


def test_a_merged_adapter_leaves_when_it_is_taken_out() -> None:
    slots = residents(1, "a")
    slots.place("a")
    slots.pin("a")
    assert not slots.remove("a")
    assert slots.unpin("a")
    assert not slots.slot_of


def test_unknown_adapters_and_capacities_are_refused() -> None:
    slots = residents(1, "a")
    for act in (slots.begin, slots.remove, lambda adapter: slots.place([adapter])):
        with pytest.raises(InputError, match="use one of a"):
            act("z")
    with pytest.raises(InputError, match="at least 1"):
        Residents(0)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=4, unique=True), max_size=20),
    st.data(),
)
def test_the_simulator_s_slots_decide_alike(capacity: int, batches: list[list[str]], data: st.DataObject) -> None:
    real, simulated = residents(capacity, "abcdefg"), Slots(capacity)
    counts = data.draw(st.lists(st.integers(0, 3), min_size=7, max_size=7))
    for adapter, count in zip("abcdefg", counts, strict=True):
        for _ in range(count):
            real.begin(adapter)
    for batch in batches:
        batch = batch[:capacity]
        loads = simulated.take([ord(adapter) for adapter in batch], {ord(a): n for a, n in real.outstanding.items()})
        assert [ord(load.adapter) for load in real.place(batch)] == loads
        assert {ord(adapter) for adapter in real.slot_of} == set(simulated.resident)


Action = st.tuples(
    st.sampled_from(["batch", "begin", "end", "pin", "unpin", "remove", "add"]),
    st.lists(st.sampled_from("abcdefg"), min_size=1),
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.lists(Action, max_size=40))
def test_whatever_happens(capacity: int, actions: list[tuple[str, list[str]]]) -> None:
    slots, pinned = residents(capacity, "abcde"), set[str]()
    memory: dict[int, str] = {}  # what the loads that were asked for leave in each slot
    for kind, adapters in actions:
        one = adapters[0]
        before, counts = dict(slots.slot_of), dict(slots.outstanding)
        if kind == "batch":
            batch = slots.fitting(a for a in adapters if a in slots.outstanding)
            loads = slots.place(batch)
            for load in loads:
                memory[load.slot] = load.adapter
                if load.evicted is not None:
                    assert load.evicted not in pinned and load.evicted not in batch
                    kept = [a for a in before if a in slots.slot_of and a not in pinned and a not in batch]
                    assert all(counts[load.evicted] <= counts[a] for a in kept)
            assert set(batch) <= set(slots.slot_of)
            assert len(loads) == len(set(batch) - set(before))
        elif kind == "pin" and one in slots.slot_of and len(pinned | {one}) < capacity:
            slots.pin(one)
            pinned.add(one)
        elif kind == "unpin" and one in pinned:
            pinned.discard(one)
            slots.unpin(one)
        elif kind == "end" and slots.outstanding.get(one):
            slots.end(one)
        elif kind in ("begin", "add", "remove"):
            try:
                {"begin": slots.begin, "add": slots.add, "remove": lambda a: slots.remove(a, wait=True)}[kind](one)
            except InputError:
                assert one not in slots.outstanding or kind != "remove"
        assert len(set(slots.slot_of.values())) == len(slots.slot_of) <= capacity
        assert all(1 <= slot <= capacity and memory[slot] == adapter for adapter, slot in slots.slot_of.items())
        assert pinned <= set(slots.slot_of)
        assert set(slots.slot_of) <= set(slots.outstanding)
