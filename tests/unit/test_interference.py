"""Co-run slowdowns: what must hold whatever the tenants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.hardware.interference import AnalyticInterference, Tenant

share = st.floats(0, 1)
limit = st.floats(0.01, 1)
kernel = st.floats(1e-6, 1e-2)
tenants = st.builds(Tenant, share, share, kernel, share, limit)
unlimited = st.builds(Tenant, share, share, kernel, share, st.just(1.0))


@given(unlimited, tenants)
def test_nobody_runs_faster_together(serving, tuning):
    slow = AnalyticInterference().slowdowns(serving, tuning)
    assert slow.serving >= 1 - 1e-9 and slow.tuning >= 1 - 1e-9


@given(unlimited, tenants)
def test_bandwidth_is_never_oversold(serving, tuning):
    slow = AnalyticInterference().slowdowns(serving, tuning)
    assert serving.bandwidth / slow.serving + tuning.bandwidth / slow.tuning <= 1 + 1e-6


@given(unlimited, tenants, st.floats(0.01, 1))
def test_a_tighter_limit_on_tuning_never_harms_serving_more_on_sms(serving, tuning, factor):
    bandless = Tenant(serving.compute, 0.0, serving.kernel_s, serving.occupancy)
    tighter = Tenant(tuning.compute, 0.0, tuning.kernel_s, tuning.occupancy, tuning.sm_limit * factor)
    looser = Tenant(tuning.compute, 0.0, tuning.kernel_s, tuning.occupancy, tuning.sm_limit)
    of = AnalyticInterference().slowdowns
    assert of(bandless, tighter).serving <= of(bandless, looser).serving + 1e-9


@given(unlimited, unlimited, st.floats(1, 100))
def test_longer_kernels_of_the_other_slow_serving_more(serving, tuning, times):
    longer = Tenant(tuning.compute, tuning.bandwidth, tuning.kernel_s * times, tuning.occupancy)
    of = AnalyticInterference().slowdowns
    # the SM share falls; bandwidth may only be freed by it
    a, b = of(Tenant(serving.compute, 0, serving.kernel_s), tuning), of(Tenant(serving.compute, 0, serving.kernel_s), longer)
    assert b.serving >= a.serving - 1e-9


def test_an_absent_neighbour_changes_nothing():
    slow = AnalyticInterference().slowdowns(Tenant(0.9, 0.3, 1e-4), Tenant(0.0, 0.0, 1e-9, 0.0))
    assert slow.serving == pytest.approx(1.0)


def test_a_limit_slows_only_what_needs_the_sms():
    assert Tenant(1.0, 0.1, 1e-4, sm_limit=0.5).limited_slowdown == pytest.approx(2.0)
    assert Tenant(0.1, 1.0, 1e-4, sm_limit=0.5).limited_slowdown == pytest.approx(1.0)
