"""Anybody's folder of operator tables: interpolation, extrapolation, mixed batches, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.hardware import Chunk, costs
from systems.common.hardware.curve import Curve, mix, neighbours
from systems.common.hardware.layer_profile import read_layer_profile
from systems.common.hardware.tables import (
    PER_ITERATION,
    PER_LAYER,
    PER_SEQUENCE,
    VIDUR_LAYER,
    read_linear_table,
)
from systems.common.models import model

US = 1e-6
TOKENS, SEQUENCES = (1, 64, 512), (1, 32)
DECODES, CONTEXTS, CHUNK_SIZES, PASTS = (1, 4, 16), (16, 256, 4096), (16, 128), (0, 512)


def dense_us(name: str, tokens: int) -> float:
    return 3 + len(name) + 0.1 * tokens


def decode_us(decodes: int, context: int) -> float:
    return 8 + decodes * (0.3 + 0.004 * context)


def chunk_us(tokens: int, past: int) -> float:
    return 9 + 0.01 * tokens + 0.02 * past


def mixed_us(tokens: int, past: int, decodes: int, context: int) -> float:
    return chunk_us(tokens, past) + 2 * (decode_us(decodes, context) - 8)


def write_folder(tmp_path):
    """A small folder in the format, with known formulas."""
    lines = [f"{n},{t},{dense_us(n, t)}" for n in (*PER_LAYER, *PER_ITERATION) if n != "qk_norm" for t in TOKENS]
    (tmp_path / "profile_dense.csv").write_text("\n".join(["layer,tokens,time_us", *lines]) + "\n")
    lines = [f"{n},{s},{dense_us(n, s)}" for n in PER_SEQUENCE for s in SEQUENCES]
    (tmp_path / "profile_per_sequence.csv").write_text("\n".join(["layer,sequences,time_us", *lines]) + "\n")
    lines = [f"0,0,{n},{c},{decode_us(n, c)}" for n in DECODES for c in CONTEXTS]
    lines += [f"{t},{p},0,0,{chunk_us(t, p)}" for t in CHUNK_SIZES for p in PASTS]
    lines += [f"{t},{p},{n},{c},{mixed_us(t, p, n, c)}" for t in CHUNK_SIZES for p in PASTS for n in DECODES for c in CONTEXTS]
    (tmp_path / "profile_attention.csv").write_text(
        "\n".join(["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", *lines]) + "\n"
    )
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


@pytest.fixture
def table(folder):
    return costs("tiny", "h100", operators=folder)


def layer_us(tokens: float) -> float:
    return sum(times * dense_us(name, tokens) for name, times in PER_LAYER.items() if name != "qk_norm")


@pytest.mark.parametrize("tokens", [1, 64, 512, 2, 100, 511])
def test_layers_are_interpolated(table, tokens):
    assert table.layer_linear_s(tokens) == pytest.approx(layer_us(tokens) * US)


@pytest.mark.parametrize("tokens", [513, 4096, 4097, 100_000])
def test_layers_go_on_in_a_straight_line(table, tokens):
    assert table.layer_linear_s(tokens) == pytest.approx(layer_us(tokens) * US)


def test_once_per_iteration(table):
    assert table.embedding_s(64) == pytest.approx(sum(dense_us(n, 64) for n in PER_ITERATION) * US)
    assert table.head_s(32) == pytest.approx(sum(dense_us(n, 32) for n in PER_SEQUENCE) * US)


@pytest.mark.parametrize(("decodes", "context"), [(1, 16), (4, 256), (16, 4096), (3, 100), (9, 1000), (40, 8192)])
def test_decodes(table, decodes, context):
    assert table.attention_s((), decodes, decodes * context) == pytest.approx(decode_us(decodes, context) * US)


def test_below_the_grid_the_first_value_holds(table):
    assert table.attention_s((), 4, 4) == table.attention_s((), 4, 4 * 16)
    assert table.attention_s([Chunk(1)], 0, 0) == table.attention_s([Chunk(16)], 0, 0)


@pytest.mark.parametrize(("tokens", "past"), [(16, 0), (128, 512), (60, 77)])
def test_chunks(table, tokens, past):
    assert table.attention_s([Chunk(tokens, past)], 0, 0) == pytest.approx(chunk_us(tokens, past) * US)


@pytest.mark.parametrize(("tokens", "past", "decodes", "context"), [(16, 0, 1, 16), (128, 512, 16, 4096), (50, 300, 7, 900)])
def test_mixed_batches(table, tokens, past, decodes, context):
    expected = mixed_us(tokens, past, decodes, context) * US
    assert table.attention_s([Chunk(tokens, past)], decodes, decodes * context) == pytest.approx(expected)


def test_chunks_add_and_the_launch_is_counted_once(table):
    alone = [table.attention_s([chunk], 0, 0) for chunk in (Chunk(128, 5), Chunk(30), Chunk(99, 400))]
    together = table.attention_s([Chunk(128, 5), Chunk(30), Chunk(99, 400)], 0, 0)
    assert together == pytest.approx(sum(alone) - 2 * chunk_us(16, 0) * US)


def test_a_chunk_longer_than_the_grid_is_consecutive_chunks(table):
    expected = (chunk_us(128, 7) + chunk_us(128, 135) + chunk_us(44, 263)) * US
    assert table.attention_s([Chunk(300, 7)], 0, 0) == pytest.approx(expected)


def test_decodes_are_counted_once_beside_several_chunks(table):
    chunks = [Chunk(128, 5), Chunk(30)]
    added = table.attention_s(chunks, 4, 400) - table.attention_s(chunks, 0, 0)
    assert added == pytest.approx(table.attention_s(chunks[:1], 4, 400) - table.attention_s(chunks[:1], 0, 0))


def test_without_mixed_rows_the_decodes_cost_what_they_cost_alone(folder):
    path = folder / "profile_attention.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *(line for line in lines if line.startswith("0,") or ",0,0," in line)]) + "\n")
    table = costs("tiny", "h100", operators=folder)
    added = table.attention_s([Chunk(128)], 4, 400) - table.attention_s([Chunk(128)], 0, 0)
    assert added == pytest.approx(table.attention_s((), 4, 400) - chunk_us(16, 0) * US)


@given(decodes=st.integers(1, 300), context=st.integers(0, 10**6), steps=st.integers(0, 3000))
def test_decode_attention_is_the_line_of_attention_up_to_its_end(decodes, context, steps, shared):
    line = shared.decode_attention(decodes, context)
    assert line.end > context
    later = context + steps
    if later < line.end:
        assert line.at(later) == shared.attention_s((), decodes, later), "equal exactly, not nearly"
        assert shared.decode_attention(decodes, later) == line
    else:
        assert shared.decode_attention(decodes, int(line.end) + 1) != line


@given(tokens=st.integers(1, 10**5), decodes=st.integers(0, 600), context=st.integers(1, 50_000), past=st.integers(0, 50_000))
def test_times_are_positive_and_finite(tokens, decodes, context, past, shared):
    times = [
        shared.layer_linear_s(tokens),
        shared.head_s(tokens),
        shared.embedding_s(tokens),
        shared.attention_s([Chunk(min(tokens, 5000), past)], decodes, decodes * context),
    ]
    assert all(math.isfinite(t) and t > 0 for t in times)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same folder once for all of hypothesis' examples, with noise that is not monotone."""
    path = write_folder(tmp_path_factory.mktemp("tables"))
    attention = path / "profile_attention.csv"
    header, *lines = attention.read_text().splitlines()
    noisy = [
        f"{line.rpartition(',')[0]},{float(line.rpartition(',')[2]) * (1 + 0.2 * (i % 3 - 1))}" for i, line in enumerate(lines)
    ]
    attention.write_text("\n".join([header, *noisy]) + "\n")
    return costs("tiny", "h100", operators=path)


def test_tables_by_degree_lie_in_folders(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("degrees")
    for tp in (1, 2):
        (other / f"tp{tp}").mkdir()
        for file in folder.glob("*.csv"):
            (other / f"tp{tp}" / file.name.removeprefix("profile_")).write_text(file.read_text())
    shared = costs("tiny", "h100x2", 2, operators=other)
    assert shared.layer_linear_s(64) == pytest.approx(layer_us(64) * US)
    assert shared.all_reduce_s(1000) == costs("tiny", "h100x2", 2).all_reduce_s(1000), "communication is the roofline's"
    with pytest.raises(InputError, match="tp4/"):
        costs("tiny", "h100x4", 4, operators=folder)


def damaged(folder, file, change):
    path = folder / file
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError) as error:
        costs("tiny", "h100", operators=folder)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("old", "new", "column", "value"),
    [
        ("act_fn,64,", "act_fn,64,nan,", "column time_us, row", "'nan'"),
        ("act_fn,64,", "act_fn,64,-1,", "column time_us, row", "'-1'"),
        ("act_fn,64,", "act_fn,64,fast,", "column time_us, row", "'fast'"),
        ("act_fn,64,", "act_fn,64,inf,", "column time_us, row", "'inf'"),
        ("act_fn,64,", "act_fn,64,0,", "column time_us, row", "0.0"),
        ("act_fn,64,", "act_fn,,", "column tokens, row", "''"),
        ("act_fn,64,", "softmax,64,", "column layer, row", "'softmax'"),
        ("layer,tokens,time_us", "layer,tokens,us", "column", "'time_us'"),
        ("layer,tokens,time_us", "layer,time_us", "column", "'tokens'"),
        ("act_fn", "rotary_emb", "column layer", "'act_fn'"),
    ],
)
def test_a_damaged_table_is_refused(folder, old, new, column, value):
    text = damaged(folder, "profile_dense.csv", lambda content: content.replace(old, new))
    assert "profile_dense.csv" in text and column in text and value in text


def test_the_row_number_counts_the_header(folder):
    lines = (folder / "profile_dense.csv").read_text().splitlines()
    lines[4] = lines[4].rpartition(",")[0] + ",nan"
    text = damaged(folder, "profile_dense.csv", lambda _: "\n".join(lines))
    assert "row 5" in text


@pytest.mark.parametrize("name", ["dense", "per_sequence", "attention"])
def test_a_missing_file_is_refused(folder, name):
    (folder / f"profile_{name}.csv").unlink()
    with pytest.raises(InputError, match=f"profile_{name}.csv"):
        costs("tiny", "h100", operators=folder)


@pytest.mark.parametrize("content", ["", "layer,tokens,time_us\n", "\x00\xff"])
def test_an_empty_table_is_refused(folder, content):
    damaged(folder, "profile_dense.csv", lambda _: content)


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / "profile_dense.csv").write_bytes(b"layer,tokens,time_us\n\xff\xfe,1,2\n")
    with pytest.raises(InputError, match="UTF-8"):
        costs("tiny", "h100", operators=folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        costs("tiny", "h100", operators=tmp_path / "nowhere")


def test_attention_needs_both_kinds(folder):
    keep = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n16,0,0,0,9\n"
    assert "n_decode" in damaged(folder, "profile_attention.csv", lambda _: keep)


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ("hardware: RTX4090\n", "hardware"),
        ("hardware: [1]\n", "hardware"),
        ("engine_effective: {hf_overrides: {vocab_size: big}}\n", "vocab_size"),
        ("engine_effective: {hf_overrides: {num_attention_heads: 32}}\n", "num_attention_heads"),
        ("tp_degrees: [2]\n", "tp"),
        ("- a list\n", "mapping"),
        ("a: [\n", "YAML"),
        ("tp_degrees: many\n", "tp_degrees"),
        ("engine_effective: fast\n", "engine_effective"),
    ],
)
def test_tables_of_something_else_are_refused(folder, meta, said):
    (folder / "profile_meta.yaml").write_text("")
    assert said in damaged(folder, "profile_meta.yaml", lambda _: meta)


def test_meta_that_agrees_is_taken(folder):
    (folder / "profile_meta.yaml").write_text(
        "hardware: MyOwnGPU\ntp_degrees: [1]\nengine_effective: {hf_overrides: {num_hidden_layers: 1}}\n"
    )
    assert costs("tiny", "h100", operators=folder).source == f"published {folder.name}"


def vidur(path, **changed):
    row = {"num_tokens": 8, "num_tensor_parallel_workers": 1, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "n_expanded_embd": 128}
    row |= {f"time_stats.{name}.median": 0.01 for name in ("emb", *VIDUR_LAYER)} | changed
    path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    return path


def test_a_linear_table(tmp_path):
    shape = model("tiny")
    table = read_linear_table(vidur(tmp_path / "t.csv"), 1, shape)
    assert table.operators["mlp_act"].at(8) == pytest.approx(1e-5)
    cost = costs("tiny", "h100", operators=tmp_path / "t.csv")
    assert cost.layer_linear_s(8) == pytest.approx(len(VIDUR_LAYER) * 1e-5)
    assert cost.attention_s((), 2, 99) == costs("tiny", "h100").attention_s((), 2, 99)
    assert cost.source.startswith("published t (linear operators), rest: roofline h100")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"n_embd": 128}, "column n_embd, row 2"),
        ({"num_tensor_parallel_workers": 2}, "num_tensor_parallel_workers"),
        ({"time_stats.emb.median": "nan"}, "column time_stats.emb.median, row 2"),
    ],
)
def test_a_wrong_linear_table_is_refused(tmp_path, change, key):
    with pytest.raises(InputError) as error:
        read_linear_table(vidur(tmp_path / "t.csv", **change), 1, model("tiny"))
    assert error.value.key == key


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"tp-1": {"bsz-1": {"init": 0, "incr": 1}}}', '{"tp-1": {"bsz-1": 3}}', '{"tp-x": {}}']
)
def test_a_wrong_layer_profile_is_refused(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(InputError):
        read_layer_profile(path)


POINTS = st.lists(st.tuples(st.integers(1, 10**5), st.floats(1e-6, 1)), min_size=1, max_size=12, unique_by=lambda p: p[0])


def bracket(curve, x):
    """The values at the knots on both sides of `x`."""
    left = [y for a, y in zip(curve.xs, curve.ys, strict=True) if a <= x][-1:]
    return left + [y for a, y in zip(curve.xs, curve.ys, strict=True) if a >= x][:1]


@given(POINTS, st.integers(0, 2 * 10**5))
def test_curves_stay_within_their_neighbours(points, x):
    curve = Curve.of(points)
    assert all(curve.at(a) == pytest.approx(b) for a, b in points)
    if x <= curve.xs[-1]:
        around = bracket(curve, x)
        assert min(around) - 1e-12 <= curve.at(x) <= max(around) + 1e-12
    else:
        assert curve.at(x) >= curve.ys[-1], "never falls beyond the last point"


@given(POINTS, st.integers(0, 2 * 10**5))
def test_pieces_are_the_curve(points, x):
    curve = Curve.of(points)
    piece = next(piece for piece in curve.pieces() if x < piece.end)
    assert piece.at(x) == pytest.approx(curve.at(x), abs=1e-9)


@given(POINTS, POINTS, st.integers(0, 10**5))
def test_mixing_adds(first, second, x):
    a, b = Curve.of(first), Curve.of(second)
    if x <= min(a.xs[-1], b.xs[-1]):
        assert mix([(1.0, a), (2.0, b)]).at(x) == pytest.approx(a.at(x) + 2 * b.at(x), abs=1e-9)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True), st.integers(0, 3000))
def test_neighbours_reproduce_straight_lines(knots, x):
    knots.sort()
    found = neighbours(knots, x)
    assert sum(weight for _, weight in found) == pytest.approx(1)
    if len(knots) > 1 and x >= knots[0]:
        assert sum(weight * knots[i] for i, weight in found) == pytest.approx(x)
