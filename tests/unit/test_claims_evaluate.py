"""Verdicts: each kind on tables where the answer is plain, and properties that hold for any table."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from harness.claims.data import Table, read_table
from harness.claims.evaluate import Status, evaluate
from harness.claims.models import Claim
from systems.registry import InputError

CLAIM = TypeAdapter(Claim)
REPRODUCED, DIFFERS, NOT_TESTABLE = Status.REPRODUCED, Status.DIFFERS, Status.NOT_TESTABLE
RATES = (0.5, 1.0, 2.0, 3.0)
NAN = math.nan


def claim(**raw):
    return CLAIM.validate_python({"id": "C1", "text": "said", "source": "Section 6", **raw})


def table(**series):
    """A table over RATES; None leaves the row out."""
    rows = [
        {"series": name, "rate_rps": rate, "peft": y}
        for name, ys in series.items()
        for rate, y in zip(RATES, ys, strict=False)
        if y is not None
    ]
    return Table(("rate_rps",), "peft", tuple(rows))


def verdict(data, **raw):
    return evaluate(claim(**raw), data)


RATIO = {"kind": "ratio_between", "series": "a", "over": "b", "low": 2, "high": 4}


class TestRatioBetween:
    def test_inside(self):
        found = verdict(table(a=[6, 6, 4], b=[3, 2, 1]), **RATIO)
        assert found.status is REPRODUCED
        assert (found.numbers["min"], found.numbers["max"], found.numbers["points"]) == (2, 4, 3)

    def test_outside_names_the_worst_point(self):
        found = verdict(table(a=[6, 6, 9], b=[3, 1, 1]), **RATIO)
        assert found.status is DIFFERS
        assert "a over b at rate_rps=2: 9" in found.reason

    def test_zero_baselines_are_left_out_and_counted(self):
        found = verdict(table(a=[6, 6, 0], b=[3, 0, 0]), **RATIO)
        assert found.status is REPRODUCED
        assert found.numbers["points"] == 1
        assert "left out: 2 with b at 0" in found.reason

    def test_all_baselines_zero_cannot_be_tested(self):
        found = verdict(table(a=[6, 6], b=[0, 0]), **RATIO)
        assert found.status is NOT_TESTABLE
        assert "2 with b at 0" in found.reason

    def test_ours_at_zero_is_a_ratio_of_zero(self):
        assert verdict(table(a=[0], b=[1]), **RATIO).status is DIFFERS

    def test_only_the_selected_points_count(self):
        data = table(a=[6, 90], b=[3, 1])
        assert verdict(data, **RATIO, at={"rate_rps": {"max": 0.5}}).status is REPRODUCED
        assert verdict(data, **RATIO, at={"rate_rps": {"min": 1}}).status is DIFFERS
        assert verdict(data, **RATIO, at={"rate_rps": 0.5}).status is REPRODUCED

    def test_tolerance_is_relative_to_each_end(self):
        assert verdict(table(a=[4.4], b=[1]), **RATIO).status is DIFFERS
        assert verdict(table(a=[4.4], b=[1]), **RATIO, tolerance=0.1).status is REPRODUCED
        assert verdict(table(a=[1.8], b=[1]), **RATIO, tolerance=0.1).status is REPRODUCED

    def test_an_absent_baseline_makes_it_untestable_unless_another_breaks_it(self):
        both = {**RATIO, "over": ["b", "c"]}
        found = verdict(table(a=[6], b=[2]), **both)
        assert found.status is NOT_TESTABLE
        assert "no number here for c" in found.reason
        assert verdict(table(a=[60], b=[2]), **both).status is DIFFERS

    def test_a_missing_number_is_left_out_and_counted(self):
        found = verdict(table(a=[6, 6], b=[3, NAN]), **RATIO)
        assert found.status is REPRODUCED
        assert "1 with a number missing" in found.reason


def test_at_least():
    data = table(a=[2, 3], b=[1, 3])
    assert verdict(data, kind="at_least", series=["a", "b"], value=1).status is REPRODUCED
    assert verdict(data, kind="at_least", series=["a", "b"], value=2).status is DIFFERS
    assert verdict(data, kind="at_least", series="a", over="b", value=1).status is REPRODUCED
    assert verdict(data, kind="at_least", series="a", over="b", value=1.5).status is DIFFERS


def test_ordering():
    data = table(a=[3, 3], b=[2, 3], c=[1, 1])
    assert verdict(data, kind="ordering", series=["a", "b", "c"]).status is REPRODUCED
    found = verdict(data, kind="ordering", series=["b", "a", "c"])
    assert found.status is DIFFERS
    assert "at rate_rps=0.5" in found.reason
    assert found.measured == "holds for 3 of 4 pairs"
    assert verdict(data, kind="ordering", series=["c", "b", "a"], direction="rising").status is REPRODUCED
    assert verdict(data, kind="ordering", series=["b", "a"], tolerance=0.5).status is REPRODUCED


def test_zero_at():
    data = table(a=[1, 0.01], b=[0, 0])
    assert verdict(data, kind="zero_at", series="b").status is REPRODUCED
    assert verdict(data, kind="zero_at", series=["a", "b"], at={"rate_rps": 1}).status is DIFFERS
    assert verdict(data, kind="zero_at", series="a", at={"rate_rps": 1}, tolerance=0.02).status is REPRODUCED
    assert verdict(data, kind="zero_at", series="a", at={"rate_rps": 3}).status is NOT_TESTABLE


def test_monotone():
    data = table(a=[3, 2, 2, 0], b=[3, 2, 2.1, 0], c=[1])
    falls = {"kind": "monotone", "along": "rate_rps", "direction": "falling"}
    assert verdict(data, **falls, series="a").status is REPRODUCED
    found = verdict(data, **falls, series=["a", "b"])
    assert found.status is DIFFERS
    assert "b 2 at rate_rps=1, 2.1 at 2" in found.reason
    assert verdict(data, **falls, series="b", tolerance=0.06).status is REPRODUCED
    assert verdict(data, **{**falls, "direction": "rising"}, series="a").status is DIFFERS
    assert verdict(data, **falls, series="c").status is NOT_TESTABLE  # one point has no direction


def test_monotone_holds_other_factors():
    rows = [
        {"series": "a", "rate_rps": rate, "rank": rank, "peft": 10 * (rank == 8.0) - rate}
        for rate in RATES
        for rank in (8.0, 16.0)
    ]
    data = Table(("rate_rps", "rank"), "peft", tuple(rows))
    assert verdict(data, kind="monotone", series="a", along="rate_rps", direction="falling").status is REPRODUCED


class TestCrossing:
    FIRST = {"kind": "crossing", "series": "a", "along": "rate_rps", "level": 0, "before": ["b", "c"]}
    TOGETHER = {"kind": "crossing", "series": "a", "along": "rate_rps", "level": 0, "together_with": ["b", "c"]}

    def test_first(self):
        found = verdict(table(a=[1, 0, 0, 0], b=[1, 1, 1, 0], c=[1, 1, 1, 1]), **self.FIRST)
        assert found.status is REPRODUCED
        assert found.measured == "a at 1; b at 3; c never"
        assert found.numbers == {"a": 1, "b": 3}

    def test_another_is_earlier(self):
        found = verdict(table(a=[1, 1, 0, 0], b=[1, 1, 1, 0], c=[1, 0, 0, 0]), **self.FIRST)
        assert (found.status, found.reason) == (DIFFERS, "c comes down earlier")

    def test_a_tie_is_not_first(self):
        found = verdict(table(a=[1, 0, 0, 0], b=[1, 0, 0, 0], c=[1, 1, 1, 1]), **self.FIRST)
        assert (found.status, found.reason) == (DIFFERS, "b comes down at the same level")

    def test_never_while_another_does(self):
        assert verdict(table(a=[1, 1, 1, 1], b=[1, 1, 1, 0], c=[1, 1, 1, 1]), **self.FIRST).status is DIFFERS

    @pytest.mark.parametrize("rule", [FIRST, TOGETHER])
    def test_nobody_does_within_the_range(self, rule):
        found = verdict(table(a=[1, 1], b=[1, 1], c=[1, 1]), **rule)
        assert found.status is NOT_TESTABLE
        assert "rate_rps=1, the last level" in found.reason

    def test_together(self):
        assert verdict(table(a=[1, 0], b=[2, 0], c=[3, 0]), **self.TOGETHER).status is REPRODUCED
        assert verdict(table(a=[1, 0], b=[2, 0], c=[3, 1]), **self.TOGETHER).status is DIFFERS

    def test_gaps_could_hide_the_crossing(self):
        found = verdict(table(a=[1, 0], b=[1, None], c=[1, 1]), **self.FIRST)
        assert found.status is NOT_TESTABLE
        assert "b at rate_rps=1" in found.reason

    def test_under_another_series_within_a_range(self):
        data = table(a=[5, 4, 2, 1], b=[3, 3, 3, 3])
        rule = {"kind": "crossing", "series": "a", "along": "rate_rps", "under": "b"}
        assert verdict(data, **rule, within={"min": 1, "max": 2}).status is REPRODUCED
        assert verdict(data, **rule, within={"max": 1}).status is DIFFERS
        never = table(a=[5, 5], b=[3, 3])
        assert verdict(never, **rule, within={"max": 1}).status is DIFFERS  # the range was looked at whole
        assert verdict(never, **rule, within={"max": 3}).status is NOT_TESTABLE


def test_equals():
    data = Table(("model",), "latency_s", ({"series": "a", "model": "opt", "latency_s": 5.44733, "gpus": 4.0},))
    rule = {"kind": "equals", "series": "a", "at": {"model": "opt"}}
    assert verdict(data, **rule, value=5.4473, tolerance=1e-5).status is REPRODUCED
    assert verdict(data, **rule, value=5.4473).status is DIFFERS
    assert verdict(data, **rule, column="gpus", value=4).status is REPRODUCED
    assert verdict(data, **rule, column="layers", value=4).status is NOT_TESTABLE
    assert verdict(data, kind="equals", series="a", at={"model": "gpt"}, value=4).status is NOT_TESTABLE


def test_an_empty_table_says_so():
    assert evaluate(claim(**RATIO), Table(("rate_rps",), "peft", ())).reason == "the table is empty"


def test_reading_a_table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("series,rate_rps,model,peft,feasible\n7,0.5,opt,nan,true\nb,1,opt,2.5,false\n")
    data = read_table(path, ["rate_rps", "model"], "peft")
    assert data.rows[1] == {"series": "b", "rate_rps": 1.0, "model": "opt", "peft": 2.5, "feasible": False}
    assert data.rows[0]["series"] == "7"
    assert data.numbers("7", {}, None) == {}
    with pytest.raises(InputError, match="column rank is missing"):
        read_table(path, ["rank"], "peft")
    with pytest.raises(InputError, match=r"none\.csv"):
        read_table(tmp_path / "none.csv", [], "peft")


numbers = st.floats(0.001, 1000)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), st.floats(0.1, 10))
def test_a_ratio_does_not_depend_on_the_unit(points, unit):
    ours, theirs = zip(*points, strict=True)
    rule = {"kind": "ratio_between", "series": "a", "over": "b", "low": 0, "high": 1e9}
    first = verdict(table(a=ours, b=theirs), **rule)
    second = verdict(table(a=[unit * y for y in ours], b=[unit * y for y in theirs]), **rule)
    assert first.status is second.status is REPRODUCED
    assert first.numbers["max"] == pytest.approx(second.numbers["max"])


@given(st.lists(numbers, min_size=2, max_size=4))
def test_monotone_agrees_with_sorting(ys):
    found = verdict(table(a=ys), kind="monotone", series="a", along="rate_rps", direction="rising")
    assert (found.status is REPRODUCED) == (ys == sorted(ys))


@given(st.permutations(range(8)), st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=8, max_size=8))
def test_the_order_of_rows_does_not_matter(order, ys):
    data = table(a=ys[:4], b=ys[4:])
    shuffled = Table(data.factors, data.objective, tuple(data.rows[place] for place in order))
    for rule in (
        RATIO,
        {"kind": "ordering", "series": ["a", "b"]},
        {"kind": "monotone", "series": ["a", "b"], "along": "rate_rps", "direction": "falling"},
        {"kind": "crossing", "series": "a", "along": "rate_rps", "level": 0, "before": "b"},
    ):
        first, second = verdict(data, **rule), verdict(shuffled, **rule)
        assert (first.status, first.measured, first.numbers) == (second.status, second.measured, second.numbers)
