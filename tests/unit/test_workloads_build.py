"""`build`: from a declaration to requests, and what it refuses."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.workloads import build
from systems.common.workloads.build import _ARRIVALS, _LENGTHS

STEADY = {"arrivals": "poisson", "rate_rps": 2, "seconds": 200, "lengths": "fixed", "input_tokens": 512, "output_tokens": 128}
FIG8A = {
    "arrivals": "poisson",
    "rate_rps": 2,
    "requests": 2000,
    "lengths": "sharegpt_lengths",
    "lengths_filter": "vllm-sharegpt",
    "mean_input_tokens": 215.2,
    "mean_output_tokens": 198,
}
REPLAY = {"arrivals": "replay", "trace": "azure_conv", "rate_rps": 4.15, "requests": 1000, "lengths": "trace"}
ABSENT = dict.fromkeys(("sharegpt_lengths", "sharegpt_turns", "azure_conv", "burstgpt", "azure_functions_2021"))


def without(declaration, *keys):
    return {key: value for key, value in declaration.items() if key not in keys}


CALLED = {"arrivals": "functions", "trace": "azure_functions_2021", "adapters": 8, "requests": 40}
EXAMPLES = [
    without(STEADY, "seconds") | CALLED,
    STEADY,
    STEADY | {"arrivals": "deterministic"},
    STEADY | {"arrivals": "gamma", "cv": 6.0},
    STEADY | {"arrivals": "spotserve-gamma", "cv": 6},
    without(STEADY, "rate_rps") | {"arrivals": "piecewise", "rates_rps": [1, 0, 5], "interval_s": 20},
    without(STEADY, "rate_rps", "seconds") | {"arrivals": "piecewise", "rates_rps": [1, 5], "durations_s": [100, 50]},
    STEADY | {"arrivals": "mmpp", "rates_rps": [1.0, 2.5], "dwell_s": [120, 96]},
    FIG8A,
    REPLAY,
    REPLAY | {"trace_start": 100, "lengths": "sharegpt_lengths"},
    REPLAY | {"trace": "burstgpt", "lengths": "fixed", "input_tokens": 1, "output_tokens": 1},
    without(STEADY, "input_tokens", "output_tokens")
    | {"lengths": "uniform"}
    | {"min_input_tokens": 5, "max_input_tokens": 9, "min_output_tokens": 1, "max_output_tokens": 2},
    without(STEADY, "input_tokens", "output_tokens")
    | {"lengths": "lognormal", "mean_input_tokens": 243, "p50_input_tokens": 119, "max_input_tokens": 1024}
    | {"mean_output_tokens": 235, "p50_output_tokens": 160},
    STEADY | {"adapters": 8},
    STEADY | {"adapters": 8, "adapter_pattern": "uniform"},
    STEADY | {"adapters": 8, "adapter_pattern": "zipf", "adapter_exponent": 1.05},
    FIG8A | {"lengths_replacement": True, "max_total_tokens": 1000},
]


def test_examples_use_everything_there_is():
    assert {e["arrivals"] for e in EXAMPLES} == set(_ARRIVALS)
    assert {e["lengths"] for e in EXAMPLES} >= set(_LENGTHS)


@pytest.mark.parametrize("declaration", EXAMPLES)
def test_every_example_builds_the_same_twice(declaration):
    one, two = (build(declaration, ABSENT, 3) for _ in range(2))
    assert len(one) > 0
    assert one.requests == two.requests and one.notes == two.notes
    assert [r.index for r in one.requests] == list(range(len(one)))
    assert (np.diff(one.arrival_s) >= 0).all()
    assert build(declaration, ABSENT, 4).requests != one.requests or declaration["arrivals"] in ("deterministic", "replay")


def test_columns_and_requests_agree():
    workload = build(STEADY | {"adapters": 3}, {}, 0)
    assert [r.arrival_s for r in workload.requests] == workload.arrival_s.tolist()
    assert [r.adapter for r in workload.requests][:4] == ["adapter-0", "adapter-1", "adapter-2", "adapter-0"]
    assert workload.requests is workload.requests  # made once
    assert pickle.loads(pickle.dumps(workload)).requests == workload.requests


def test_changing_lengths_or_adapters_does_not_change_arrivals():
    base = build(STEADY, {}, 5)
    for change in ({"lengths": "sharegpt_lengths"}, {"adapters": 4, "adapter_pattern": "uniform"}):
        declaration = STEADY | change
        if "lengths" in change:
            declaration = without(declaration, "input_tokens", "output_tokens")
        assert build(declaration, ABSENT, 5).arrival_s.tolist() == base.arrival_s.tolist()


def test_changing_the_rate_does_not_change_lengths():
    slow, fast = (build(FIG8A | {"rate_rps": rate}, ABSENT, 0) for rate in (0.5, 5))
    assert slow.input_tokens.tolist() == fast.input_tokens.tolist()
    np.testing.assert_allclose(slow.arrival_s, 10 * fast.arrival_s)


def test_figure_8a_inputs_from_the_real_file(mirror):
    path = mirror / "sharegpt_lengths/sharegpt_8k_filtered_stats_llama2_tokenizer.csv"
    workload = build(FIG8A | {"requests": 11_035}, {"sharegpt_lengths": path}, 0)
    assert workload.input_tokens.mean() == pytest.approx(215.2, abs=0.5)
    assert workload.output_tokens.mean() == pytest.approx(198, abs=0.5)
    assert workload.input_tokens.max() <= 1024 and (workload.input_tokens + workload.output_tokens).max() <= 2048
    assert min(workload.input_tokens.min(), workload.output_tokens.min()) >= 4
    assert workload.notes == ("sharegpt_lengths: lengths rescaled to a mean of 215.2 in, 198.0 out",)


def test_unscaled_filter_from_the_real_file(mirror):
    path = mirror / "sharegpt_lengths/sharegpt_8k_filtered_stats_llama2_tokenizer.csv"
    declaration = without(FIG8A, "mean_input_tokens", "mean_output_tokens") | {"requests": 11_035}
    workload = build(declaration, {"sharegpt_lengths": path}, 0)  # every row once
    assert (workload.input_tokens.mean(), workload.output_tokens.mean()) == pytest.approx((378, 419), abs=0.5)
    assert workload.notes == ()


def test_replay_of_the_real_trace(mirror):
    path = mirror / "azure_llm_2023/AzureLLMInferenceTrace_conv.csv"
    workload = build(REPLAY | {"requests": 19_366}, {"azure_conv": path}, 0)
    gaps = np.diff(workload.arrival_s)
    assert 1 / gaps.mean() == pytest.approx(4.15)
    assert gaps.std() / gaps.mean() == pytest.approx(1.094, abs=0.001)  # one factor on all gaps keeps it
    assert (workload.input_tokens[0], workload.output_tokens[0]) == (374, 44)  # the trace's own, in its order
    assert workload.notes == ("azure_conv: arrivals rescaled to 4.15 req/s",)
    plain = build(without(REPLAY, "rate_rps", "requests") | {"seconds": 60}, {"azure_conv": path}, 0)
    assert plain.arrival_s[1] == pytest.approx(4.314579) and plain.notes == ()
    later = build(REPLAY | {"trace_start": 1, "requests": 5}, {"azure_conv": path}, 0)
    assert (later.arrival_s[0], later.input_tokens[0]) == (0, 396)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "lengths.csv"
    declaration = STEADY | {"lengths": "sharegpt_lengths", "requests": 5}
    declaration = without(declaration, "input_tokens", "output_tokens", "seconds")
    for tokens in (7, 1234):
        path.write_text(f"num_prefill_tokens,num_decode_tokens\n{tokens},1\n")
        assert set(build(declaration, {"sharegpt_lengths": path}, 0).input_tokens.tolist()) == {tokens}


def test_stand_ins_are_said():
    assert build(FIG8A, ABSENT, 0).notes[0] == "sharegpt_lengths: synthetic stand-in"
    assert "azure_conv: synthetic stand-in" in build(REPLAY, ABSENT, 0).notes


def test_artifact_arrivals_are_said():
    (note,) = build(STEADY | {"arrivals": "spotserve-gamma", "cv": 6, "rate_rps": 0.35}, {}, 0).notes
    assert "0.0458" in note


@pytest.mark.parametrize("pattern", ["uniform", "zipf"])
def test_adapter_shares(pattern):
    declaration = without(STEADY, "seconds") | {"requests": 40_000, "adapters": 3, "adapter_pattern": pattern}
    if pattern == "zipf":
        declaration |= {"adapter_exponent": 1.0}
    names = build(declaration, {}, 0).adapters
    shares = [names.count(f"adapter-{k}") / len(names) for k in range(3)]
    expected = [1 / 3] * 3 if pattern == "uniform" else [6 / 11, 3 / 11, 2 / 11]
    assert shares == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("declaration", "key", "hint"),
    [
        ({}, "arrivals", "missing"),
        (STEADY | {"arrivals": "poison"}, "arrivals", "did you mean poisson"),
        (without(STEADY, "rate_rps"), "rate_rps", "missing"),
        (STEADY | {"rate_rps": 0}, "rate_rps", "above 0"),
        (STEADY | {"rate_rps": -1}, "rate_rps", "above 0"),
        (STEADY | {"rate_rps": float("nan")}, "rate_rps", "above 0"),
        (STEADY | {"rate_rps": "2"}, "rate_rps", "above 0"),
        (STEADY | {"rate_rps": True}, "rate_rps", "above 0"),
        (STEADY | {"requests": 5}, "requests, seconds", "exactly one"),
        (without(STEADY, "seconds"), "requests, seconds", "exactly one"),
        (STEADY | {"seconds": 0}, "seconds", "above 0"),
        (without(STEADY, "seconds") | {"requests": 2.5}, "requests", "whole number"),
        (STEADY | {"rate_rsp": 2}, "rate_rsp", "did you mean rate_rps"),
        (STEADY | {"cv": 2}, "cv", "not used"),
        (without(STEADY, "lengths"), "lengths", "missing"),
        (STEADY | {"lengths": "sharegpt"}, "lengths", "datasets"),
        (STEADY | {"lengths": 5}, "lengths", "text"),
        (STEADY | {"input_tokens": -1}, "input_tokens", "at least 1"),
        (without(STEADY, "output_tokens"), "output_tokens", "missing"),
        (STEADY | {"adapters": 0}, "adapters", "at least 1"),
        (STEADY | {"adapters": 2, "adapter_pattern": "random"}, "adapter_pattern", "round-robin"),
        (STEADY | {"adapters": 2, "adapter_exponent": 1}, "adapter_exponent", "not used"),
        (STEADY | {"adapter_pattern": "uniform"}, "adapter_pattern", "not used"),
        (FIG8A | {"lengths_filter": "vllm"}, "lengths_filter", "vllm-sharegpt"),
        (FIG8A | {"mean_input_tokens": 5000}, "mean_input_tokens", "out of reach"),
        (FIG8A | {"lengths_replacement": "yes"}, "lengths_replacement", "true or false"),
        (FIG8A | {"lengths": "trace"}, "lengths", "replay"),
        (FIG8A | {"lengths": "burstgpt"}, "lengths", "no lengths"),
        (without(REPLAY, "trace"), "trace", "missing"),
        (REPLAY | {"trace": "sharegpt_lengths"}, "trace", "no arrival times"),
        (REPLAY | {"requests": 20_000}, "requests", "ask for fewer"),
        (STEADY | {"arrivals": "piecewise", "rates_rps": 3, "interval_s": 1}, "rates_rps", "list"),
        (STEADY | {"arrivals": "piecewise", "rates_rps": [1, -1], "interval_s": 1}, "rates_rps", "above 0"),
    ],
)
def test_bad_declarations_name_the_file_and_the_key(declaration, key, hint):
    with pytest.raises(InputError) as caught:
        build(declaration, ABSENT, 0, where="figures/x.yaml")
    assert (caught.value.where, caught.value.key) == ("figures/x.yaml", key)
    assert hint in caught.value.mend
    assert "\n" not in str(caught.value)


def test_missing_file_of_a_dataset(tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        build(FIG8A, {"sharegpt_lengths": tmp_path / "gone.csv"}, 0)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted({k for e in EXAMPLES for k in e})),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-2, 50),
            st.floats(-1, 50),
            st.sampled_from(["poisson", "fixed", "trace", "azure_conv"]),
        ),
        max_size=8,
    )
)
def test_any_declaration_builds_or_is_refused_in_one_line(declaration):
    try:
        build({"arrivals": "poisson", "lengths": "fixed"} | declaration, ABSENT, 0)
    except InputError as error:
        assert "\n" not in str(error)


def test_many_requests_stay_columns():
    workload = build(without(FIG8A, "requests") | {"rate_rps": 500, "seconds": 200}, ABSENT, 0)
    assert len(workload) == pytest.approx(100_000, rel=0.02)
    assert "requests" not in vars(workload)  # no objects until somebody asks
    assert workload.requests[-1].arrival_s == workload.arrival_s[-1]


def test_the_examples_in_the_documentation_build(root):
    text = (root / "docs" / "workloads.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]
    assert len(blocks) >= 3
    for block in blocks:
        assert len(build(block, ABSENT, 0)) > 0
    for name in [*_ARRIVALS, *_LENGTHS]:
        assert f"`{name}`" in text
