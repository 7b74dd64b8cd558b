"""dLoRA's batching policies: credit is conserved, starvation bounded, nobody lost or served twice; jumping changes nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.errors import InputError
from systems.common.models import model
from systems.dlora.costs import ArtifactCosts
from systems.dlora.policies.credit import UNIT, Credit, CreditPlan, CreditRules
from systems.dlora.policies.static import Fcfs, Merge, OneAdapter
from systems.dlora.replica import Replica, engine_config
from systems.dlora.requests import LoraSequence, Place, RequestQueue
from systems.dlora.slots import Slots

LLAMA = model("llama-2-7b")
COSTS = ArtifactCosts(LLAMA)


def sequence(index, adapter, arrival_s=0.0, prompt=20, answer=10):
    return LoraSequence(Request(index, arrival_s, prompt, answer, f"adapter-{adapter}"), adapter)


def queue_of(adapters):
    queue = RequestQueue()
    for index, adapter in enumerate(adapters):
        queue.add(sequence(index, adapter, arrival_s=float(index)))
    return queue


def total(credit, adapters):
    return sum(credit.credit(adapter) for adapter in range(adapters))


def serve(replica, arrivals, trace=None):
    """Drive one replica over `arrivals` (sorted); finished sequences in order."""
    done, now, pending = [], 0.0, list(arrivals)
    while pending or len(replica.queue):
        if not len(replica.queue):
            now = max(now, pending[0].arrival_s)
        while pending and pending[0].arrival_s <= now:
            replica.submit(pending.pop(0))
        end = replica.begin(now)
        if pending and pending[0].arrival_s < end:
            end = replica.interrupt(pending[0].arrival_s)
        if trace is not None:
            trace.append((now, replica.run))
        done += replica.end()
        now = end
    return done


def make(policy, slots=3, blocks=200, batch=4, adapters=6):
    built = {
        "fcfs": lambda: Fcfs(slots, batch),
        "merge": lambda: Merge(batch),
        "one": lambda: OneAdapter(batch),
        "one_kinder": lambda: OneAdapter(batch, kinder=True),
        "credit": lambda: Credit(adapters, slots, batch),
        "credit_small": lambda: Credit(adapters, slots, batch, CreditRules(scale=2.0)),
    }[policy]()
    return Replica(0, engine_config(blocks, batch, 256), built, COSTS, Slots(slots, range(slots)))


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 5), st.floats(0, 0.4), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=30
)
POLICIES = st.sampled_from(["fcfs", "merge", "one", "one_kinder", "credit", "credit_small"])


def sequences(drawn):
    made, now = [], 0.0
    for index, (adapter, gap, prompt, answer) in enumerate(drawn):
        now += gap
        made.append(sequence(index, adapter, now, prompt, answer))
    return made


# ---- what each policy runs


def test_fcfs_takes_the_oldest_until_the_slots_are_full():
    queue = queue_of([0, 1, 0, 2, 3, 0, 1])
    plan = Fcfs(slots=3, batch=6).plan(queue)
    assert [s.adapter for s in plan.order] == [0, 1, 0, 2]
    assert plan.merged is None


def test_merge_takes_all_of_the_oldest_ones_adapter():
    plan = Merge(batch=2).plan(queue_of([4, 1, 4, 4]))
    assert ([s.index for s in plan.order], plan.merged) == ([0, 2], 4)


def test_one_adapter_stops_at_a_foreign_request_or_passes_over_it():
    queue = queue_of([4, 4, 1, 4])
    assert [s.index for s in OneAdapter(8).plan(queue).order] == [0, 1]
    assert [s.index for s in OneAdapter(8, kinder=True).plan(queue).order] == [0, 1, 3]


def test_credit_merges_for_the_majority_only():
    credit = Credit(4, 4, batch=4)
    assert credit.plan(queue_of([0, 1, 2, 3])).merged is None
    assert credit.plan(queue_of([0, 1, 0, 0])).merged is None  # 3 of 4 at alpha 1
    assert credit.plan(queue_of([0, 1, 0, 0, 0])).merged == 0  # 4 wait for adapter 0, and F has 4


def test_credit_stays_merged_down_to_beta():
    credit = Credit(4, 4, batch=4)
    queue = queue_of([0, 0, 0, 0])
    credit.ran(credit.plan(queue), queue, 1)
    assert credit.merged == 0
    assert credit.plan(queue_of([1, 0, 0, 0])).merged == 0  # 3 of 4 above 0.556
    assert credit.plan(queue_of([1, 2, 0, 0])).merged is None  # 2 of 4 below


def test_a_displaced_request_is_paid_by_the_merged_adapter():
    credit = Credit(4, 4, batch=4)
    queue = queue_of([1, 0, 0, 0, 0])
    plan = credit.plan(queue)
    unit = round(UNIT / (15 / 27 * 4))
    assert dict(plan.transfers) == {0: -unit, 1: unit}
    short = Credit(4, 4, batch=4)
    queue = queue_of([0, 0, 0, 0])
    short.ran(short.plan(queue), queue, 1)
    assert dict(short.plan(queue_of([1, 0, 0, 0])).transfers) == {0: -(unit // 2), 1: unit // 2}  # 3 run where 4 would


def test_an_adapter_without_credit_is_not_merged_for():
    credit = Credit(2, 2, batch=2)
    credit.credits = {0: -1, 1: 2 * credit.credit(1) + 1}
    assert credit.plan(queue_of([0, 0, 0])).merged is None


def test_merging_that_paid_off_makes_merging_easier():
    credit = Credit(4, 4, batch=4)
    merged, mixed = queue_of([0] * 8), queue_of([1, 2, 3, 1])
    plan = credit.plan(merged)
    credit.ran(plan, merged, 1)
    credit.ran(credit.plan(merged), merged, 100)
    before = credit.alpha
    credit.ran(credit.plan(mixed), mixed, 1)
    assert credit.alpha == pytest.approx(before - 0.05)
    assert credit.beta == pytest.approx(15 / 27)


def test_merging_at_a_loss_makes_it_harder():
    credit = Credit(4, 4, batch=4)
    full, partly = queue_of([0] * 4), queue_of([1, 2, 3, 1])
    credit.ran(credit.plan(full), full, 1)  # one iteration and a switch of 20 ms: not worth it
    credit.ran(credit.plan(partly), partly, 1)
    assert credit.alpha > 1


@pytest.mark.parametrize("key", ["merged_s", "unmerged_s", "scale", "additive"])
def test_impossible_constants_are_refused(key):
    with pytest.raises(InputError, match=key):
        CreditRules(**{key: 0.0})
    with pytest.raises(InputError, match="multiplicative"):
        CreditRules(multiplicative=1.0)


# ---- properties


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=20), min_size=1, max_size=40), st.integers(1, 6))
def test_credit_is_conserved(queues, slots):
    credit = Credit(6, slots, batch=4, rules=CreditRules(scale=1.5))
    before = total(credit, 6)
    for adapters in queues:
        queue = queue_of(adapters)
        plan = credit.plan(queue)
        assert sum(gain for _, gain in plan.transfers) == 0
        credit.ran(plan, queue, 1)
        assert total(credit, 6) == before
        assert credit.alpha > credit.beta > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 6), POLICIES)
def test_a_batch_keeps_to_its_limits(adapters, slots, name):
    replica = make(name, slots)
    plan = replica.policy.plan(queue_of(adapters))
    chosen = [s.adapter for s in plan.order]
    assert chosen and len(set(plan.order)) == len(plan.order) and len(chosen) <= 4
    assert len(set(chosen)) <= (slots if plan.merged is None else 1)
    assert plan.merged is None or set(chosen) == {plan.merged}
    for adapter in set(chosen):  # first come first served within an adapter
        mine = [s.index for s in plan.order if s.adapter == adapter]
        oldest = [i for i, a in enumerate(adapters) if a == adapter][: len(mine)]
        assert mine == oldest


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=12), st.integers(1, 30))
def test_repeats_says_how_long_the_same_plan_holds(queues, most):
    """Asked again after each iteration, the policy gives the same plan as often as it said, and booking at once is the same."""
    rules = CreditRules(scale=1.0)
    stepped, jumped = Credit(4, 2, 4, rules), Credit(4, 2, 4, rules)
    for adapters in queues:
        queue = queue_of(adapters)
        plan = jumped.plan(queue)
        steps = min(most, jumped.repeats(plan, queue))
        for _ in range(steps):
            again = stepped.plan(queue)
            assert (list(again.order), again.merged, again.transfers) == (list(plan.order), plan.merged, plan.transfers)
            stepped.ran(again, queue, 1)
        jumped.ran(plan, queue, steps)
        assert (stepped.credits, stepped.alpha, stepped.beta, stepped.merged) == (
            jumped.credits, jumped.alpha, jumped.beta, jumped.merged,
        )  # fmt: skip
        assert (stepped._merged_work, stepped._unmerged_work, stepped._iterations, stepped._virtual_switches) == (
            jumped._merged_work, jumped._unmerged_work, jumped._iterations, jumped._virtual_switches,
        )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(ARRIVALS, POLICIES, st.integers(8, 60))
def test_nobody_is_lost_or_served_twice(drawn, name, blocks):
    replica = make(name, blocks=blocks)
    asked = sequences(drawn)
    done = serve(replica, asked)
    assert sorted(s.index for s in done) == list(range(len(asked)))
    for one in done:
        assert one.generated == one.output_tokens
        assert one.arrival_s <= one.scheduled_s < one.first_token_s <= one.finish_s
        assert one.executed_s <= one.finish_s - one.arrival_s + 1e-9
    assert replica.pool.free_blocks == blocks
    assert not replica.queue.by_adapter


@settings(max_examples=40, deadline=None)
@given(ARRIVALS, POLICIES, st.integers(10, 60))
def test_jumping_is_stepping(drawn, name, blocks):
    ends = []
    for jumps in (True, False):
        replica = make(name, blocks=blocks)
        replica.jumps = jumps
        serve(replica, asked := sequences(drawn))
        ends.append([(s.finish_s, s.first_token_s, s.preemptions) for s in asked])
    assert len(ends[0]) == len(ends[1])
    for one, other in zip(*ends, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize(("scale", "most"), [(1.0, 1.5), (4.0, 4.0)])
def test_starvation_is_bounded_by_the_credit_scale(scale, most):
    """One rare request against an endless crowd of another adapter: displaced, paid, and then served."""
    rare = sequence(0, 1, arrival_s=0.0, answer=1)
    crowd = [sequence(i, 0, arrival_s=0.0, answer=30) for i in range(1, 400)]
    policy = Credit(2, 2, 4, CreditRules(scale=scale))
    replica = Replica(0, engine_config(4000, 4), policy, COSTS, Slots(2, range(2)))
    serve(replica, [rare, *crowd])
    assert rare.finish_s <= most
    unbounded = sequence(0, 1, arrival_s=0.0, answer=1)
    again = [sequence(i, 0, arrival_s=0.0, answer=30) for i in range(1, 400)]
    policy = Credit(2, 2, 4, CreditRules(scale=1e6))
    serve(Replica(0, engine_config(4000, 4), policy, COSTS, Slots(2, range(2))), [unbounded, *again])
    assert unbounded.finish_s > 10  # what the protection is against


def test_an_overdue_adapter_is_served_unmerged_and_first():
    credit = Credit(3, 3, batch=2)
    credit.credits = {2: credit._right}
    plan = credit.plan(queue_of([0, 0, 0, 2, 2]))
    assert isinstance(plan, CreditPlan) and plan.merged is None
    assert [s.adapter for s in plan.order] == [2, 2]
    assert dict(plan.transfers) == {0: 2 * (UNIT // 2), 2: -2 * (UNIT // 2)}


# ---- slots and blocks


def test_slots_make_room_by_the_fewest_outstanding_and_keep_the_merged_one():
    slots = Slots(3, [0, 1, 2])
    slots.merged = 0
    assert slots.take([3], {0: 0, 1: 5, 2: 1}) == [3]
    assert set(slots.resident) == {0, 1, 3}
    with pytest.raises(InputError, match="slots"):
        slots.take([4, 5, 6], {})
    with pytest.raises(InputError, match="merged"):
        slots.drop(0)
    slots.merged = None
    slots.drop(0)
    assert set(slots.resident) == {1, 3}


def test_among_equals_the_longest_unused_leaves():
    slots = Slots(2, [0, 1])
    slots.take([0], {})
    assert slots.take([2], {}) == [2]
    assert set(slots.resident) == {0, 2}


@pytest.mark.parametrize(("capacity", "resident"), [(0, []), (1, [0, 1])])
def test_impossible_slots(capacity, resident):
    with pytest.raises(InputError, match="slot"):
        Slots(capacity, resident)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=5), max_size=20))
def test_what_is_wanted_becomes_resident(capacity, batches):
    slots = Slots(capacity)
    for wanted in batches:
        chosen = sorted(wanted)[:capacity]
        before = set(slots.resident)
        loads = slots.take(chosen, {})
        assert set(loads) == set(chosen) - before
        assert set(chosen) <= set(slots.resident) and len(slots.resident) <= capacity


def test_a_full_pool_swaps_out_the_youngest():
    replica = make("fcfs", slots=2, blocks=6, batch=2)
    old, young = sequence(0, 0, prompt=32, answer=40), sequence(1, 1, prompt=32, answer=40)
    done = serve(replica, [old, young])
    assert [s.index for s in done] == [0, 1]
    assert (old.preemptions, young.preemptions > 0) == (0, True)
    assert all(s.place is Place.READY for s in done)


def test_a_request_that_cannot_fit_is_refused():
    with pytest.raises(InputError, match="KV cache"):
        make("fcfs", blocks=2).submit(sequence(0, 0, prompt=100, answer=10))


def test_the_batch_must_be_a_number():
    with pytest.raises(InputError, match="batch"):
        engine_config(100, 0)
    assert isinstance(engine_config(100, 16), EngineConfig)
