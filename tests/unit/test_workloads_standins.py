"""Stand-ins: their statistics against the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from harness.datasets import load_registry
from systems.common.errors import InputError
from systems.common.workloads import lengths, standins
from systems.common.workloads.catalogue import catalogue
from systems.common.workloads.lengths import VLLM_SHAREGPT
from systems.common.workloads.readers import READERS
from systems.common.workloads.standins import generate, stand_in

WITH_STAND_IN = sorted(name for name, entry in load_registry().datasets.items() if entry.stand_in is not None)


def cv(times):
    gaps = np.diff(times)
    return gaps.std() / gaps.mean()


def test_the_papers_inputs_have_one():
    assert {"sharegpt_lengths", "azure_conv", "burstgpt", "alpaca"} <= set(WITH_STAND_IN)


@pytest.mark.parametrize("name", WITH_STAND_IN)
def test_is_valid_and_always_the_same(name):
    made = stand_in(name)
    again = generate(name, catalogue()[name].stand_in)
    for column, other in ((made.arrival_s, again.arrival_s), (made.input_tokens, again.input_tokens)):
        assert (column is None) == (other is None)
        assert column is None or (column == other).all()
    if made.arrival_s is not None:
        assert made.arrival_s[0] == 0 and (np.diff(made.arrival_s) >= 0).all()
    for column in (made.input_tokens, made.output_tokens):
        assert column is None or column.min() >= 1


def test_sharegpt_lengths():
    made = stand_in("sharegpt_lengths")
    assert len(made.input_tokens) == 30_731
    assert made.input_tokens.mean() == pytest.approx(2340, rel=0.01)  # LLMStation's sheet, section 8
    assert made.output_tokens.mean() == pytest.approx(439, rel=0.01)
    kept = lengths.keep(made.lengths("sharegpt_lengths"), VLLM_SHAREGPT)  # 11,035 rows, means 378 and 419
    assert len(kept) == pytest.approx(11_035, rel=0.03)
    assert kept.input_tokens.mean() == pytest.approx(378, rel=0.03)
    # ours is 438: in the file, prompts of 200 to 500 tokens have shorter answers, which independent columns don't know
    assert kept.output_tokens.mean() == pytest.approx(419, rel=0.05)


def test_azure_conversation():
    made = stand_in("azure_conv")
    assert len(made.arrival_s) == 19_366
    assert 1 / np.diff(made.arrival_s).mean() == pytest.approx(5.53, rel=0.005)
    assert cv(made.arrival_s) == pytest.approx(1.09, rel=0.04)
    assert made.input_tokens.mean() == pytest.approx(1155, rel=0.02)
    assert made.output_tokens.mean() == pytest.approx(211, rel=0.02)
    per_window, _ = np.histogram(made.arrival_s, np.arange(0, made.arrival_s[-1], 10.0))
    assert per_window.var() / per_window.mean() == pytest.approx(3.9, rel=0.35)  # Poisson would have 1


def test_burstgpt():
    made = stand_in("burstgpt")
    gaps = np.diff(made.arrival_s)
    assert 1 / gaps.mean() == pytest.approx(4.15, rel=0.01)
    assert 2 <= cv(made.arrival_s) <= 4
    assert (made.arrival_s == np.rint(made.arrival_s)).all() and (gaps == 0).mean() > 0.3  # whole seconds, so requests coincide


def test_alpaca():
    tokens = stand_in("alpaca").input_tokens
    assert len(tokens) == 1000
    assert tokens.mean() == pytest.approx(188, rel=0.01)
    for percent, published in ((50, 142), (90, 416), (99, 582)):
        assert np.percentile(tokens, percent) == pytest.approx(published, rel=0.02)


def test_stand_ins_follow_the_real_files(mirror):
    """Quantile by quantile, within what interpolating between 15 of them costs."""
    registry = load_registry()
    for name in ("sharegpt_lengths", "azure_conv"):
        entry = registry.entry(name)
        real, made = READERS[entry.reader](mirror / entry.path), stand_in(name)
        for column in ("input_tokens", "output_tokens"):
            ours, theirs = getattr(made, column), getattr(real, column)
            for percent in (25, 50, 75, 90, 99):
                assert np.percentile(ours, percent) == pytest.approx(np.percentile(theirs, percent), rel=0.1, abs=2)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"kind": "magic"}, "quantiles"),
        ({"kind": "quantiles", "rows": 5}, "input_tokens"),
        ({"kind": "quantiles", "rows": 5, "input_tokens": {0: 1, 100: 2}, "typo": 1}, "typo"),
    ],
)
def test_bad_statistics(statistics, message):
    with pytest.raises(InputError) as caught:
        generate("d", statistics)
    assert message in caught.value.mend


def test_dataset_without_stand_in():
    with pytest.raises(InputError, match="provide the file"):
        standins.stand_in("azure_code")
    with pytest.raises(InputError, match="azure_conv"):
        standins.stand_in("azure_comv")
