"""Claims as data: what a figure file may say, and what is refused."""

import pytest
from pydantic import TypeAdapter, ValidationError

from harness.claims.models import Claim, check_claims, series_of

CLAIM = TypeAdapter(Claim)
ABOUT = {"id": "C1", "text": "said", "source": "Section 6"}
GOOD = {
    "ratio_between": {"series": "a", "over": ["b", "c"], "low": 1.38, "high": 14.77},
    "at_least": {"series": "a", "value": 1},
    "ordering": {"series": ["a", "b"]},
    "zero_at": {"series": "a", "at": {"rate_rps": 5}},
    "monotone": {"series": "a", "along": "rate_rps", "direction": "falling"},
    "crossing": {"series": "a", "along": "rate_rps", "level": 0, "before": "b"},
    "equals": {"series": "a", "at": {"model": "opt-6.7b"}, "value": 5.4473},
}


def claim(kind, **changes):
    return CLAIM.validate_python({**ABOUT, "kind": kind, **GOOD[kind], **changes})


@pytest.mark.parametrize("kind", GOOD)
def test_each_kind_is_read_and_refuses_a_key_it_does_not_know(kind):
    assert claim(kind).kind == kind
    with pytest.raises(ValidationError, match="extra_forbidden"):
        claim(kind, tolerence=0.1)


@pytest.mark.parametrize("missing", ["id", "text", "source"])
def test_every_claim_says_what_it_is_and_where_it_comes_from(missing):
    raw = {**ABOUT, "kind": "equals", **GOOD["equals"]}
    del raw[missing]
    with pytest.raises(ValidationError, match=missing):
        CLAIM.validate_python(raw)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ratio_between", {"low": 3, "high": 2}),
        ("ratio_between", {"over": []}),
        ("ratio_between", {"high": float("inf")}),
        ("equals", {"value": float("nan")}),
        ("equals", {"tolerance": -0.1}),
        ("equals", {"id": "a claim"}),
        ("ordering", {"series": ["a"]}),
        ("ordering", {"series": ["a", "a"]}),
        ("crossing", {"under": "b"}),  # besides level
        ("crossing", {"level": None}),
        ("crossing", {"before": []}),  # nothing left to check
        ("crossing", {"within": {"min": 3, "max": 2}}),
        ("zero_at", {"at": {"rate_rps": {}}}),
        ("zero_at", {"at": {"rate_rps": {"above": 3}}}),
        ("monotone", {"direction": "sideways"}),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused(kind, changes):
    with pytest.raises(ValidationError):
        claim(kind, **changes)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        CLAIM.validate_python({**ABOUT, "kind": "eval", "expression": "1+1"})


def test_series_are_listed_once_and_in_order():
    assert series_of(claim("crossing", before=["b", "c"], together_with=["c", "a"])) == ("a", "b", "c")


def test_claims_are_checked_against_their_figure():
    check_claims([claim("monotone")], ["a"], ["rate_rps"])
    with pytest.raises(ValueError, match="twice"):
        check_claims([claim("monotone"), claim("at_least")], ["a"], ["rate_rps"])
    with pytest.raises(ValueError, match="series 'b'"):
        check_claims([claim("ratio_between")], ["a"], ["rate_rps"])
    with pytest.raises(ValueError, match="factor 'rate_rps'"):
        check_claims([claim("monotone")], ["a"], ["model"])
    with pytest.raises(ValueError, match="factor 'rate_rps'"):
        check_claims([claim("zero_at")], ["a"], ["model"])
