"""Co-run slowdowns: what must hold whatever the tenants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.hardware.interference import GREEN, MPS, STEADY, STREAMS, AnalyticInterference, Load, Tenant
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


WITH_WAY = "serving_phase,serving_size,tuning_phase,tuning_tokens,sm_limit,serving_slowdown,tuning_slowdown,way\n"
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
            ([*ROWS, "decode,8,forward,128,0,1.5,1.0\n"], HEADER, "line 14.*sm_limit"),
            (["decode,8,forward,128,1.0,1.5,1.0,rope\n"], WITH_WAY, "line 2.*way.*streams, steady, green, mps"),
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


WAYS = [
    *(f"decode,{size},forward,500,1.0,2.0,1.5,streams\n" for size in (1, 64)),
    "decode,1,forward,512,0.1,1.1,10.0,mps\n",
    "decode,1,forward,512,0.5,1.5,2.0,mps\n",
    "decode,1,forward,512,1.0,3.0,1.25,mps\n",
    "decode,1,forward,128,1.0,2.0,1.25,mps\n",
    "decode,1,forward,500,0.5,1.2,2.5,green\n",
    "idle,0,forward,500,0.5,1.0,2.0,green\n",
]


def limited(way, share, tokens=512, size=1):
    return Load("decode", size, Tenant(0.5, 0.5, 1e-4)), Load(
        "forward", tokens, Tenant(0.5, 0.5, 1e-4, sm_limit=share, way=way)
    )


class TestWays:
    @pytest.fixture
    def table(self, tmp_path):
        return read_interference(written(tmp_path, WAYS, WITH_WAY))

    def test_each_way_has_its_own_slowdowns(self, table):
        assert table.slowdowns(*limited(STREAMS, 1.0)).serving == 2.0
        assert table.slowdowns(*limited(MPS, 1.0)).serving == 3.0
        assert table.slowdowns(*limited(MPS, 1.0, tokens=128)).serving == 2.0
        assert table.slowdowns(*limited(GREEN, 0.5)).serving == pytest.approx(1.2)
        assert table.slowdowns(*limited(GREEN, 1.0)).serving == 2.0, "green contexts of all SMs are plain streams"
        assert table.slowdowns(*limited(STEADY, 1.0)) == table.slowdowns(*limited(STREAMS, 1.0)), "nothing nearer was measured"

    def test_between_limits_serving_slowdown_and_tuning_speed_are_linear(self, table):
        slow = table.slowdowns(*limited(MPS, 0.3))
        assert slow.serving == pytest.approx((1.1 + 1.5) / 2)
        assert 1 / slow.tuning == pytest.approx((1 / 10 + 1 / 2) / 2)
        assert table.slowdowns(*limited(MPS, 0.5)).tuning == pytest.approx(2.0), "measured points come back as measured"
        least = table.slowdowns(*limited(MPS, 0.05))
        assert least.serving == pytest.approx(1.05) and least.tuning == pytest.approx(20.0), "towards nothing at 0"

    @given(st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from([MPS, GREEN]))
    def test_more_sms_never_slow_tuning_nor_spare_serving(self, tmp_path_factory, a, b, way):
        table = read_interference(written(tmp_path_factory.mktemp("t"), WAYS, WITH_WAY))
        less, more = (table.slowdowns(*limited(way, share)) for share in sorted((a, b)))
        assert less.tuning >= more.tuning - 1e-9 and less.serving <= more.serving + 1e-9

    def test_it_says_what_it_covers(self, table):
        assert table.covers("decode", limited(MPS, 0.3)[1]) and table.covers("decode", limited(GREEN, 0.7)[1])
        assert table.covers("decode", limited(STREAMS, 0.95)[1]) and not table.covers("decode", limited(STREAMS, 0.5)[1])
        assert not table.covers("prefill", limited(MPS, 0.3)[1])
        assert table.alone(limited(GREEN, 0.5)[1]) == 2.0 and not table.covers("idle", limited(MPS, 0.5)[1])

    def test_a_file_without_ways_is_of_streams(self, tmp_path):
        table = read_interference(written(tmp_path, ROWS))
        assert table.limits("decode", "forward") == [1.0] == table.limits("decode", "forward", MPS)
        assert table.slowdowns(*limited(MPS, 1.0)) == table.slowdowns(*limited(STREAMS, 1.0))

    def test_tuning_that_never_pauses_stands_in_for_what_was_not_measured(self, tmp_path):
        steady = [f"decode,1,forward,500,1.0,{2.5},1.5,steady\n"]
        table = read_interference(written(tmp_path, [*WAYS[:2], *steady], WITH_WAY))
        assert table.slowdowns(*limited(STEADY, 1.0)).serving == 2.5 == table.slowdowns(*limited(MPS, 1.0)).serving
        assert table.slowdowns(*limited(GREEN, 1.0)).serving == 2.5
        assert table.slowdowns(*limited(STREAMS, 1.0)).serving == 2.0
        alone = read_interference(written(tmp_path, steady, WITH_WAY))
        assert alone.slowdowns(*limited(STREAMS, 1.0)).serving == 2.5

    def test_sizes_may_differ_from_one_length_to_another(self, tmp_path):
        rows = ["decode,1,forward,128,1.0,1.0,1.0\n", *(f"decode,{n},forward,512,1.0,{1 + n},1.0\n" for n in (1, 3))]
        table = read_interference(written(tmp_path, rows))
        assert table.slowdowns(load("decode", 3), load("forward", 512)).serving == pytest.approx(4.0)
        assert table.slowdowns(load("decode", 3), load("forward", 320)).serving == pytest.approx((1.0 + 4.0) / 2)
