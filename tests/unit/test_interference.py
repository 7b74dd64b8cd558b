"""Co-run slowdowns: what must hold whatever the tenants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.hardware.interference import AnalyticInterference, Load, Tenant
from systems.common.hardware.interference_table import read_interference

share = st.floats(0, 1)
limit = st.floats(0.01, 1)
kernel = st.floats(1e-6, 1e-2)
tenants = st.builds(Tenant, share, share, kernel, share, limit)
unlimited = st.builds(Tenant, share, share, kernel, share, st.just(1.0))


@given(unlimited, tenants)
def test_nobody_runs_faster_together(serving, tuning):
    slow = AnalyticInterference().of(serving, tuning)
    assert slow.serving >= 1 - 1e-9 and slow.tuning >= 1 - 1e-9


@given(unlimited, tenants)
def test_bandwidth_is_never_oversold(serving, tuning):
    slow = AnalyticInterference().of(serving, tuning)
    assert serving.bandwidth / slow.serving + tuning.bandwidth / slow.tuning <= 1 + 1e-6


@given(unlimited, tenants, st.floats(0.01, 1))
def test_a_tighter_limit_on_tuning_never_harms_serving_more_on_sms(serving, tuning, factor):
    bandless = Tenant(serving.compute, 0.0, serving.kernel_s, serving.occupancy)
    tighter = Tenant(tuning.compute, 0.0, tuning.kernel_s, tuning.occupancy, tuning.sm_limit * factor)
    looser = Tenant(tuning.compute, 0.0, tuning.kernel_s, tuning.occupancy, tuning.sm_limit)
    of = AnalyticInterference().of
    assert of(bandless, tighter).serving <= of(bandless, looser).serving + 1e-9


@given(unlimited, unlimited, st.floats(1, 100))
def test_longer_kernels_of_the_other_slow_serving_more(serving, tuning, times):
    longer = Tenant(tuning.compute, tuning.bandwidth, tuning.kernel_s * times, tuning.occupancy)
    of = AnalyticInterference().of
    # the SM share falls; bandwidth may only be freed by it
    a, b = of(Tenant(serving.compute, 0, serving.kernel_s), tuning), of(Tenant(serving.compute, 0, serving.kernel_s), longer)
    assert b.serving >= a.serving - 1e-9


def test_an_absent_neighbour_changes_nothing():
    slow = AnalyticInterference().of(Tenant(0.9, 0.3, 1e-4), Tenant(0.0, 0.0, 1e-9, 0.0))
    assert slow.serving == pytest.approx(1.0)


def test_a_limit_slows_only_what_needs_the_sms():
    assert Tenant(1.0, 0.1, 1e-4, sm_limit=0.5).limited_slowdown == pytest.approx(2.0)
    assert Tenant(0.1, 1.0, 1e-4, sm_limit=0.5).limited_slowdown == pytest.approx(1.0)


HEADER = "serving_phase,serving_size,tuning_phase,tuning_tokens,sm_limit,serving_slowdown,tuning_slowdown\n"
ROWS = [
    f"decode,{size},{phase},{tokens},1.0,{1 + size / 100 + tokens / 1000},{1.1 + tokens / 1000}\n"
    for size in (1, 8, 64)
    for tokens in (128, 512)
    for phase in ("forward", "backward")
]


def written(tmp_path, rows, header=HEADER):
    path = tmp_path / "corun.csv"
    path.write_text(header + "".join(rows))
    return path


def load(phase, size):
    return Load(phase, size, Tenant(0.5, 0.5, 1e-4))


class TestMeasured:
    @given(st.integers(1, 64), st.integers(128, 512))
    def test_a_plane_is_interpolated_exactly(self, tmp_path_factory, size, tokens):
        table = read_interference(written(tmp_path_factory.mktemp("t"), ROWS))
        slow = table.slowdowns(load("decode", size), load("forward", tokens))
        assert slow.serving == pytest.approx(1 + size / 100 + tokens / 1000)
        assert slow.tuning == pytest.approx(1.1 + tokens / 1000)

    def test_beyond_the_grid_it_stays_as_at_the_edge(self, tmp_path):
        table = read_interference(written(tmp_path, ROWS))
        inside = table.slowdowns(load("decode", 64), load("forward", 512))
        assert table.slowdowns(load("decode", 999), load("forward", 9999)) == inside

    @pytest.mark.parametrize(
        ("rows", "header", "says"),
        [
            ([], HEADER, "no rows"),
            (ROWS, HEADER.replace("sm_limit", "limit"), "sm_limit"),
            ([*ROWS, "decode,8,forward,128,1.0,0.5,1.0\n"], HEADER, "line 14.*serving_slowdown.*at least 1"),
            ([*ROWS, "decode,x,forward,128,1.0,1.5,1.0\n"], HEADER, "line 14.*serving_size"),
            (ROWS[:-1], HEADER, "point of the grid is missing"),
        ],
    )
    def test_bad_tables_are_refused(self, tmp_path, rows, header, says):
        with pytest.raises(InputError, match=says):
            read_interference(written(tmp_path, rows, header))

    def test_a_pair_that_was_never_measured(self, tmp_path):
        with pytest.raises(InputError, match="measure this pair"):
            read_interference(written(tmp_path, ROWS)).slowdowns(load("prefill", 8), load("forward", 128))

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(InputError, match="readable CSV"):
            read_interference(tmp_path / "none.csv")
