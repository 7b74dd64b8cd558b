"""MaverIQ's estimator away from the authors' files: laws, fingerprint files, both modes on synthetic machines, bad input."""

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.common.models import MODELS
from systems.maveriq import fit, hierarchy, terms
from systems.maveriq.configuration import Configuration, ModelFacts, Question, known_models
from systems.maveriq.dual import parameter, raised
from systems.maveriq.estimator import load_estimator, make_estimator
from systems.maveriq.estimator_paper import PaperEstimator
from systems.maveriq.experiments import EXPERIMENTS
from systems.maveriq.experiments_estimator import ESTIMATOR_EXPERIMENTS
from systems.maveriq.experiments_measured import MEASURED_EXPERIMENTS
from systems.maveriq.exponents import published_exponents
from systems.maveriq.fingerprint import (
    PAPER_GRID,
    Fingerprints,
    Point,
    Setting,
    cut,
    improved_points,
    points,
    read_fingerprints,
)
from systems.maveriq.improved import ImprovedEstimator
from systems.maveriq.law import Exponents, batched, full_depth, parallel_latency_s, parallel_memory_gib
from systems.maveriq.priors import read_priors

PRECISIONS = (("float16", False), ("int4", False))
FACTS = {"m": replace(known_models()["llama-2-7b"], name="m")}
HEADER = "Model,TP,PP,PP_Map,DTYPE,INT8_KV_Cache,Output_Lenght,Batch_Size,Latency,Memory-Pre-Run,Memory-After-Run,Time-Prof"
positive = st.floats(1e-4, 10, allow_nan=False)
layouts = st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 3), (4, 1), (2, 4), (8, 1), (1, 8)])


def linear(prefill=(0.01, 0.003), decode=(0.001, 0.0007), memory=(1.0, 0.4), models=("m",)) -> Fingerprints:
    """Fingerprints of a machine where everything is a straight line; a split halves it and adds a tenth."""
    found = {}
    for model in models:
        for s in points(PAPER_GRID, model, PRECISIONS):
            share = 1.0 if s.tp == 1 else 0.6
            seconds = prefill[0] + s.layers * prefill[1] + s.output_length * (decode[0] + s.layers * decode[1])
            gib = memory[0] * s.tp * s.pp + memory[1] * s.layers
            found[s] = Point(share * seconds * (1 + 0.1 * (s.batch - 1)), gib, gib * (1 + 0.2 * (s.batch - 1)), 8.0)
    return Fingerprints("synthetic", found)


def machine(constants, of, prompt=923.0, noise=0.0, seed=0, models=FACTS) -> dict[Setting, Point]:
    """What a machine with these constants of improved mode's terms measures."""
    found = terms.settings(of, models, prompt)
    once, token, squared = terms.latency_terms(found)
    length = found.length[:, None]
    seconds = (once + length * token + length**2 * squared) @ constants / 1e3
    seconds = seconds * np.exp(noise * np.random.default_rng(seed).standard_normal(len(of)))
    return {
        s: Point(float(x), 1.0, 1.0 + 0.4 * s.layers + 0.5 * (s.tp * s.pp - 1), 8.0) for s, x in zip(of, seconds, strict=True)
    }


def whole_settings(model="m", depth=32):
    return [
        Setting(model, tp, pp, *precision, depth, length, 1)
        for tp, pp in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (8, 1))
        for precision in PRECISIONS
        for length in (20, 100)
    ]


ALL_LAYOUTS = replace(PAPER_GRID, layouts=((1, 1), (1, 2), (2, 1), (4, 1), (8, 1)), batches=(1,))


# the laws


@given(positive, positive, positive, positive, st.integers(2, 100), st.integers(1, 50), st.integers(1, 500))
def test_full_depth_is_exact_where_everything_is_linear(start, per_layer, rest, decode, depth, shift, length):
    """Whatever the constants, depths and lengths: the extrapolation of a straight line is that line."""

    def latency(n, o):
        return start + n * per_layer + o * (rest + n * decode)

    n, o = (1, 1 + shift), (10, 10 + shift)
    line = full_depth(tuple(tuple(latency(a, b) for b in o) for a in n), n, o, depth)
    assert line.ttft_s + length * line.tpot_s == pytest.approx(latency(depth, length), rel=1e-4, abs=1e-4)


@given(positive, positive, positive, st.lists(st.floats(0, 2), min_size=4, max_size=4))
def test_the_law_gives_back_what_it_starts_from(single, split, staged, exponents):
    """At (1,1) it is R; at (2,1) and (1,2) it is what was measured, unless a split was faster than the law allows."""
    alpha, law = exponents[0], Exponents(*exponents)
    assert parallel_latency_s(single, split, staged, 1, 1, law) == pytest.approx(single)
    assert parallel_latency_s(single, split, staged, 2, 1, law) == pytest.approx(max(split, single / 2))
    assert parallel_latency_s(single, split, staged, 1, 2, law) == pytest.approx(max(staged, single / 2**alpha))


@given(positive, positive, positive, layouts)
def test_memory_law(single, staged, split, layout):
    tp, pp = layout
    total = parallel_memory_gib(single, staged, split, tp, pp)
    rank, stage = max(0, split - single), max(0, staged - single)
    assert total == pytest.approx(single + (tp - 1) * rank + tp * (pp - 1) * stage)
    assert total >= single * (1 - 1e-12)


@given(positive, positive, st.integers(1, 64))
def test_batches_never_make_it_cheaper(one, two, batch):
    assert batched(one, two, batch) >= one
    assert batched(one, two, 1) == one
    assert batched(one, two, 2) == pytest.approx(max(one, two))


@given(positive, st.floats(0.01, 3), st.floats(0.01, 3))
def test_derivatives(base, first, second):
    """Against a difference quotient."""
    step, at = 1e-6, np.array([first, second])

    def value(x):
        a, b = (parameter(x, place, 1) for place in (0, 1))
        return raised(np.array([base]), a) * b / (a + 1.0) - b

    found = value(at)
    for place in (0, 1):
        moved = at.copy()
        moved[place] += step
        expected = (value(moved).value - found.value) / step
        assert found.slope[place] == pytest.approx(expected, rel=1e-3, abs=1e-3)


# fingerprints


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_fingerprint_is_the_model_with_fewer_layers(name):
    shape = MODELS[name]
    small = cut(shape, 1)
    assert small.layers == 1 and small.name == f"{name}-1layer"
    assert shape.parameters - small.parameters == (shape.layers - 1) * shape.layer_parameters
    with pytest.raises(InputError, match="layers"):
        cut(shape, shape.layers + 1)


def test_the_papers_grid_has_the_papers_size():
    seven = [(d, kv) for d in ("float16", "int8", "int4") for kv in (False, True)] + [("int4_gptq", False)]
    three = [(d, False) for d in ("float16", "int8", "int4")]
    assert len(points(PAPER_GRID, "llama", seven)) == 168
    assert len(points(PAPER_GRID, "gptj", three)) == 72
    assert len(points(PAPER_GRID, "falcon-7b", three, tensor_parallel=False)) == 48
    assert (PAPER_GRID.warmups, PAPER_GRID.repeats) == (2, 3)


def row(**cells) -> dict[str, object]:
    plain = dict(zip(HEADER.split(","), ["m", 1, 1, "1", "float16", False, 10, 1, 0.02, 1.5, 1.6, 8.0], strict=True))
    return {**plain, **{key.replace("__", "-"): value for key, value in cells.items()}}


def write_csv(path, rows, header=HEADER):
    text = io.StringIO()
    writer = csv.DictWriter(text, header.split(","), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())
    return path


def to_rows(found: Fingerprints):
    for s, p in found.points.items():
        even = [s.layers // s.pp + (place < s.layers % s.pp) for place in range(s.pp)]
        yield row(
            Model=s.model, TP=s.tp, PP=s.pp, PP_Map=" ".join(map(str, even)), DTYPE=s.dtype, INT8_KV_Cache=s.int8_kv,
            Output_Lenght=s.output_length, Batch_Size=s.batch, Latency=p.latency_s, Memory__Pre__Run=p.loaded_gib,
            Memory__After__Run=p.memory_gib, Time__Prof=p.profiling_s,
        )  # fmt: skip


def test_a_file_reads_back(tmp_path):
    found = linear()
    read = read_fingerprints(write_csv(tmp_path / "f.csv", to_rows(found)))
    assert read.points == found.points
    assert read.models == ("m",) and read.precisions("m") == PRECISIONS
    assert read.gpu_seconds() == pytest.approx(8.0 * (16 + 2 * 32))


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"Latency": "nan"}, "line 3: Latency: 'nan': needs a finite number"),
        ({"Latency": "inf"}, "Latency"),
        ({"Latency": -1}, "Latency"),
        ({"Latency": ""}, "Latency: '': the cell is empty"),
        ({"TP": 1.5}, "TP: '1.5': needs a whole number"),
        ({"TP": 0}, "TP"),
        ({"PP_Map": "x"}, "PP_Map"),
        ({"PP": 2}, "PP_Map: '1': has fewer layers than stages"),
        ({"INT8_KV_Cache": "maybe"}, "INT8_KV_Cache: 'maybe': write True or False"),
        ({"Memory__After__Run": "x"}, "Memory-After-Run"),
        ({"Model": ""}, "Model"),
        ({"Latency": 0.03, "Output_Lenght": 20}, "never join files of long and short prompts"),
    ],
)
def test_an_unusable_cell_is_named(tmp_path, cells, says):
    file = write_csv(tmp_path / "f.csv", [row(Output_Lenght=20), row(**cells)])
    with pytest.raises(InputError) as error:
        read_fingerprints(file)
    assert says in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_columns_files_and_rows_are_named(tmp_path):
    with pytest.raises(InputError, match="columns: 'Latency': this column is missing"):
        read_fingerprints(
            write_csv(tmp_path / "a.csv", [row()], header="Model,TP,PP,PP_Map,DTYPE,INT8_KV_Cache,Output_Lenght,Batch_Size")
        )
    with pytest.raises(InputError, match="no measurement"):
        read_fingerprints(write_csv(tmp_path / "b.csv", []))
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputError, match="give a CSV file"):
            read_fingerprints(path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError):
        read_fingerprints(tmp_path / "binary.csv")


def test_uneven_stages_can_be_passed_over(tmp_path):
    file = write_csv(tmp_path / "f.csv", [row(PP=2, PP_Map="4 4"), row(PP=2, PP_Map="2 6", Latency=0.03)])
    with pytest.raises(InputError):
        read_fingerprints(file)
    assert len(read_fingerprints(file, even_only=True).points) == 1


def test_our_grid_is_a_part_of_the_file():
    found = Fingerprints("x", machine(read_priors().everyone[0].scale, points(ALL_LAYOUTS, "m", PRECISIONS)))
    chosen = improved_points(found, "m")
    assert set(chosen) < set(found.points)
    assert {s.layout for s in chosen} == set(ALL_LAYOUTS.layouts)
    assert sum(s.layout == (8, 1) for s in chosen) == sum(s.layout == (4, 1) for s in chosen) == 1


# paper mode


@given(positive, positive, positive, positive, st.integers(1, 300))
@settings(max_examples=30)
def test_paper_mode_is_exact_on_one_gpu_of_a_linear_machine(a, b, c, d, length):
    estimator = PaperEstimator(linear((a, b), (c, d)), FACTS)
    expected = a + 32 * b + length * (c + 32 * d)
    found = estimator.estimate("m", Configuration(1, 1), output_length=length)
    assert found.latency_s == pytest.approx(expected, rel=1e-5)
    assert estimator.estimate("m", Configuration(2, 1), output_length=length).latency_s == pytest.approx(
        0.6 * expected, rel=1e-5
    )
    assert estimator.estimate("m", Configuration(1, 1), batch=5, output_length=length).latency_s == pytest.approx(
        1.4 * expected, rel=1e-4
    )
    assert math.isnan(found.latency_low_s) and math.isnan(found.memory_high_gib)


def test_paper_mode_memory_on_a_linear_machine():
    estimator = PaperEstimator(linear(memory=(1.0, 0.4)), FACTS)
    for tp, pp in ((1, 1), (2, 1), (1, 4), (2, 2)):
        assert estimator.estimate("m", Configuration(tp, pp)).memory_gib == pytest.approx(32 * 0.4 + tp * pp)


def test_paper_mode_takes_a_model_that_cannot_be_split():
    facts = {"m": replace(FACTS["m"], tensor_parallel=False)}
    found = linear()
    found = found.select(s for s in found.points if s.tp == 1)
    estimator = PaperEstimator(found, facts)
    assert estimator.estimate("m", Configuration(1, 4)).latency_s > 0
    with pytest.raises(InputError, match="can't be split"):
        estimator.estimate("m", Configuration(2, 1))


@pytest.mark.parametrize(
    ("keep", "ask", "says"),
    [
        (lambda s: s.layout != (2, 1), {}, r"layout: \(2, 1\): paper mode needs"),
        (lambda s: s.layout != (1, 2), {}, r"layout: \(1, 2\): paper mode needs"),
        (lambda s: s.batch == 1, {"batch": 2}, "Batch_Size: 2: paper mode needs"),
        (lambda s: s.dtype == "float16", {"dtype": "int4"}, "dtype, int8_kv"),
        (lambda s: s.output_length == 10, {}, "Output_Lenght: 10: two output lengths are needed"),
        (lambda s: s.layers == s.pp, {}, "PP_Map: 1: two depths are needed"),
        (lambda s: (s.layers, s.output_length) != (2, 20) or s.pp == 2, {}, "is missing"),
        (lambda s: True, {"model": "n"}, "Model|model"),
        (lambda s: True, {"dtype": "fp5"}, "dtype"),
    ],
)
def test_paper_mode_says_what_is_missing(keep, ask, says):
    found = linear()
    estimator = make_estimator(found.select(s for s in found.points if keep(s)), "paper", FACTS)
    with pytest.raises(InputError, match=says):
        estimator.estimate(ask.get("model", "m"), Configuration(2, 2, ask.get("dtype", "float16")), batch=ask.get("batch", 1))


def test_an_unknown_mode_and_an_unknown_depth():
    with pytest.raises(InputError, match="mode"):
        make_estimator(linear(), "fast", FACTS)
    for mode in ("paper", "improved"):
        with pytest.raises(InputError, match="--layers"):
            make_estimator(linear(), mode, {}).estimate("m", Configuration(1, 1))


def test_the_exponents_are_those_of_the_sheet():
    assert len(published_exponents()) == len(published_exponents("full_model")) == 7
    assert published_exponents()["int4", False] == pytest.approx((0.15546, 0.81398, 0.50622, 0.32195), abs=5e-6)
    assert published_exponents("full_model")["int8", True] == pytest.approx((0.8622, 0.5783, 1.0258, 0.2483), abs=5e-5)


# the fit


def law_points(exponents, method="fingerprint", seed=0):
    """Whole-model latencies that follow the law exactly."""
    random = np.random.default_rng(seed)
    layout = [(1, p) for p in range(1, 9)] + [(2, p) for p in range(1, 5)] + [(4, 1), (4, 2), (8, 1)]
    tp, pp = np.array(layout * 4, dtype=float).T
    single, split = (np.repeat(random.uniform(*span, 4), len(layout)) for span in ((1, 5), (0.6, 0.9)))
    split = single * split
    staged = single if method == "fingerprint" else single * 0.98

    def at(t, p):
        return parallel_latency_s(single, split, staged, np.full_like(tp, t), np.full_like(pp, p), exponents)

    truth = parallel_latency_s(single, split, staged, tp, pp, exponents)
    known = np.stack([single, split, at(1, 2), at(1, 3), at(2, 2)], axis=1)
    names = np.repeat([f"m{i}" for i in range(4)], len(layout))
    return fit.Points(names, tp, pp, np.full_like(tp, 100.0), truth, known, np.full_like(tp, 2.0))


@pytest.mark.parametrize("method", fit.METHODS)
def test_gradients_of_the_fit(method):
    data = law_points(Exponents(0.1, 0.7, 0.4, 0.5), "full_model")
    at = np.array([0.2, 0.6, 0.3, 0.9])
    found = fit.estimated(data, at, method)
    for place in range(4):
        moved = at.copy()
        moved[place] += 1e-6
        expected = (fit.estimated(data, moved, method).value - found.value) / 1e-6
        assert found.slope[place] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("law", [Exponents(0.05, 0.7, 0.3, 0.5), Exponents(0.3, 0.9, 0.8, 0.2)])
def test_the_fit_finds_the_law_that_made_the_data(law):
    data = law_points(law)
    found = fit.fit_exponents(data)
    assert np.abs(fit.errors(data, found)).max() < 0.02
    assert fit.fit_exponents(data) == found


def test_the_right_algebra_finds_r_without_the_single_gpu():
    """R from (1,2) and (1,3) alone is R; the shipped formula is not."""
    law = Exponents(0.4, 0.7, 0.4, 0.5)
    data = law_points(law, "full_model")
    hidden = data._replace(known=np.column_stack([np.full(len(data.tp), np.nan), data.known[:, 1:]]))
    right = fit.estimated(hidden, np.array(law), "full_model").value
    assert right == pytest.approx(fit.estimated(data, np.array(law), "full_model").value, rel=1e-6)
    shipped = fit.estimated(hidden, np.array(law), "full_model_shipped").value
    assert np.abs(shipped / right - 1).max() > 0.05
    no_split = hidden._replace(known=np.column_stack([hidden.known[:, :1], np.full(len(data.tp), np.nan), hidden.known[:, 2:]]))
    assert fit.estimated(no_split, np.array(law), "full_model").value == pytest.approx(right, rel=1e-6)


def test_five_points_per_model_by_seed():
    data = law_points(Exponents(0.1, 0.7, 0.4, 0.5))
    chosen = fit.few(data, 3)
    assert {name: int((chosen.model == name).sum()) for name in set(chosen.model)} == {f"m{i}": 5 for i in range(4)}
    assert (fit.few(data, 3).truth_s == chosen.truth_s).all() and (fit.few(data, 4).truth_s != chosen.truth_s).any()


# improved mode


def elsewhere(seed) -> np.ndarray:
    """Constants of a machine unlike the one that the priors are of: a faster memory, much faster links."""
    pace = {"host": 0.3, "bandwidth": 0.16, "ranks": 0.1, "flops": 0.15, "links": 0.05, "slow_links": 0.05, "rank_start": 0.1}
    share = np.array([pace.get(group, 0.3) for group, names in terms.LATENCY_GROUPS.items() for _ in names])
    return share * read_priors().everyone[0].scale * np.random.default_rng(seed).lognormal(0, 0.15, len(share))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_improved_mode_learns_another_machine(seed, noise):
    """From fingerprints alone, although its priors are wrong; its intervals hold what they promise."""
    constants = elsewhere(seed)
    found = Fingerprints("x", machine(constants, points(ALL_LAYOUTS, "m", PRECISIONS), noise=noise, seed=seed))
    truth = machine(constants, whole_settings())
    estimator = ImprovedEstimator(found, FACTS, use_all=True)
    asked = [Question("m", Configuration(s.tp, s.pp, s.dtype, s.int8_kv), 1, s.output_length) for s in truth]
    answers = estimator.estimate_many(asked)
    true_s = np.array([point.latency_s for point in truth.values()])
    off = np.abs(answers.latency_s / true_s - 1)
    assert np.median(off) < (0.05 if noise == 0 else 0.10)
    held = (answers.latency_low_s <= true_s) & (true_s <= answers.latency_high_s)
    assert held.mean() >= 0.75
    assert any("another machine" in note for note in answers.notes[0])


@given(st.floats(0.003, 0.03), st.floats(0.001, 0.01), st.floats(0.0003, 0.001), st.floats(0.0003, 0.002))
@settings(max_examples=15, deadline=None)
def test_improved_mode_extends_straight_lines_that_no_term_explains(a, b, c, d):
    """A machine where int4 is as fast as fp16 and everything is linear: nothing that the priors expect, and yet exact.

    Not where a layer takes a small part of a fingerprint's token: then fingerprints fit the terms within their noise.
    """
    estimator = ImprovedEstimator(linear((a, b), (c, d)), FACTS)
    for configuration, share in ((Configuration(1, 1), 1.0), (Configuration(1, 1, "int4"), 1.0), (Configuration(2, 1), 0.6)):
        truth = share * (a + 32 * b + 100 * (c + 32 * d))
        found = estimator.estimate("m", configuration)
        assert found.latency_s == pytest.approx(truth, rel=0.06)
        assert found.latency_low_s <= truth <= found.latency_high_s
        assert found.memory_gib == pytest.approx(32 * 0.4 + configuration.gpus, rel=0.1)


@given(st.floats(0.05, 20))
@settings(max_examples=10, deadline=None)
def test_a_machine_that_is_slower_altogether_gives_slower_estimates(pace):
    constants = read_priors().everyone[0].scale
    settings_ = points(replace(PAPER_GRID, batches=(1,)), "m", PRECISIONS)
    base = machine(constants, settings_)
    slower = {s: replace(p, latency_s=p.latency_s * pace) for s, p in base.items()}
    for configuration in (Configuration(1, 1), Configuration(4, 1, "int4")):
        one, other = (
            ImprovedEstimator(Fingerprints("x", f), FACTS, prompt_tokens=923).estimate("m", configuration)
            for f in (base, slower)
        )
        assert other.latency_s == pytest.approx(pace * one.latency_s, rel=0.08)


@pytest.fixture(scope="module")
def lent():
    """An estimator over fingerprints of the priors' own machine, all layouts."""
    constants = read_priors().everyone[0].scale
    found = Fingerprints("x", machine(constants, points(ALL_LAYOUTS, "m", PRECISIONS), noise=0.01))
    return ImprovedEstimator(found, FACTS)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 64), layouts, st.sampled_from(["float16", "int4"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_estimates_grow_with_length_and_lie_in_their_intervals(lent, first, more, batch, layout, dtype):
    configuration = Configuration(*layout, dtype)
    short, long = (lent.estimate("m", configuration, batch=batch, output_length=o) for o in (first, first + more))
    assert 0 < short.latency_s < long.latency_s
    for answer in (short, long):
        assert 0 < answer.latency_low_s <= answer.latency_s <= answer.latency_high_s < math.inf
        assert 0 < answer.memory_low_gib <= answer.memory_gib <= answer.memory_high_gib < math.inf
    bigger = lent.estimate("m", configuration, batch=batch + 1, output_length=first)
    assert bigger.memory_gib >= short.memory_gib


def test_one_by_one_and_many_at_once_are_the_same(lent):
    asked = [
        Question("m", Configuration(tp, pp, dtype), b, 50)
        for tp, pp in ((1, 1), (4, 2))
        for dtype in ("int4", "float16")
        for b in (1, 8)
    ]
    many = lent.estimate_many(asked)
    for place, q in enumerate(asked):
        one = lent.estimate("m", q.configuration, batch=q.batch, output_length=50)
        assert one.notes == many[place].notes
        for name in ("latency_s", "latency_low_s", "latency_high_s", "memory_gib", "memory_low_gib", "memory_high_gib"):
            assert getattr(one, name) == pytest.approx(getattr(many[place], name), rel=1e-9)
    assert len(lent.estimate_many([])) == 0


def test_a_wider_level_is_a_wider_interval(lent):
    found = Fingerprints("x", machine(read_priors().everyone[0].scale, points(ALL_LAYOUTS, "m", PRECISIONS)))
    widths = [
        ImprovedEstimator(found, FACTS, level=level).estimate("m", Configuration(4, 1)).latency_high_s
        for level in (0.5, 0.8, 0.9, 0.99)
    ]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    with pytest.raises(InputError, match="level"):
        ImprovedEstimator(found, FACTS, level=1.0)


def test_a_missing_layout_falls_back_and_widens():
    everything = machine(read_priors().everyone[0].scale, points(ALL_LAYOUTS, "m", PRECISIONS), noise=0.02)
    spans = []
    for layouts_ in (((1, 1), (1, 2), (2, 1), (4, 1), (8, 1)), ((1, 1), (1, 2), (2, 1)), ((1, 1),)):
        found = Fingerprints("x", {s: p for s, p in everything.items() if s.layout in layouts_})
        answer = ImprovedEstimator(found, FACTS, use_all=True).estimate("m", Configuration(8, 1))
        spans.append(answer.latency_high_s / answer.latency_low_s)
        assert any("no fingerprint of 8 ranks" in note for note in answer.notes) == ((8, 1) not in layouts_)
    assert spans[0] < spans[1] < spans[2]


def test_a_precision_that_was_not_measured_is_said():
    found = linear()
    estimator = ImprovedEstimator(found.select(s for s in found.points if s.dtype == "float16"), FACTS)
    answer = estimator.estimate("m", Configuration(1, 1, "int8", True))
    assert "no fingerprint of int8 + int8 KV" in answer.notes and answer.latency_s > 0


def test_a_model_of_which_only_the_depth_is_known():
    estimator = make_estimator(linear(models=("new",)), "improved", {"new": ModelFacts("new", 48)})
    answer = estimator.estimate("new", Configuration(1, 1))
    assert any("nominal" in note for note in answer.notes)
    assert answer.latency_s == pytest.approx(0.01 + 48 * 0.003 + 100 * (0.001 + 48 * 0.0007), rel=0.25)


@pytest.mark.parametrize(
    ("model", "configuration", "says"),
    [
        ("n", Configuration(1, 1), "fingerprinted are m"),
        ("m", Configuration(1, 33), "every stage needs one"),
        ("m", Configuration(1, 1, "int3"), "int3"),
    ],
)
def test_improved_mode_refuses(model, configuration, says):
    with pytest.raises(InputError, match=says):
        ImprovedEstimator(linear(), FACTS).estimate(model, configuration)


def test_priors_never_know_the_model_itself():
    priors = read_priors()
    assert len(priors.without) == 6
    for name, (latency, _memory) in priors.without.items():
        assert priors.of(name)[0] is latency
        assert not np.array_equal(latency.mean, priors.everyone[0].mean)
    assert priors.of("some other model") is priors.everyone


def test_the_hierarchy_finds_a_machine_and_its_noise():
    """Models drawn from a machine: the mean is near, and a new model's constants are closer to the truth than the mean."""
    random = np.random.default_rng(0)
    mean = np.array([1.0, 2.0, 0.5])

    def model(rows):
        own = mean * (1 + 0.2 * random.standard_normal(3))
        table = random.uniform(0.1, 1, (rows, 3))
        seen = (table @ own) * (1 + 0.01 * random.standard_normal(rows))
        return own, hierarchy.Rows(table / seen[:, None], np.zeros(rows, dtype=np.int64))

    known = [hierarchy.Known(model(60)[1], model(20)[1]) for _ in range(8)]
    known = [hierarchy.Known(whole, whole) for whole, _ in known]
    prior = hierarchy.fit(known, ("a", "b", "c"))
    assert prior.mean == pytest.approx(mean, rel=0.3)
    own, rows = model(40)
    posterior = hierarchy.update(prior, rows, hierarchy.widths(prior, {"all": ("a", "b", "c")}))
    assert np.abs(posterior.mean - own).sum() < np.abs(prior.mean - own).sum()
    assert np.linalg.eigvalsh(posterior.covariance).min() > -1e-9


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_evidence_with_lines_is_that_of_the_whole_decomposition(seed):
    """What is computed in the terms' size equals the singular values of terms and lines together, and so does the choice."""
    random = np.random.default_rng(seed)
    terms, lines = random.integers(1, 5), random.integers(1, 9)
    count = int(random.integers(1, 14))
    scale = 10 ** random.uniform(-2, 1, terms)
    prior = hierarchy.Prior(
        tuple("abcdef"[:terms]), scale, np.diag((0.1 * scale) ** 2), 0.2 * scale, 0.01 * scale, np.full(8, 0.02),
        np.full(8, 10 ** random.uniform(-2.5, -1)), {},
    )  # fmt: skip
    blocks = np.eye(int(lines))[random.integers(0, lines, count)] * random.uniform(0, 1, (count, 1))
    rows = hierarchy.Rows(random.uniform(0, 0.5, (count, terms)) / scale, np.zeros(count, dtype=np.int64), blocks)
    tried = [width for width in hierarchy.widths(prior, {"all": prior.terms}) if width.strangeness >= hierarchy.STRANGE]
    factors = hierarchy.NOISE_FACTOR, hierarchy.NOISE_FACTOR_ELSEWHERE
    found = hierarchy._evidence_with_lines(prior, rows, tried, factors)
    whole = [hierarchy._directions(prior, rows, width).evidence(factors)[0] for width in tried]
    assert found == pytest.approx(np.array(whole), rel=1e-6, abs=1e-4)
    assert hierarchy.update(prior, rows, tried, factors).evidence == pytest.approx(max(whole), rel=1e-6, abs=1e-4)


def test_the_engines_shapes_are_known_models():
    facts = known_models()["llama-3.1-8b"]
    assert (facts.layers, facts.hidden, facts.kv_heads, facts.is_whole) == (32, 4096, 8, True)


def test_models_are_added_by_configuration(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text("models:\n  opt-30b: {layers: 48, hidden: 7168}\n")
    assert known_models(file)["opt-30b"].filled.heads == 56
    for text in (
        "models: 3",
        "models: {a: {layers: x}}",
        "models: {a: {depth: 3}}",
        "models: {a: {hidden: 3}}",
        "models: {a: {layers: 0}}",
        ":",
    ):
        bad = tmp_path / f"{abs(hash(text))}.yaml"
        bad.write_text(text)
        with pytest.raises(InputError):
            known_models(bad)


def test_a_file_gives_an_estimator(tmp_path):
    file = write_csv(tmp_path / "f.csv", to_rows(linear()))
    for mode in ("paper", "improved"):
        estimator = load_estimator(file, mode, FACTS)
        assert estimator.models == ("m",) and estimator.precisions("m") == PRECISIONS
        assert estimator.estimate("m", Configuration(1, 1)).latency_s > 0


@pytest.mark.parametrize("name", sorted({**ESTIMATOR_EXPERIMENTS, **MEASURED_EXPERIMENTS}))
def test_an_experiment_without_its_data_says_so(name):
    """Nothing can stand in for measurements; a wrong parameter is named before that or instead."""
    parameters = {
        "model": "m",
        "metric": "latency",
        "dtype": "int4",
        "mode": "paper",
        "batch": 1,
        "level_percent": 90,
        "what": "latency",
    }
    parameters |= {
        "method": "fingerprint",
        "fitted_on": "all points",
        "intent": "min_lat",
        "layers": 1,
        "tp": 1,
        "pp": 1,
        "map": 0,
    }
    with pytest.raises(InputError, match="dataset_mirror"):
        EXPERIMENTS[name](Trial("maveriq", name, parameters, "a6000x8", datasets={"maveriq_a6000": None}))
