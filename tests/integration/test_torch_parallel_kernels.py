"""What only a rank's part of a model asks of the kernels, in Triton's interpreter or on a GPU: odd kv heads, sums."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

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
    from systems.common.torch_engine.comm import Links

    @pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (10, 5), (6, 1)])
    def test_attention_with_any_number_of_kv_heads(heads: int, kv_heads: int) -> None:
        """A prompt and a decode step, our kernels against plain PyTorch; both caches hold the same afterwards."""
        from systems.common.models import ModelShape
        from systems.common.torch_engine.attention import Chunks, SdpaAttention, TritonAttention
        from systems.common.torch_engine.cache import KVCache
        from systems.common.torch_engine.numerics import Numerics, rope_table

        shape = ModelShape("part", 1, 64, heads, kv_heads, 16, 64, 64, dtype="fp32")
        rope = rope_table(16, 64, Numerics(), DEVICE)
        generator = torch.Generator().manual_seed(0)
        width = (heads + 2 * kv_heads) * 16
        prompt, step = (torch.randn(n, width, generator=generator).to(DEVICE) for n in (37, 1))
        found = []
        for backend in (SdpaAttention, TritonAttention):
            cache = KVCache(shape, 1, 4, 4, device=DEVICE)
            cache.tables[0] = torch.tensor([3, 1, 4, 2], device=DEVICE)
            attention = backend(shape, cache, rope)
            first = attention.prefill(prompt.clone(), 0, Chunks.of([0], [37], [0], DEVICE))
            cache.lengths[0] = 37
            second = attention.decode(step.clone(), 0, torch.zeros(1, dtype=torch.int64, device=DEVICE))
            found.append((first, second, cache.k[:, 1:].clone(), cache.v[:, 1:].clone()))
        for reference, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)

    class Pair(Links):
        """Two ranks of one stage that are threads. They take turns (the interpreter serves one at a time) and swap at sums."""

        def __init__(self, rank: int, turn: threading.Lock, meet: threading.Barrier, given: dict[int, object]) -> None:
            super().__init__(tp=2, tp_rank=rank)
            self.turn, self.meet, self.given = turn, meet, given

        def both(self, x):
            self.given[self.tp_rank] = x.clone()
            self.wait()
            found = torch.stack([self.given[0], self.given[1]])
            self.wait()
            return found

        def wait(self) -> None:
            self.turn.release()
            self.meet.wait(120)
            self.turn.acquire()

        def reduce(self, x):
            return self.both(x).sum(0)

        def gather(self, x):
            return self.both(x)

    @pytest.mark.parametrize("dtype", [None, "int8", "int4"])
    def test_one_row_on_two_ranks(dtype: str | None) -> None:
        """The body for few rows, whose residual stream joins the sums once; against one rank with plain products."""
        from systems.common.models import ModelShape
        from systems.common.torch_engine.attention import SdpaAttention, TritonAttention
        from systems.common.torch_engine.cache import KVCache
        from systems.common.torch_engine.linear import Linear
        from systems.common.torch_engine.model import Transformer
        from systems.common.torch_engine.numerics import numerics, rope_table
        from systems.common.torch_engine.placement import layout, mlp_unit
        from systems.common.torch_engine.quantised import Quantised, dequantise
        from systems.common.torch_engine.weights import random_weights

        shape = ModelShape("pair", 1, 128, 4, 2, 64, 256, 67, dtype="fp32")
        rope = rope_table(64, 64, numerics(shape), DEVICE)
        slots, token = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([5], device=DEVICE)

        def model(backend, local, weights, links=None):
            cache = KVCache(local, 1, 4, 4, device=DEVICE)
            cache.tables[0] = torch.tensor([3, 1, 4, 2], device=DEVICE)
            return Transformer(local, weights, backend(local, cache, rope), links=links)

        whole = random_weights(shape, 3, DEVICE, dtype=dtype)
        for layer in whole.layers:
            for site in ("qkv", "o", "up", "down"):
                matrix = getattr(layer, site)
                if isinstance(matrix, Quantised):
                    setattr(layer, site, Linear(dequantise(matrix, torch.float32)))
        expected = model(SdpaAttention, shape, whole).forward(token, None, slots, None, None)
        turn, meet, given, found = threading.Lock(), threading.Barrier(2), {}, {}

        def run(rank: int) -> None:
            place = layout(shape, 2).place(shape, rank, mlp_unit(shape, 2, 128 if dtype == "int4" else 1))
            with turn:
                weights = random_weights(shape, 3, DEVICE, place=place, dtype=dtype)
                part = model(TritonAttention, place.local(shape), weights, Pair(rank, turn, meet, given))
                part.skinny = True  # these tiny widths would go to cuBLAS
                logits = part.decode(token, part.attention.cache.lengths, slots)
                found[rank] = part.whole(logits), part.likeliest(logits)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        for logits, likeliest in (found[0], found[1]):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            assert likeliest.tolist() == expected.argmax(-1).tolist()
