"""The fit finds what made the data, and what it predicts is what the roofline says."""

from __future__ import annotations

import math
import random
from dataclasses import fields

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from systems.common.hardware import Chunk, Efficiencies, RooflineCosts, gpu
from systems.common.hardware.curve import Curve
from systems.common.hardware.efficiencies import FILE
from systems.common.hardware.fit import KNEE, fit, held_out_errors, main, relative_errors, start_of, summary, weighted_quantile
from systems.common.hardware.measured_sets import BORROWED, MeasuredSet
from systems.common.hardware.observations import (
    FIXED,
    SHARES,
    Bench,
    Observation,
    all_reduce_observations,
    kernel_observations,
    unknowns_of,
)
from systems.common.hardware.table_meta import TableMeta
from systems.common.hardware.tables import KernelTables
from systems.common.models import model

TRUTH = Efficiencies(0.8, 0.7, 0.6, 0.9, 1.5, 0.4, KNEE, 2e-6, 5e-6, 9e-6, 3e-6, 2e-5)
TOKENS = (1, 2, 8, 32, 64, 128, 200, 512, 2048, 8192)
SHARE = st.floats(0.2, 1.5)
EFFICIENCIES = st.builds(Efficiencies, SHARE, SHARE, SHARE, SHARE, SHARE, SHARE, st.floats(1.5, 6) | st.just(math.inf))


def tables_of(costs: RooflineCosts, tmp_path) -> KernelTables:
    """What a profiler would write down if `costs` were the truth."""
    by_tokens = {n: costs.operators_s(n) for n in TOKENS}
    dense = {name: Curve.of((n, times[name]) for n, times in by_tokens.items()) for name in by_tokens[1]}
    attention = {(n, past, 0, 0): costs.attention_s([Chunk(n, past)], 0, 0) for n in TOKENS for past in (0, 64, 4096)}
    attention |= {(0, 0, n, c): costs.attention_s((), n, n * c) for n in (1, 8, 128) for c in (16, 512, 9000)}
    head = {"lm_head": Curve.of((n, costs.lm_head_s(n)) for n in (1, 8, 128))}
    return KernelTables(tmp_path, dense, head, attention, TableMeta(tmp_path))


def truth(tmp_path, efficiencies=TRUTH, name="llama-3.1-8b", card="a100", tp=1) -> list[Observation]:
    costs = RooflineCosts(model(name), gpu(card), tp, efficiencies)
    bench = Bench(costs.model, costs.gpu, tp)
    ring = [] if tp == 1 else all_reduce_observations(Curve.of((2**i, costs.all_reduce_s(2**i)) for i in range(10, 28)), bench)
    return kernel_observations(tables_of(costs, tmp_path), bench) + ring


@given(efficiencies=EFFICIENCIES, tp=st.sampled_from([1, 2, 8]), card=st.sampled_from(["t4", "rtx3090", "h100"]))
def test_observations_mean_what_the_roofline_means(efficiencies, tp, card, tmp_path_factory):
    found = truth(tmp_path_factory.getbasetemp(), efficiencies, card=card, tp=tp)
    assert max(map(abs, relative_errors(found, unknowns_of(efficiencies), efficiencies.knee))) < 1e-9


def test_the_fit_finds_the_truth(tmp_path):
    found = truth(tmp_path, tp=4)
    fitted = fit(found, (*SHARES, *FIXED), start_of("a100"))
    assert fitted == pytest.approx(unknowns_of(TRUTH), rel=1e-4)


def test_the_fit_stands_noise(tmp_path):
    noise = random.Random(1)
    found = [
        Observation(o.operator, o.x, o.seconds * noise.uniform(0.95, 1.05), o.bounds, o.fixed, o.weight)
        for o in truth(tmp_path)
    ]
    fitted = fit(found, ("gemm_compute", "gemm_memory"), unknowns_of(TRUTH))
    assert fitted["gemm_compute"] == pytest.approx(1 / 0.8, rel=0.03)
    assert fitted["gemm_memory"] == pytest.approx(1 / 0.7, rel=0.03)


def test_the_fit_is_deterministic_and_leaves_the_rest_alone(tmp_path):
    found = truth(tmp_path)
    once, again = (fit(found, ("gemm_memory",), start_of("a100")) for _ in range(2))
    assert once == again
    assert {k: v for k, v in once.items() if k != "gemm_memory"} == {
        k: v for k, v in start_of("a100").items() if k != "gemm_memory"
    }


def test_unknowns_stay_possible():
    falling = [Observation("x", n, 1 / n, ({"elementwise": float(n)},), {"launch_s": 1.0}) for n in (1, 2, 4)]
    fitted = fit(falling, ("elementwise", "launch_s"), start_of("a100"))
    assert fitted["elementwise"] >= 0.1 and fitted["launch_s"] >= 0


def test_held_out_errors_are_of_points_not_seen():
    odd = [Observation("x", n, 1.0, ({"elementwise": 1.0},), {}) for n in range(9)]
    odd.append(Observation("x", 9, 2.0, ({"elementwise": 1.0},), {}))
    errors = held_out_errors(MeasuredSet("a100-80", (), tuple(odd), ("elementwise",)), start_of("a100"))
    assert errors[9] == pytest.approx(-0.5, abs=0.01), "the odd one out is predicted from the others"


def test_percentiles_by_weight():
    assert weighted_quantile([1, 2, 3], [1, 1, 1], 0.5) == 2
    assert weighted_quantile([3, 1, 2, 4], [1, 1, 1, 1], 0.5) == 2.5
    assert weighted_quantile([1, 2, 3], [10, 1, 1], 0.5) == 1
    short = summary([Observation("", 1, 1, (), {})] * 3, [-0.5, 0.1, 0.2])
    assert (short.median, short.signed, short.points) == (0.2, 0.1, 3)


def test_every_gpu_knows_all_its_values():
    content = yaml.safe_load(FILE.read_text())
    names = {f.name for f in fields(Efficiencies)} - {"source"}
    for name, row in content["gpus"].items():
        assert row["values"].keys() == names
        for unknown, origin in row["from"].items():
            assert origin == name or BORROWED[name][unknown] == origin
            assert origin in content["tables"], "borrowed from a GPU that was measured"
            assert row["values"][unknown] == content["gpus"][origin]["values"][unknown]


def test_a_missing_mirror_is_one_line_and_leaves_the_file_alone(tmp_path, capsys):
    out = tmp_path / "out.yaml"
    out.write_text("old")
    assert main(["--mirror", str(tmp_path / "none"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none" in error
    assert out.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.yaml"]


def test_a_folder_that_is_not_there_is_one_line(mirror, tmp_path, capsys):
    assert main(["--mirror", str(mirror), "--out", str(tmp_path / "no" / "out.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
