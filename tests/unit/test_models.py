"""Model shapes: sizes against known parameter counts."""

from __future__ import annotations

import pytest

from systems.common.errors import InputError
from systems.common.models import MODELS, ModelShape, model

# Parameter counts as the models' cards and papers give them; within 1 %.
KNOWN = {
    "llama-3.1-8b": 8.030e9,
    "llama-3.1-70b": 70.55e9,
    "llama-2-7b": 6.738e9,
    "llama-2-13b": 13.02e9,
    "llama-2-70b": 68.98e9,
    "opt-6.7b": 6.66e9,
    "gpt-20b": 20e9,
    "llama-30b-standin": 30e9,
    "qwen2-0.5b": 0.494e9,
}
# SpotServe artifact: MiB of one fp32 layer, biases and norms left out.
SPOTSERVE_LAYER_MIB = {"opt-6.7b": 768, "gpt-20b": 1728, "llama-30b-standin": 2352}


@pytest.mark.parametrize(("name", "parameters"), KNOWN.items())
def test_parameters(name, parameters):
    assert model(name).parameters == pytest.approx(parameters, rel=0.015)


@pytest.mark.parametrize(("name", "exact"), {"llama-3.1-8b": 8_030_261_248, "llama-2-7b": 6_738_415_616}.items())
def test_parameters_to_the_last_one(name, exact):
    assert model(name).parameters == exact


@pytest.mark.parametrize(("name", "mib"), SPOTSERVE_LAYER_MIB.items())
def test_spotserve_layers(name, mib):
    assert model(name).with_dtype("fp32").layer_weight_bytes / 2**20 == pytest.approx(mib, rel=0.001)


def test_kv_bytes_of_llama_31_8b():
    assert model("llama-3.1-8b").kv_bytes_per_token == 128 * 1024


def test_flops_are_twice_the_matrix_parameters():
    shape = model("llama-2-7b")
    assert shape.layer_flops_per_token == 2 * (shape.attention_parameters + shape.mlp_parameters)


def test_attention_flops_of_chunks_add_up_to_the_whole_prompt():
    shape = model("tiny")
    parts = sum(shape.layer_attention_flops(16, past) for past in range(0, 64, 16))
    assert parts == shape.layer_attention_flops(64)


def test_dtype_scales_bytes_not_parameters():
    shape = model("llama-2-7b")
    assert shape.with_dtype("fp32").weight_bytes == 2 * shape.weight_bytes
    assert shape.with_dtype("int8").weight_bytes == shape.weight_bytes // 2
    assert shape.with_dtype("fp32").parameters == shape.parameters


def test_a_tied_head_is_counted_once():
    shape = MODELS["qwen2-0.5b"]
    assert shape.head_parameters == 0 and shape.embedding_parameters == shape.vocab * shape.hidden


def test_an_unknown_model_names_the_close_ones():
    with pytest.raises(InputError, match=r"fig\.yaml: model: 'llama-3-8b': use one of .*llama-3\.1-8b") as error:
        model("llama-3-8b", "fig.yaml")
    assert "\n" not in str(error.value)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="dtype: 'fp12'"):
        model("tiny").with_dtype("fp12")


def test_impossible_shapes_are_assertions():
    with pytest.raises(AssertionError):
        ModelShape("bad", 1, 64, 4, 3, 16, 128, 256)
