"""The attention kernels over an int8 cache against float64; on a machine without a GPU they run in Triton's interpreter."""

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
    from systems.common.models import model
    from systems.common.torch_engine.attention import Chunks, SdpaAttention, TritonAttention
    from systems.common.torch_engine.cache import KVCache, rounded, unrounded
    from systems.common.torch_engine.kernels.integers import scale_of, signed, whole
    from systems.common.torch_engine.kernels.paged_decode import paged_decode, plan
    from systems.common.torch_engine.kernels.rope_write import rope_write
    from systems.common.torch_engine.kernels.triton_guard import jit, tl
    from systems.common.torch_engine.model import Transformer
    from systems.common.torch_engine.numerics import numerics, rope_table
    from systems.common.torch_engine.weights import random_weights

    HEADS, KV, D, BLOCK = 6, 2, 16, 16

    def off(out, expected) -> float:
        assert not torch.isnan(out).any()
        return float((out.double() - expected.double()).norm() / expected.double().norm())

    @jit
    def _row(x, kept, scale, back, D: tl.constexpr):  # noqa: N803
        d = tl.arange(0, D)
        value = tl.load(x + d)
        step = scale_of(tl.max(tl.abs(value), 0))
        tl.store(scale, step)
        tl.store(kept + d, whole(value, step).to(tl.int8))
        tl.store(back + d, signed(whole(value, step).to(tl.int8)))

    @pytest.mark.parametrize("size", [0.0, 1e-7, 1.0, 1e4, 1e9])
    def test_rows_are_rounded_as_plain_pytorch_does(size: float) -> None:
        x = torch.randn(64, device=DEVICE) * size
        kept, scale = torch.empty(64, dtype=torch.int8, device=DEVICE), torch.empty(1, dtype=torch.float16, device=DEVICE)
        back = torch.empty(64, device=DEVICE)
        _row[(1,)](x, kept, scale, back, D=64)
        expected, step = rounded(x)
        assert torch.equal(scale[0], step) and torch.equal(back, kept.float())
        assert int((kept.int() - expected.int()).abs().max()) <= int(CUDA)  # a GPU's division may be off by an ulp

    @pytest.mark.parametrize("roped", [True, False])
    def test_stores_and_attention_of_new_tokens(roped: bool) -> None:
        """`rope_write` on prompts, then `paged_decode` over what it stored."""
        lengths = [1, 15, 40, 70]
        rope = torch.randn(80, D, device=DEVICE) if roped else None
        blocks = 1 + sum(-(-(n + 1) // BLOCK) for n in lengths)
        k, v = (torch.zeros(blocks, KV, BLOCK, D, dtype=torch.int8, device=DEVICE) for _ in range(2))
        scales = tuple(torch.zeros(blocks, KV, BLOCK, dtype=torch.float16, device=DEVICE) for _ in range(2))
        tables = torch.zeros(len(lengths) + 1, 5, dtype=torch.int32, device=DEVICE)
        order = (torch.randperm(blocks - 1) + 1).tolist()
        for slot, n in enumerate(lengths):
            for i in range(-(-(n + 1) // BLOCK)):
                tables[slot, i] = order.pop()
        slots = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)], device=DEVICE)
        positions = torch.tensor([i for n in lengths for i in range(n)], device=DEVICE)
        qkv = torch.randn(len(slots), (HEADS + 2 * KV) * D, device=DEVICE)
        before = qkv.clone()
        rope_write(qkv, k, v, tables, positions, slots, rope, HEADS, scales)

        def turned(x, positions):
            heads = x.view(len(x), -1, D)
            if rope is None:
                return heads
            cos, sin = rope[positions, None, : D // 2], rope[positions, None, D // 2 :]
            a, b = heads[..., : D // 2], heads[..., D // 2 :]
            both = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            return torch.cat([both[:, : HEADS + KV], heads[:, HEADS + KV :]], 1)

        expected = turned(before, positions)
        kept = qkv.view(len(qkv), -1, D)
        assert off(kept[:, :HEADS], expected[:, :HEADS]) < 1e-5
        assert off(kept[:, HEADS:], unrounded(*rounded(expected[:, HEADS:]), torch.float32)) < 1e-3

        def held(slot: int, n: int):
            found = [
                unrounded(c[tables[slot].long()], s[tables[slot].long()], torch.float64).transpose(0, 1).flatten(1, 2)[:, :n]
                for c, s in zip((k, v), scales, strict=True)
            ]
            return found[0], found[1]

        for slot, n in enumerate(lengths):  # the cache holds what qkv has been made to hold
            mine = kept[slots == slot].double()
            for x, y in zip(held(slot, n), (mine[:, HEADS : HEADS + KV], mine[:, HEADS + KV :]), strict=True):
                assert off(x.transpose(0, 1), y) < 1e-6
        rows = torch.tensor([2, 0, 3, 1], device=DEVICE)
        device_lengths = torch.tensor([*lengths, 0], dtype=torch.int32, device=DEVICE)
        fresh = torch.randn(4, (HEADS + 2 * KV) * D, device=DEVICE)
        for programs in (2, 12):
            arrived = torch.zeros(5, KV, dtype=torch.int32, device=DEVICE)
            made = plan(device_lengths, rows, KV, arrived, programs, compiled=(16, 4, 2))
            out = paged_decode(fresh, k, v, tables, device_lengths, rows, rope, HEADS, D**-0.5, made, scales)
            for row, slot in enumerate(rows.tolist()):
                n = lengths[slot]
                q = turned(fresh, torch.tensor(lengths, device=DEVICE)[rows])[row, :HEADS].double()
                keys, values = (x.repeat_interleave(HEADS // KV, 0) for x in held(slot, n + 1))
                weight = torch.softmax((q[:, None] * keys).sum(-1) / D**0.5, -1)
                assert off(out[row].view(HEADS, D), (weight[..., None] * values).sum(1)) < 1e-5

    def test_the_model_with_all_kernels_equals_plain_pytorch() -> None:
        """Whole prompts, a chunk behind a past, and decode steps."""
        shape = model("tiny")
        weights = random_weights(shape, 3, DEVICE)
        rope = rope_table(shape.head_dim, 64, numerics(shape), DEVICE)
        found, kept = [], []
        for backend in (SdpaAttention, TritonAttention):
            cache = KVCache(shape, 3, 12, 4, device=DEVICE, kv_dtype="int8")
            cache.tables[:3] = (torch.arange(12, device=DEVICE) * 5 % 12 + 1).view(3, 4)
            transformer = Transformer(shape, weights, backend(shape, cache, rope))
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(0, shape.vocab, (70,), generator=generator).to(DEVICE)
            none = torch.empty(0, dtype=torch.int64, device=DEVICE)
            logits = [transformer.forward(tokens[:40], None, none, Chunks.of([0, 0], [30, 10], [0, 1], DEVICE), None)]
            cache.lengths[:2] = torch.tensor([30, 10], device=DEVICE)
            slots, chunks = torch.tensor([1, 0], device=DEVICE), Chunks.of([0], [18], [2], DEVICE)
            logits.append(transformer.forward(tokens[40:60], None, slots, chunks, None))
            logits.append(transformer.forward(tokens[60:], None, none, Chunks.of([18], [10], [2], DEVICE), None))
            found.append(torch.cat(logits))
            kept.append(unrounded(cache.k, cache.k_scale, torch.float32)[:, 1:])
        assert off(kept[1], kept[0]) < 1e-3  # a number that lies between two steps may fall either way
        assert off(found[1], found[0]) < 1e-3
