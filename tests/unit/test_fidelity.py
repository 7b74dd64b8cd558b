"""Errors of a simulation against a measurement."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.core import Request, RequestRecord, Status
from systems.common.fidelity import LATENCIES, RATES, STATISTICS, Difference, compare, rows
from systems.common.metrics import Records


def run(scale: float = 1.0, count: int = 40, status: Status = Status.FINISHED) -> list[RequestRecord]:
    """Requests whose latencies all are `scale` times those of scale 1; arrivals the same."""
    made = []
    for i in range(count):
        arrival_s, ttft_s, decode_s = 0.5 * i, 0.05 + 0.01 * (i % 7), 1.0 + 0.1 * (i % 5)
        first_s = arrival_s + scale * ttft_s
        request = Request(i, arrival_s, 100, 21)
        made.append(RequestRecord(request, arrival_s, first_s, first_s + scale * decode_s, status=status))
    return made


def by_name(differences: tuple[Difference, ...]) -> dict[tuple[str, str], Difference]:
    return {(one.metric, one.statistic): one for one in differences}


def test_a_run_against_itself_has_no_error() -> None:
    differences = compare(run(), Records.from_records(run()))
    assert len(differences) == len(LATENCIES) * len(STATISTICS) + len(RATES) + 1
    assert all(one.error == 0 for one in differences)
    assert all(one.met is (None if one.aim is None else True) for one in differences)


@given(scale=st.floats(0.3, 3.0))
def test_latencies_that_are_all_stretched_give_that_error_with_its_sign(scale: float) -> None:
    found = by_name(compare(run(scale), run()))
    for latency in LATENCIES:
        for statistic in STATISTICS:
            assert found[latency, statistic].error == pytest.approx(scale - 1, abs=1e-9)
    assert found["finished", "count"].error == 0


def test_the_sign_says_who_is_larger_and_the_base_is_the_measurement() -> None:
    found = by_name(compare(run(1.5), run(1.0)))
    back = by_name(compare(run(1.0), run(1.5)))
    assert found["tpot", "p50"].error == pytest.approx(0.5)
    assert back["tpot", "p50"].error == pytest.approx(-1 / 3)
    assert found["requests_per_s", "rate"].error < 0 < back["requests_per_s", "rate"].error


def test_one_statistic_may_differ_alone() -> None:
    measured = run(count=200)
    slow = [RequestRecord(r.request, r.scheduled_s, r.first_token_s + 5, r.finish_s + 5) for r in measured[:1]]
    found = by_name(compare([*slow, *measured[1:]], measured))
    assert found["ttft", "p50"].error == pytest.approx(0, abs=0.02)
    assert found["ttft", "mean"].error > 0.2
    assert found["tpot", "p99"].error == pytest.approx(0)


def test_requests_that_did_not_finish_show_in_the_counts_and_not_in_the_latencies() -> None:
    measured = [*run(count=30), *run(count=10, status=Status.CUT)]
    found = by_name(compare(run(count=40), measured))
    assert (found["finished", "count"].simulated, found["finished", "count"].measured) == (40, 30)
    assert found["finished", "count"].error == pytest.approx(1 / 3)


def test_what_is_undefined_stays_undefined_and_meets_no_aim() -> None:
    nothing = run(count=3, status=Status.FAILED)
    found = by_name(compare(nothing, run(count=3)))
    assert math.isnan(found["e2e", "p50"].error)
    assert found["e2e", "p50"].met is False
    assert found["ttft", "p99"].aim is None and found["ttft", "p99"].met is None
    assert math.isnan(Difference("ttft", "p50", "s", 1.0, 0.0).error)


def test_aims_decide_by_size_not_by_sign() -> None:
    assert by_name(compare(run(1.019), run()))["e2e", "p99"].met is True
    assert by_name(compare(run(0.979), run()))["e2e", "p99"].met is False
    assert by_name(compare(run(0.96), run()))["ttft", "p50"].met is True


def test_rows_are_a_table() -> None:
    table = rows(compare(run(1.1), run()))
    assert {tuple(row) for row in table} == {("metric", "statistic", "unit", "simulated", "measured", "error", "aim", "met")}
    assert np.isfinite([row["error"] for row in table]).all()  # type: ignore[arg-type]
