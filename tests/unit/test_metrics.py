"""Records, percentiles and summaries: against hand-computed values, against `RequestRecord`, and against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.core import SLO_PRESETS, Request, RequestRecord, Slo, Status
from systems.common.metrics import PERCENTILE_RULE, Records, percentile, summarise

NAN = math.nan


def record(index, arrival_s, first_s, finish_s, outputs, status=Status.FINISHED, tokens=(), adapter=None, preemptions=0):
    request = Request(index, arrival_s, 10, outputs, adapter)
    return RequestRecord(request, arrival_s, first_s, finish_s, preemptions, status, tokens)


RUN = [
    record(0, 0.0, 0.5, 2.5, 5, tokens=(0.5, 1.0, 1.5, 2.0, 2.5)),  # TTFT 0.5, TPOT 0.5, E2E 2.5
    record(1, 1.0, 3.0, 3.0, 1, tokens=(3.0,)),  # TTFT 2, no TPOT, E2E 2
    record(2, 2.0, 2.1, 4.1, 11, tokens=tuple(2.1 + 0.2 * i for i in range(11)), preemptions=2),  # TTFT 0.1, TPOT 0.2
    record(3, 3.0, NAN, NAN, 4, Status.FAILED),
    record(4, 4.0, 4.5, NAN, 4, Status.CUT, tokens=(4.5, 4.6)),
]


def test_summary_by_hand():
    table = summarise(Records.from_records(RUN), Slo(ttft_s=1.0, tpot_s=0.3))
    assert (table["requests"], table["finished"], table["failed"], table["cut"]) == (5, 3, 1, 1)
    assert table["preemptions"] == 2
    assert table["duration_s"] == pytest.approx(4.1)  # the last finish
    assert table["attainment"] == pytest.approx(1 / 4)  # only request 2 is good; the failed one counts, the cut one doesn't
    assert table["goodput_rps"] == pytest.approx(1 / 4.1)
    assert table["requests_per_s"] == pytest.approx(3 / 4.1)
    assert table["output_tokens_per_s"] == pytest.approx(17 / 4.1)
    assert table["ttft_mean_s"] == pytest.approx((0.5 + 2.0 + 0.1) / 3)
    assert table["ttft_p50_s"] == pytest.approx(0.5)
    assert table["ttft_p90_s"] == pytest.approx(0.5 + 0.8 * 1.5)
    assert table["tpot_mean_s"] == pytest.approx(0.35)  # of two: one token has no TPOT
    assert table["e2e_p50_s"] == pytest.approx(2.1)
    assert table["itl_mean_s"] == pytest.approx((4 * 0.5 + 10 * 0.2) / 14)  # finished requests' gaps, none across requests
    assert table["queue_mean_s"] == 0


def test_a_tpot_that_does_not_exist_is_met():
    table = summarise(Records.from_records([RUN[1]]), Slo(tpot_s=1e-9))
    assert table["attainment"] == 1
    assert math.isnan(table["tpot_p99_s"])


def test_without_slo_every_finished_request_is_good():
    assert summarise(Records.from_records(RUN))["attainment"] == pytest.approx(3 / 4)


def test_window_counts_arrivals_inside_it():
    table = summarise(Records.from_records(RUN), start_s=1.0, end_s=3.0)
    assert (table["requests"], table["duration_s"], table["goodput_rps"]) == (2, 2.0, 1.0)
    assert table["ttft_mean_s"] == pytest.approx((2.0 + 0.1) / 2)


def test_empty_run_is_nan_everywhere():
    table = summarise(Records.from_records([]), Slo(ttft_s=1))
    assert {key for key, value in table.items() if not math.isnan(value)} == {
        "requests",
        "finished",
        "failed",
        "cut",
        "preemptions",
    }
    assert all(table[key] == 0 for key in ("requests", "finished", "failed", "cut"))


def test_all_failed():
    table = summarise(Records.from_records([RUN[3]]), Slo(ttft_s=1), end_s=10.0)
    assert (table["attainment"], table["goodput_rps"], table["output_tokens_per_s"]) == (0, 0, 0)
    assert math.isnan(table["ttft_p99_s"])


def test_all_cut_says_nothing_about_attainment():
    assert math.isnan(summarise(Records.from_records([RUN[4]]))["attainment"])


def test_itl_only_where_token_times_were_recorded():
    bare = [record(0, 0.0, 1.0, 2.0, 2)]
    assert "itl_p50_s" not in summarise(Records.from_records(bare))


def test_schedule_lag_and_other_percentiles():
    table = summarise(
        Records.from_records(RUN), schedule_lag_s=np.array([0.0, 0.01, 0.02]), percentiles=(95, 99.9), rule="nearest-rank"
    )
    assert table["schedule_lag_p50_s"] == 0.01
    assert table["ttft_p99.9_s"] == 2.0
    assert "ttft_p50_s" not in table


def test_columns_are_plain_lists_with_words_for_statuses():
    columns = Records.from_records(RUN).columns()
    assert columns["status"] == ["finished"] * 3 + ["failed", "cut"]
    assert columns["input_tokens"] == [10] * 5
    assert set(map(len, columns.values())) == {5}
    assert "adapter" not in columns
    named = Records.from_records([record(0, 0.0, 1.0, 2.0, 2, adapter="a"), record(1, 0.0, 1.0, 2.0, 2)])
    assert named.columns()["adapter"] == ["a", None]


def test_mlperf_presets():
    # <model>.Server.{ttft_latency, tpot_latency} in ms: mlcommons/inference, loadgen/mlperf.conf at 001712e
    published = {
        "llama2-70b": (2000, 200),
        "llama2-70b-interactive": (450, 40),
        "mixtral-8x7b": (2000, 200),
        "llama3.1-405b": (6000, 175),
        "llama3.1-405b-interactive": (4500, 80),
        "llama3.1-8b": (2000, 100),
        "llama3.1-8b-interactive": (500, 30),
    }
    assert {
        name: Slo(ttft_s=ttft_ms / 1000, tpot_s=tpot_ms / 1000, percentile=99)
        for name, (ttft_ms, tpot_ms) in ((f"mlperf-{model}", limits) for model, limits in published.items())
    } == dict(SLO_PRESETS)


def test_percentile_rules_by_hand():
    values = [40.0, 10.0, NAN, 30.0, 20.0]
    assert PERCENTILE_RULE == "linear"
    assert percentile(values, 50) == 25
    assert percentile(values, 99) == pytest.approx(39.7)
    assert percentile(values, 50, "nearest-rank") == 20
    assert percentile(values, 51, "nearest-rank") == 30
    assert percentile(values, 50, "artifact") == 30  # sorted[int(4 * 50 / 100)]
    assert percentile(values, 100, "artifact") == 40  # where the artifact's index would be past the end
    for rule in ("linear", "nearest-rank", "artifact"):
        assert percentile(values, 0, rule) == 10
        assert percentile(values, 100, rule) == 40
        assert math.isnan(percentile([], 99, rule))
        assert percentile([7.0], 99, rule) == 7
    with pytest.raises(AssertionError, match="no percentile rule"):
        percentile(values, 50, "median of medians")


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0, 100))
def test_linear_rule_is_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-9)


@st.composite
def runs(draw):
    """Runs with every status, one-token requests, missing times, and with or without token times."""
    with_tokens = draw(st.booleans())
    records = []
    arrival_s = 0.0
    for index in range(draw(st.integers(0, 8))):
        arrival_s += draw(st.sampled_from([0.0, 0.25, 1.0]))
        status = draw(st.sampled_from(list(Status)))
        gaps = draw(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=5))
        times = tuple((arrival_s + np.cumsum(gaps)).tolist())
        started = status is Status.FINISHED or draw(st.booleans())
        first_s = times[0] if started else NAN
        finish_s = times[-1] if status is Status.FINISHED else NAN
        tokens = times if with_tokens and started else ()
        adapter = draw(st.sampled_from([None, "a", "b"]))
        records.append(record(index, arrival_s, first_s, finish_s, len(gaps), status, tokens, adapter))
    return records


def same(a, b):
    return a == pytest.approx(b, nan_ok=True)


@settings(deadline=None)
@given(runs())
def test_columns_and_objects_agree(records):
    table = Records.from_records(records)
    assert len(table) == len(records)
    for i, one in enumerate(records):
        assert repr(table.record(i)) == repr(one)
    assert same(table.ttft_s.tolist(), [r.ttft_s for r in records])
    assert same(table.tpot_s.tolist(), [r.tpot_s for r in records])
    assert same(table.e2e_s.tolist(), [r.e2e_s for r in records])
    assert same(table.itl_s.tolist(), [gap for r in records for gap in r.itl_s])


@settings(deadline=None)
@given(runs(), st.floats(0.05, 3), st.floats(0.05, 3), st.floats(0.05, 6))
def test_good_is_slo_is_good(records, ttft_s, tpot_s, e2e_s):
    for slo in (Slo(ttft_s=ttft_s), Slo(tpot_s=tpot_s), Slo(ttft_s, tpot_s, e2e_s)):
        assert Records.from_records(records).good(slo).tolist() == [slo.is_good(r) for r in records]


@settings(deadline=None)
@given(runs(), st.lists(st.booleans(), min_size=8, max_size=8))
def test_select_keeps_whole_records(records, mask):
    kept = [r for r, keep in zip(records, mask, strict=False) if keep]
    chosen = Records.from_records(records).select(np.array(mask[: len(records)], dtype=bool))
    assert len(chosen) == len(kept)
    assert same(chosen.itl_s.tolist(), [gap for r in kept for gap in r.itl_s])
    assert [chosen.record(i).token_s for i in range(len(kept))] == [r.token_s for r in kept]


@settings(deadline=None)
@given(runs())
def test_summary_is_bounded(records):
    table = summarise(Records.from_records(records), Slo(ttft_s=1.0))
    assert table["finished"] + table["failed"] + table["cut"] == table["requests"]
    if not math.isnan(table["attainment"]):
        assert 0 <= table["attainment"] <= 1
    if table["finished"]:
        assert table["ttft_p50_s"] <= table["ttft_p90_s"] <= table["ttft_p99_s"]
        assert not table["goodput_rps"] > table["requests_per_s"]
