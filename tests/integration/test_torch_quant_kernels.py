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
    from systems.common.torch_engine.kernels.integers import narrow4, narrow8
    from systems.common.torch_engine.kernels.quant_linear import dequantised, quant_linear
    from systems.common.torch_engine.kernels.quant_tilings import TILINGS, Tiling
    from systems.common.torch_engine.kernels.triton_guard import jit, tl
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
        bk = layer.group or 64
        tilings = [None, Tiling(16, bk, splits=2), Tiling(32, bk, splits=4, rows=64)]
        for tiling in [*tilings, Tiling(16, bk, left=True), Tiling(32, bk, splits=2, rows=64, left=True)]:
            out = quant_linear(x, layer.weight, layer.scale, layer.group, bias=layer.bias, tiling=tiling)
            assert off(out, expected) < 1e-5

    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    def test_dense_again(dtype: str) -> None:
        layer, dense = made(10, 320, dtype)
        assert off(dequantised(layer.weight, layer.scale, layer.group, torch.float32), dense) < 1e-6

    @jit
    def _integers(bytes_, halves, out8, out4):
        i = tl.arange(0, 256)
        tl.store(out8 + i, narrow8(tl.load(bytes_ + i), out8.dtype.element_ty))
        j = tl.arange(0, 16)
        tl.store(out4 + j, narrow4(tl.load(halves + j), out4.dtype.element_ty))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])])
    def test_integers_by_bits(dtype) -> None:
        bytes_ = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE)
        halves = torch.arange(16, dtype=torch.int16, device=DEVICE)
        out8, out4 = torch.empty(256, dtype=dtype, device=DEVICE), torch.empty(16, dtype=dtype, device=DEVICE)
        _integers[(1,)](bytes_, halves, out8, out4)
        assert torch.equal(out8.int(), bytes_.int()) and torch.equal(out4.int(), halves.int() - 8)

    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    def test_every_tiling_of_the_table(dtype: str) -> None:
        layer, dense = made(96, 2048 + 128, dtype)
        for tiling in TILINGS[dtype]:
            for rows in {max(1, tiling.rows - 3), tiling.rows}:
                x = rand(rows, 2048 + 128)
                x = x.bfloat16() if CUDA else x  # whose steps are made for it: those of float32 do not fit
                out = quant_linear(x, layer.weight, layer.scale, layer.group, tiling=tiling)
                assert off(out, x.double() @ dense.T) < (0.01 if CUDA else 1e-5)
