"""The kernels of quantised linears against float64; on a machine without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads the switch when a kernel is defined, so the tests run in a process of their own.

    def test_in_the_interpreter(root) -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]

else:
    from systems.common.torch_engine.kernels.quant_linear import Tiling, dequantised, quant_linear
    from systems.common.torch_engine.quantised import dequantise, quantise

    def rand(*shape: int):
        return torch.randn(*shape, device=DEVICE)

    def off(out, expected) -> float:
        assert not torch.isnan(out).any()
        return float((out.double() - expected.double()).norm() / expected.double().norm())

    def made(outer: int, inner: int, dtype: str):
        """A layer, and its dequantised matrix in float64."""
        layer = quantise(rand(outer, inner), rand(outer), dtype)
        return layer, dequantise(layer, torch.float64)

    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    @pytest.mark.parametrize(("outer", "inner"), [(24, 384), (70, 128), (16, 96)])
    def test_one_row_with_everything_fused(dtype: str, outer: int, inner: int) -> None:
        layer, dense = made(2 * outer, inner, dtype)
        x, gain, residual = rand(1, inner), rand(inner), rand(1, outer)
        wide = x.double()
        h = wide / (wide.square().mean() + 1e-5).sqrt() * gain.double()
        packed = (layer.weight, layer.scale, layer.group)
        for tiling in (None, Tiling(8, max(256, layer.group))):
            plain = quant_linear(x, *packed, bias=layer.bias, tiling=tiling)
            assert off(plain, wide @ dense.T + layer.bias.double()) < 1e-5
            gated = quant_linear(x, *packed, norm=gain, gated=True, residual=residual, tiling=tiling)
            gate, up = (h @ dense.T).chunk(2, -1)
            assert off(gated, residual.double() + torch.nn.functional.silu(gate) * up) < 1e-5

    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    @pytest.mark.parametrize(("outer", "inner"), [(70, 384), (16, 96)])
    @pytest.mark.parametrize("rows", [2, 17, 40])
    def test_several_rows(dtype: str, outer: int, inner: int, rows: int) -> None:
        layer, dense = made(outer, inner, dtype)
        x = rand(rows, inner)
        expected = x.double() @ dense.T + layer.bias.double()
        for tiling in (None, Tiling(16, layer.group or 64, splits=2), Tiling(32, layer.group or 128, splits=4)):
            out = quant_linear(x, layer.weight, layer.scale, layer.group, bias=layer.bias, tiling=tiling)
            assert off(out, expected) < 1e-5

    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    def test_dense_again(dtype: str) -> None:
        layer, dense = made(10, 320, dtype)
        assert off(dequantised(layer.weight, layer.scale, layer.group, torch.float32), dense) < 1e-6
