"""Serverless functions as adapters' traffic: readers, stand-ins, stripes, replay; ShareGPT's text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.workloads.build import build
from systems.common.workloads.functions import (
    FunctionTrace,
    function_trace,
    invocations,
    made_up,
    per_minute,
    replay,
    split_applications,
    stripe,
)
from systems.common.workloads.readers import sharegpt_turns

MAF1, MAF2 = "azure_functions_2019", "azure_functions_2021"
DECLARED = {
    "arrivals": "functions", "trace": MAF2, "adapters": 8, "requests": 400, "rate_rps": 4, "window_hours": 6,
    "lengths": "sharegpt_turns", "lengths_filter": "vllm-sharegpt",
}  # fmt: skip
ABSENT = {MAF1: None, MAF2: None, "sharegpt_turns": None}


# ---- stripes


def test_consecutive_functions_share_an_adapter_and_wrap_round():
    counts = np.arange(1.0, 8.0)[:, None]  # 1 to 7
    assert stripe(counts, 2, 2, False)[:, 0].tolist() == [1 + 2 + 5 + 6, 3 + 4 + 7]
    assert stripe(counts, 2, 2, True)[:, 0].tolist() == [7 + 6 + 3 + 2, 5 + 4 + 1]
    assert stripe(counts, 9, 1, False)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0]


def test_a_larger_stride_of_popular_functions_is_more_skewed():
    counts = function_trace(MAF2, None).window(6)
    tops = [float(stripe(counts, 8, stride, True)[0].sum() / counts.sum()) for stride in (4, 8, 16, 32)]
    assert tops == sorted(tops) and tops[0] < 0.85 < tops[-1]


@pytest.mark.parametrize(("adapters", "stride", "key"), [(0, 1, "adapters"), (4, 0, "map_stride")])
def test_bad_stripes(adapters, stride, key):
    with pytest.raises(InputError, match=key):
        stripe(np.ones((3, 1)), adapters, stride, False)


# ---- replay


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 50), min_size=3, max_size=3), min_size=1, max_size=6).filter(
        lambda rows: all(sum(column) > 0.1 for column in zip(*rows, strict=True))
    ),
    st.integers(3, 200),
    st.booleans(),
)
def test_arrivals_are_as_many_as_asked_and_in_order(rows, requests, correlated):
    counts = np.array(rows)
    times, who = replay(counts, np.random.default_rng(0), requests, 5.0, 1.0, correlated)
    assert len(times) == len(who) == requests
    assert (np.diff(times) >= 0).all() and times[0] >= 0
    silent = np.flatnonzero(counts.sum(axis=1) == 0)
    assert not set(silent.tolist()) & set(who.tolist())


def test_rate_shares_and_spread_of_gaps():
    counts = np.array([[6.0], [3.0], [1.0]])
    times, who = replay(counts, np.random.default_rng(1), 30_000, 20.0)
    assert 30_000 / times[-1] == pytest.approx(20, rel=0.03)
    assert np.bincount(who) / 30_000 == pytest.approx([0.6, 0.3, 0.1], abs=0.015)
    gaps = np.diff(times[who == 0])
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.05)
    bursty, mine = replay(counts, np.random.default_rng(1), 30_000, 20.0, cv=3.0)
    gaps = np.diff(bursty[mine == 0])
    assert gaps.std() / gaps.mean() == pytest.approx(3, rel=0.15)


def test_every_interval_gives_its_part():
    counts = np.array([[1.0, 0.0], [0.0, 1.0]])
    _, who = replay(counts, np.random.default_rng(0), 10, 1.0)
    assert who.tolist() == [0] * 5 + [1] * 5


def test_correlated_streams_are_copies():
    counts = np.array([[1.0, 1.0], [1.0, 1.0]])
    times, who = replay(counts, np.random.default_rng(0), 400, 10.0, correlated=True)
    first, second = times[:200][who[:200] == 0], times[:200][who[:200] == 1]
    assert first == pytest.approx(second)  # both adapters at the same moments
    later = times[200:][who[200:] == 0] - times[199]
    assert later == pytest.approx(first)  # and in the next interval again
    free, names = replay(counts, np.random.default_rng(0), 400, 10.0)
    assert not np.intersect1d(free[names == 0], free[names == 1]).size


@pytest.mark.parametrize("counts", [np.zeros((3, 2)), np.array([[1.0, 0.0]])])
def test_an_empty_trace(counts):
    with pytest.raises(InputError, match="empty"):
        replay(counts, np.random.default_rng(0), 10, 1.0)
    with pytest.raises(InputError, match="requests"):
        replay(np.ones((1, 4)), np.random.default_rng(0), 3, 1.0)


# ---- readers


def maf1(tmp_path, rows, name="d01.csv"):
    path = tmp_path / name
    header = ["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, range(1, 1441))]
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return path


def test_maf1_counts_per_hour(tmp_path):
    busy, quiet = [1] * 60 + [2] * 60 + [0] * 1320, [0] * 1439 + [5]
    trace = per_minute(maf1(tmp_path, [["o", "a", "f", "http", *busy], ["o", "a", "g", "timer", *quiet]]))
    assert trace.counts.shape == (2, 24)
    assert trace.counts[:, [0, 1, 23]].tolist() == [[60, 120, 0], [0, 0, 5]]
    with pytest.raises(InputError, match="window_hours"):
        trace.window(25)
    with pytest.raises(InputError, match="no invocation"):
        trace.window(3)


def test_maf2_counts_per_hour_from_the_first_start(tmp_path):
    path = tmp_path / "maf2.txt"
    path.write_text("app,func,end_timestamp,duration\nA,x,10,4\nA,y,20,1\nB,x,4000,1\nA,x,15,0.5\n")
    trace = invocations(path)  # starts: 6, 19, 3999, 14.5
    assert trace.counts.tolist() == [[2, 0], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (invocations, "app,func,end_timestamp\nA,x,10\n", "duration"),
        (invocations, "app,func,end_timestamp,duration\nA,x,ten,4\n", "line 2"),
        (invocations, "app,func,end_timestamp,duration\n", "no rows"),
        (per_minute, "HashFunction,1,1440\n", "no rows"),
        (per_minute, "HashFunction,1,1440\nf,1,2\n", "1440 counts"),
        (per_minute, "HashFunction\n", "1"),
    ],
)
def test_unusable_traces_are_refused_in_one_line(tmp_path, read, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value) and "trace.csv" in str(caught.value)


def test_a_missing_trace(tmp_path):
    with pytest.raises(InputError, match="CSV"):
        function_trace(MAF2, tmp_path / "none.txt")
    with pytest.raises(InputError, match="functions"):
        function_trace("azure_conv", None)


def test_sharegpt_text(tmp_path):
    path = tmp_path / "sharegpt.json"
    turns = [
        [{"value": "x" * 39}, {"value": "y" * 390}, {"value": "z"}],
        [{"value": "alone"}],
        [{"value": ""}, {"value": "ab"}],
    ]
    path.write_text(json.dumps([{"conversations": mine} for mine in turns]))
    read = sharegpt_turns(path)
    assert read.input_tokens.tolist() == [10, 1] and read.output_tokens.tolist() == [100, 1]
    for wrong in ("[", "{}", '[{"conversations": [{"value": "a"}]}]', '[{"text": 1}]'):
        path.write_text(wrong)
        with pytest.raises(InputError, match=r"sharegpt\.json"):
            sharegpt_turns(path)


# ---- stand-ins


def test_maf1_stand_in_has_the_published_skew():
    counts = np.sort(function_trace(MAF1, None).counts[:, 0])[::-1]
    assert len(counts) == 46_413
    assert counts[: round(0.186 * len(counts))].sum() / counts.sum() == pytest.approx(0.996, abs=0.004)


def test_maf2_stand_in_follows_the_published_timelines():
    trace = function_trace(MAF2, None)
    assert trace.counts.shape == (92, 6)
    hourly = trace.counts.sum(axis=0)
    top = trace.counts.max(axis=0) / hourly
    assert top[0] < 0.3 and 0.6 < top[5] < 0.8  # the busiest application is first called after 6,429 s
    assert trace.counts.max() == pytest.approx(535_667 * 3600 / (1_209_600 - 6_429))


def test_splitting_keeps_every_call():
    trace = split_applications([(1000.0, 0.0, 7200.0), (10.0, 3600.0, 3700.0), (5.0, 0.0, 100.0)], 3.5, 0.5, hours=2)
    assert trace.counts.sum() == pytest.approx(1015)
    assert trace.counts.sum(axis=0).tolist() == pytest.approx([505, 510])


def test_a_stand_in_is_alike_every_hour_or_says_so():
    assert function_trace(MAF1, None).window(3).shape == (46_413, 3)
    with pytest.raises(InputError, match="popularity"):
        made_up({"kind": "functions", "popularity": "fame"})
    assert FunctionTrace(np.ones((2, 1)), every=True).window(4).tolist() == [[1.0] * 4] * 2


# ---- declared


def test_a_declared_workload():
    made = build(DECLARED, ABSENT, 3)
    again = build(DECLARED, ABSENT, 3)
    assert len(made) == 400 and (made.arrival_s == again.arrival_s).all() and made.adapters == again.adapters
    assert set(made.adapters) <= {f"adapter-{k}" for k in range(8)}
    assert {f"{MAF2}: synthetic stand-in", "sharegpt_turns: synthetic stand-in"} <= set(made.notes)
    assert made.output_tokens.mean() == pytest.approx(234, rel=0.15)
    longer = build({**DECLARED, "lengths": "fixed", "lengths_filter": None, "input_tokens": 5, "output_tokens": 5}, ABSENT, 3)
    assert (longer.arrival_s == made.arrival_s).all()  # lengths do not move arrivals


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"trace": "azure_conv"}, "trace"),
        ({"trace": None}, "trace"),
        ({"adapters": None}, "adapters"),
        ({"requests": None}, "requests"),
        ({"window_hours": 9}, "window_hours"),
        ({"map_stride": 0}, "map_stride"),
        ({"rate_rps": 0}, "rate_rps"),
        ({"adapter_pattern": "zipf"}, "adapter_pattern"),
        ({"by_popularity": "yes"}, "by_popularity"),
    ],
)
def test_bad_declarations(change, key):
    with pytest.raises(InputError) as caught:
        build({**DECLARED, **change}, {**ABSENT, "azure_conv": None}, 0)
    assert caught.value.key == key
