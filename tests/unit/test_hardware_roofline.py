"""Properties of the roofline: positive, finite, monotone, affine decodes, tensor parallelism that halves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.hardware import Chunk, Efficiencies, RooflineCosts, costs, default_efficiencies, gpu
from systems.common.hardware.attention import TILE_ROWS, keys_walked
from systems.common.hardware.roofline import rounded_max
from systems.common.models import MODELS, model

NAMES = st.sampled_from(["t4x8", "v100x8", "rtx3090x8", "rtx4090x8", "a100x8", "h100x8", "h200x8"])
SHAPES = st.sampled_from(sorted(set(MODELS) - {"tiny"}))
TP = st.sampled_from([1, 2, 4, 8])
COSTS = st.builds(costs, SHAPES, NAMES, TP)
TOKENS = st.integers(1, 20_000)
CHUNKS = st.lists(st.builds(Chunk, st.integers(1, 3000), st.integers(0, 9000)), min_size=1, max_size=6)


@given(COSTS, TOKENS, CHUNKS, st.integers(1, 512), st.integers(0, 10**6))
def test_times_are_positive_and_finite(cost, tokens, chunks, decodes, context):
    times = [
        cost.layer_linear_s(tokens),
        cost.head_s(tokens),
        cost.embedding_s(tokens),
        cost.attention_s(chunks, decodes, context),
        cost.attention_s(chunks, 0, 0),
        cost.attention_s((), decodes, context),
    ]
    assert all(math.isfinite(t) and t > 0 for t in times), times


@given(COSTS, TOKENS, st.integers(1, 500))
def test_more_tokens_never_cost_less(cost, tokens, more):
    for price in (cost.layer_linear_s, cost.head_s, cost.embedding_s, cost.all_reduce_s):
        assert price(tokens) <= price(tokens + more)


@given(COSTS, CHUNKS, st.integers(0, 300), st.integers(0, 10**6), st.integers(1, 200))
def test_more_attention_never_costs_less(cost, chunks, decodes, context, more):
    here = cost.attention_s(chunks, decodes, context)
    first, *rest = chunks
    assert here <= cost.attention_s([Chunk(first.tokens + more, first.past), *rest], decodes, context)
    assert here <= cost.attention_s([Chunk(first.tokens, first.past + more), *rest], decodes, context)
    assert here <= cost.attention_s([*chunks, Chunk(more)], decodes, context)
    assert here <= cost.attention_s(chunks, decodes + more, context)
    assert here <= cost.attention_s(chunks, decodes + 1, context + more)


@given(COSTS, st.integers(1, 600), st.integers(0, 10**7), st.integers(0, 10**7))
def test_decode_attention_is_the_line_of_attention(cost, decodes, context, other):
    line = cost.decode_attention(decodes, context)
    assert line.end > context and line.slope_s > 0
    assert line.at(other) == cost.attention_s((), decodes, other), "equal exactly, not nearly"


@given(COSTS)
def test_nothing_costs_nothing(cost):
    assert cost.layer_linear_s(0) == cost.head_s(0) == cost.embedding_s(0) == cost.attention_s((), 0, 0) == 0
    assert cost.decode_attention(0, 0).at(5) == 0


@given(SHAPES.filter(lambda name: MODELS[name].kv_heads >= 8), st.sampled_from(["a100x8", "h100x8"]), st.integers(1, 4096))
def test_tensor_parallelism_halves_what_it_splits(name, testbed, tokens):
    card = gpu(testbed[:-2])
    whole, half = (RooflineCosts(model(name), card, tp, Efficiencies(launch_s=0, gemm_launch_s=0)) for tp in (1, 2))
    one, two = whole.operators_s(tokens), half.operators_s(tokens)
    assert two["layernorm"] == one["layernorm"], "norms are repeated, not split"
    assert two["act_fn"] == pytest.approx(one["act_fn"] / 2)
    for product in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        # the activations on the unsplit side cross the bus whole on each GPU
        assert 0.5 * one[product] <= two[product] * (1 + 1e-12) and two[product] <= one[product]
    slopes = [cost.decode_attention(1, 0).slope_s for cost in (whole, half)]
    assert slopes[1] == pytest.approx(slopes[0] / 2)


@given(st.sampled_from([2, 4, 8]), st.integers(1, 10**9))
def test_all_reduce(tp, size):
    shared, alone = costs("llama-2-7b", "h100x8", tp), costs("llama-2-7b", "h100x8", 1)
    assert alone.all_reduce_s(size) == 0 and shared.all_reduce_s(0) == 0
    efficiencies = default_efficiencies(gpu("h100"))
    assert shared.all_reduce_s(size) >= efficiencies.all_reduce_latency_s
    assert shared.all_reduce_s(size) >= size / gpu("h100").nvlink


def test_a_layer_is_bound_by_memory_at_one_token_and_by_compute_at_many():
    shape, card = model("llama-2-13b"), gpu("a100")
    cost = RooflineCosts(shape, card, 1, Efficiencies(launch_s=0, gemm_launch_s=0))
    assert cost.layer_linear_s(1) == pytest.approx(shape.layer_weight_bytes / card.bandwidth, rel=0.01)
    assert cost.layer_linear_s(8192) == pytest.approx(8192 * shape.layer_flops_per_token / card.flops["fp16"], rel=0.15)


@given(st.floats(0, 1), st.floats(1e-9, 1), st.floats(1, 50))
def test_the_knee_rounds_the_maximum(a, b, knee):
    larger = max(a, b)
    assert larger <= rounded_max(a, b, knee) <= larger * 2 ** (1 / knee) * (1 + 1e-12)
    assert rounded_max(a, b, math.inf) == larger


@given(st.integers(1, 64), st.integers(1, 150), st.integers(0, 5000), st.integers(1, 3000))
def test_keys_walked_against_handing_out_tiles_one_by_one(heads, sms, past, tokens):
    tiles = [past + end for end in range(tokens, 0, -TILE_ROWS) for _ in range(heads)]
    waves = [tiles[i : i + sms] for i in range(0, len(tiles), sms)]
    assert keys_walked([Chunk(tokens, past)], heads, sms) == sum(max(wave) for wave in waves)


def test_a_small_chunk_costs_what_its_tile_costs():
    cost = costs("llama-3.1-8b", "rtx4090")
    one, many = (cost.attention_s([Chunk(n, 8192)], 0, 0) for n in (1, 64))
    assert one == pytest.approx(many, rel=0.02)


def test_token_counts_are_priced_once(monkeypatch):
    cost = costs("llama-2-7b", "a100")
    first = cost.layer_linear_s(77), cost.head_s(5)
    monkeypatch.setattr(RooflineCosts, "gemm_s", lambda *_: pytest.fail("asked again"))
    assert (cost.layer_linear_s(77), cost.head_s(5)) == first


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("llama-9", "a100"), "model"),
        (("llama-2-7b", "b300"), "hardware"),
        (("llama-2-7b", "a100x2", 4), "tp"),
        (("llama-2-7b", "a100x2", 0), "tp"),
        (("llama-2-7b", "a100", 1, "guess"), "source"),
        (("llama-2-7b", "a100", 1, "published"), "operators"),
        (("llama-2-7b", "a100", 1, "roofline", None, "fp8"), "dtype"),
        (("llama-2-7b", "a100", 1, "roofline", None, "fp12"), "dtype"),
    ],
)
def test_bad_choices_are_refused(arguments, key):
    with pytest.raises(InputError) as error:
        costs(*arguments)
    assert error.value.key == key and "\n" not in str(error.value)


def test_the_source_says_what_was_borrowed():
    assert costs("llama-3.1-8b", "rtx3090").source == (
        "roofline rtx3090, efficiencies of rtx4090, element-wise of a100-80, all-reduce of a100-80"
    )
    assert "in fp16" in costs("llama-3.1-8b", "t4").source
