"""Quantised products by torchao; without that package only what needs none of it: what is handed over, and refusals."""

from __future__ import annotations

from dataclasses import replace
from importlib import util

import pytest

torch = pytest.importorskip("torch")

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine import torchao_products  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import merge, random_adapter  # noqa: E402
from systems.common.torch_engine.quantised import dequantise, linear, quantise  # noqa: E402
from systems.common.torch_engine.torchao_products import handed_over, tinygemm  # noqa: E402
from systems.common.torch_engine.weights import random_weights, weight_bytes  # noqa: E402

SHAPE = replace(model("tiny"), hidden=128, heads=4, head_dim=32, mlp=384)
CONFIG = EngineConfig(100, max_num_batched_tokens=64, max_num_seqs=8)
torchao = pytest.mark.skipif(util.find_spec("torchao") is None, reason="torchao is not installed")
torch.set_num_threads(1)


@pytest.mark.parametrize("inputs", [128, 1024, 1152])
def test_int4_as_tinygemm_has_it(inputs: int) -> None:
    """(integer - 8) * scale + zero is our matrix, zeros where inputs are padded; PyTorch's CPU kernel for it agrees."""
    layer = quantise(torch.randn(32, inputs).bfloat16(), None, "int4")
    whole, scale_and_zero = tinygemm(layer)
    padded = -(-inputs // 1024) * 1024
    assert whole.shape == (32, padded) and scale_and_zero.shape == (padded // 128, 32, 2) and scale_and_zero.is_contiguous()
    scale, zero = (x.T.repeat_interleave(128, 1).float() for x in scale_and_zero.unbind(-1))
    dense = (whole.float() - 8) * scale + zero
    assert not dense[:, inputs:].any()
    torch.testing.assert_close(dense[:, :inputs], dequantise(layer, torch.float32))
    x = torch.randn(5, padded).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 1)
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scale_and_zero)
    expected = x.float() @ dense.T
    assert float((found.float() - expected).norm() / expected.norm()) < 0.01


def test_what_cannot_run() -> None:
    weights = random_weights(SHAPE, 3, dtype="int8")
    with pytest.raises(InputError, match="use auto or one of triton, torchao"):
        torchao_products.apply("cutlass", weights)
    with pytest.raises(InputError, match="needs Triton and a GPU: use auto"):
        torchao_products.apply("triton", weights)
    for dtype, lack in (("int4", "a GPU and bf16 for int4|the package torchao"), ("int8", "the package torchao")):
        if dtype == "int4" or util.find_spec("torchao") is None:
            with pytest.raises(InputError, match=lack):
                torchao_products.apply("torchao", random_weights(SHAPE, 3, dtype=dtype))


def test_what_was_chosen_is_known() -> None:
    int8 = "dense" if util.find_spec("torchao") is None else "torchao"
    for dtype, expected in ((None, "none"), ("int8", int8), ("int4", "dense")):
        live = Live.build(SHAPE, random_weights(SHAPE, 3, dtype=dtype), CONFIG, max_tokens=64)
        assert live.executor.choices == {"attention": "sdpa", "kv_dtype": "fp32", "quantised": expected, "lora": "none"}
    live = Live.build(
        SHAPE, random_weights(SHAPE, 3), replace(CONFIG, kv_dtype="int8"), max_tokens=64, adapters=(1, 4, ("qkv",))
    )
    assert live.executor.choices == {"attention": "sdpa", "kv_dtype": "int8", "quantised": "none", "lora": "bmm"}


@torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products(dtype: torch.dtype) -> None:
    layer = quantise(torch.randn(24, 256).to(dtype), torch.randn(24).to(dtype), "int8")
    theirs = handed_over(layer, dtype)
    x = torch.randn(7, 256).to(dtype)
    expected = x.double() @ dequantise(layer, torch.float64).T + layer.bias.double()
    found = linear(x, theirs)
    assert found.dtype == dtype
    assert float((found.double() - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 0.01)


@torchao
def test_a_whole_model() -> None:
    asked = [Request(i, 0.0, 10 + i, 12) for i in range(5)]
    ours = Live.build(SHAPE, random_weights(SHAPE, 3, dtype="int8"), CONFIG, max_tokens=128)
    weights = random_weights(SHAPE, 3, dtype="int8")
    size = weight_bytes(weights)
    theirs = Live.build(SHAPE, weights, CONFIG, max_tokens=128, quantised="torchao")
    assert theirs.executor.choices["quantised"] == "torchao" and weight_bytes(weights) == size
    assert theirs.generate(asked)[1] == ours.generate(asked)[1]
    with pytest.raises(InputError, match="quantised weights cannot take it in"):
        merge(SHAPE, weights, random_adapter(SHAPE, 4, 1))
