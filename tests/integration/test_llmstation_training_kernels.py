"""Tuning's Triton kernels against autograd in float64; on a machine without a GPU they run in Triton's interpreter."""

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
    from systems.llmstation.training.kernels.cross_entropy import cross_entropy_
    from systems.llmstation.training.kernels.norm import norm_backward, norm_forward
    from systems.llmstation.training.kernels.rope import rope_backward, rope_forward
    from systems.llmstation.training.kernels.swiglu import swiglu_backward

    EPS = 1e-5

    def rand(*shape: int):
        return torch.randn(*shape, device=DEVICE)

    def off(out, expected) -> float:
        assert not torch.isnan(out).any()
        return float((out.double() - expected.double()).norm() / expected.double().norm())

    def grad(function, *inputs, dout):
        """Gradients of the inputs by autograd in float64."""
        leaves = [x.double().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, dout.double())

    def rms(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain

    @pytest.mark.parametrize("width", [48, 64])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
    def test_norm(width: int, scale: float) -> None:
        x, delta, gain, dh, dres = rand(5, width) * scale, rand(5, width) * scale, rand(width), rand(5, width), rand(5, width)
        before = x.clone()
        total, h = norm_forward(x, delta, gain, EPS)
        assert torch.equal(x, before)
        assert torch.equal(total, x + delta)
        assert off(h, rms(total.double(), gain.double())) < 1e-5
        alone, h = norm_forward(total, None, gain, EPS)
        assert alone is total
        assert off(h, rms(total.double(), gain.double())) < 1e-5
        expected = grad(rms, total, gain, dout=dh)[0]
        assert off(norm_backward(total, gain, dh, None, EPS), expected) < 1e-5
        assert off(norm_backward(total, gain, dh, dres, EPS), expected + dres.double()) < 1e-5

    @pytest.mark.parametrize("width", [48, 2100])
    def test_swiglu(width: int) -> None:
        both, dout = rand(3, 2 * width) * 4, rand(3, width)
        expected = grad(lambda x: torch.nn.functional.silu(x[:, :width]) * x[:, width:], both, dout=dout)[0]
        assert off(swiglu_backward(both, dout), expected) < 1e-5

    def turn(x, rope):
        """x [batch, heads, length, head_dim]; rope [length, head_dim]."""
        cos, sin = rope.double().chunk(2, -1)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    @pytest.mark.parametrize(("heads", "kv"), [(6, 2), (4, 4), (5, 1), (14, 2)])
    @pytest.mark.parametrize("start", [0, 3])
    @pytest.mark.parametrize("layout", ["heads first", "tokens first"])
    def test_rope(heads: int, kv: int, start: int, layout: str) -> None:
        batch, length, head_dim = 2, 5, 16
        angle = rand(length + start, head_dim // 2)
        rope = torch.cat([angle.cos(), angle.sin()], -1)
        qkv = rand(batch * length, (heads + 2 * kv) * head_dim)
        split = [heads, kv, kv]
        q, k, v = qkv.clone().view(batch, length, -1, head_dim).transpose(1, 2).split(split, 1)
        here = rope[start:]
        rope_forward(qkv, rope, length, start, heads + kv)
        found = qkv.view(batch, length, -1, head_dim).transpose(1, 2).split(split, 1)
        for mine, expected in zip(found, (turn(q.double(), here), turn(k.double(), here), v), strict=True):
            assert off(mine, expected) < 1e-5
        douts = [
            rand(batch, n, length, head_dim) if layout == "heads first" else rand(batch, length, n, head_dim).transpose(1, 2)
            for n in split
        ]
        packed = (
            rope_backward(*douts, rope, start, torch.float32).view(batch, length, -1, head_dim).transpose(1, 2).split(split, 1)
        )
        for i, x in enumerate((q, k)):
            assert off(packed[i], grad(lambda t: turn(t, here), x, dout=douts[i])[0]) < 1e-5
        assert torch.equal(packed[2], douts[2])

    @pytest.mark.parametrize("vocab", [33, 128, 8200])
    @pytest.mark.parametrize("scale", [1.0, 60.0])
    def test_cross_entropy(vocab: int, scale: float) -> None:
        logits = rand(5, vocab) * scale
        target = torch.randint(0, vocab, (5,), device=DEVICE)
        weight = torch.tensor([0.3, 0.0, 0.1, 0.5, 0.1], device=DEVICE)
        target[1] = -100
        leaf = logits.double().requires_grad_()
        losses = torch.nn.functional.cross_entropy(leaf, target, ignore_index=-100, reduction="none") * weight
        losses.sum().backward()
        loss = cross_entropy_(logits, target, weight)
        assert off(loss, losses.detach()) < 1e-5
        assert loss[1] == 0
        assert not logits[1].any()
        assert off(logits, leaf.grad) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_rounds_once(dtype) -> None:
        """Each kernel's result is the float64 one rounded to the format: no sums in half precision."""
        ulp = torch.finfo(dtype).eps
        x, gain, dh, dres = (t.to(dtype) for t in (rand(3, 64), rand(64), rand(3, 64), rand(3, 64)))
        expected = grad(rms, x, gain, dout=dh)[0] + dres.double()
        assert off(norm_backward(x, gain, dh, dres, EPS), expected) < ulp
        both, dout = rand(3, 64).to(dtype), rand(3, 32).to(dtype)
        expected = grad(lambda t: torch.nn.functional.silu(t[:, :32]) * t[:, 32:], both, dout=dout)[0]
        assert off(swiglu_backward(both, dout), expected) < ulp
        logits, target = rand(4, 300).to(dtype), torch.randint(0, 300, (4,), device=DEVICE)
        expected = grad(lambda t: torch.nn.functional.cross_entropy(t, target), logits, dout=torch.ones((), device=DEVICE))[0]
        cross_entropy_(logits, target, torch.full((4,), 0.25, device=DEVICE))
        assert off(logits, expected) < ulp
