"""Weight-only quantisation on a CPU: the numbers, the packing, parts of matrices, whole models."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.linear import Linear  # noqa: E402
from systems.common.torch_engine.lora import merge, random_adapter  # noqa: E402
from systems.common.torch_engine.placement import Span  # noqa: E402
from systems.common.torch_engine.quantised import Quantised, dequantise, group_of, joined, linear, part, quantise  # noqa: E402
from systems.common.torch_engine.weights import random_weights, weight_bytes  # noqa: E402

SHAPE = replace(model("tiny"), hidden=128, heads=4, head_dim=32, mlp=384)
CONFIG = EngineConfig(100, max_num_batched_tokens=64, max_num_seqs=8)
SITES = ("qkv", "o", "up", "down")
torch.set_num_threads(1)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["int8", "int4"]), st.integers(1, 9), st.sampled_from([32, 64, 96, 128, 256, 384]), st.integers(0, 99))
def test_no_weight_is_off_by_more_than_half_a_step(dtype: str, outputs: int, inputs: int, seed: int) -> None:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 5 - 2)
    weight[0] = 0  # a row of zeros has no scale of its own
    layer = quantise(weight, None, dtype)
    assert layer.inputs == inputs and layer.group == (0 if dtype == "int8" else group_of(inputs))
    assert layer.weight.nbytes == outputs * inputs // (1 if dtype == "int8" else 2)
    step = (layer.scale[:, None] if dtype == "int8" else layer.scale.repeat_interleave(layer.group, 1)).double()
    off = (dequantise(layer, torch.float64) - weight.double()).abs()
    assert bool((off <= 0.5001 * step).all())
    assert not dequantise(layer, torch.float64)[0].any()


def test_int4_is_packed_as_documented() -> None:
    """Byte j of a group of 128: input j in the low half, input 64 + j in the high half, both plus 8."""
    values = torch.arange(256).remainder(15).sub(7).float().view(1, 256)
    layer = quantise(values, None, "int4")
    assert layer.scale.tolist() == [[1.0, 1.0]]
    for byte, (low, high) in {0: (0, 64), 5: (5, 69), 64: (128, 192), 127: (191, 255)}.items():
        assert int(layer.weight[0, byte]) == int(values[0, low]) + 8 | (int(values[0, high]) + 8) << 4
    assert torch.equal(dequantise(layer, torch.float32), values)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_products_parts_and_joins(dtype: str) -> None:
    weight, bias, x = torch.randn(24, 256), torch.randn(24), torch.randn(7, 256)
    layer = quantise(weight, bias, dtype)
    dense = dequantise(layer, torch.float64)
    torch.testing.assert_close(linear(x, layer).double(), x.double() @ dense.T + bias.double(), atol=1e-4, rtol=1e-5)
    columns = part(layer, None, Span(128, 256))
    assert torch.equal(dequantise(columns, torch.float64), dense[:, 128:])
    rows = [part(layer, Span(0, 10), None), part(layer, Span(10, 24), None)]
    both = joined(rows)
    assert torch.equal(dequantise(both, torch.float64), dense)
    if dtype == "int4":
        with pytest.raises(InputError, match="cut a group of 128: use fewer tp ranks, or int8"):
            part(layer, None, Span(64, 256))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantised_model_is_its_dequantised_one(dtype: str) -> None:
    asked = [Request(i, 0.0, 10 + i, 12) for i in range(5)]
    weights = random_weights(SHAPE, 3, dtype=dtype)
    plain = random_weights(SHAPE, 3)
    assert torch.equal(weights.head, plain.head) and isinstance(weights.layers[0].up, Quantised)
    live = Live.build(SHAPE, weights, CONFIG, max_tokens=128)
    found = live.generate(asked)[1]
    small = weight_bytes(weights)
    for layer, whole in zip(weights.layers, plain.layers, strict=True):
        for site in SITES:
            matrix = getattr(layer, site)
            setattr(layer, site, Linear(dequantise(matrix, torch.float32), matrix.bias))
            distance = (getattr(layer, site).weight - getattr(whole, site).weight).norm() / getattr(whole, site).weight.norm()
            assert distance < (0.01 if dtype == "int8" else 0.15)
    assert Live.build(SHAPE, weights, CONFIG, max_tokens=128).generate(asked)[1] == found
    per_weight = 1 if dtype == "int8" else 0.5
    matrices = SHAPE.layers * (SHAPE.layer_parameters - 2 * SHAPE.norm_parameters)
    scales = (
        SHAPE.layers * sum(len(m.weight) for m in (getattr(plain.layers[0], s) for s in SITES))
        if dtype == "int8"
        else (matrices // 128)
    )
    ends = weight_bytes(plain) - 4 * matrices
    assert small == matrices * per_weight + 4 * scales + ends


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"weights: dtype: 'fp4': use one of int8, int4"):
        random_weights(SHAPE, dtype="fp4")
    with pytest.raises(InputError, match="no multiple of 32: use int8"):
        quantise(torch.randn(4, 48), None, "int4")
    weights = random_weights(SHAPE, 3, dtype="int8")
    with pytest.raises(InputError, match="keep it in the adapters' bank"):
        merge(SHAPE, weights, random_adapter(SHAPE, 4, 0))
