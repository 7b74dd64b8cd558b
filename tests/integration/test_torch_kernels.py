"""The Triton kernels against plain PyTorch in float64; on a machine without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import math
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
    from systems.common.torch_engine.kernels.add_norm import add_norm
    from systems.common.torch_engine.kernels.grouped_lora import grouped_lora
    from systems.common.torch_engine.kernels.paged_decode import paged_decode, plan
    from systems.common.torch_engine.kernels.paged_prefill import TILE_Q, paged_prefill
    from systems.common.torch_engine.kernels.rope_write import rope_write
    from systems.common.torch_engine.kernels.skinny_linear import Tiling, skinny_linear
    from systems.common.torch_engine.kernels.swiglu import swiglu

    HEADS, KV, D, BLOCK = 6, 2, 16, 16

    def rand(*shape: int):
        return torch.randn(*shape, device=DEVICE)

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def off(out, expected) -> float:
        assert not torch.isnan(out).any()
        return float((out.double() - expected.double()).norm() / expected.double().norm())

    def rotate(x, positions, rope):
        cos, sin = rope[positions, None, : D // 2].double(), rope[positions, None, D // 2 :].double()
        a, b = x.double()[..., : D // 2], x.double()[..., D // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def cache(lengths: list[int]):
        """A filled cache for sequences of `lengths`, and tables of shuffled blocks."""
        blocks = 1 + sum(-(-(n + 1) // BLOCK) for n in lengths)
        k, v = rand(blocks, KV, BLOCK, D), rand(blocks, KV, BLOCK, D)
        order = (torch.randperm(blocks - 1) + 1).tolist()
        tables = torch.zeros(len(lengths) + 1, max(-(-(n + 1) // BLOCK) for n in lengths), dtype=torch.int32, device=DEVICE)
        for slot, n in enumerate(lengths):
            for i in range(-(-(n + 1) // BLOCK)):
                tables[slot, i] = order.pop()
        return k, v, tables

    def gather(x, tables, slot: int, n: int):
        return x[tables[slot].long()].permute(1, 0, 2, 3).reshape(KV, -1, D)[:, :n]

    def attend(q, k, v):
        """q [heads, D] over k, v [KV, n, D]."""
        k, v = (t.double().repeat_interleave(HEADS // KV, 0) for t in (k, v))
        weight = torch.softmax((q.double()[:, None] * k).sum(-1) / D**0.5, -1)
        return (weight[..., None] * v).sum(1)

    def test_add_norm() -> None:
        x, delta, gain = rand(5, 48), rand(5, 48), rand(48)
        total = (x + delta).clone()
        h = add_norm(x, delta, gain, 1e-5)
        assert torch.equal(x, total)
        assert off(h, rms(total.double()) * gain) < 1e-5
        assert off(add_norm(x, None, gain, 1e-5), rms(total.double()) * gain) < 1e-5

    def test_swiglu() -> None:
        both = rand(3, 96)
        assert off(swiglu(both), torch.nn.functional.silu(both.double()[:, :48]) * both[:, 48:]) < 1e-5

    @pytest.mark.parametrize(("rows", "dot"), [(1, False), (1, True), (5, True), (17, True)])
    def test_skinny_linear(rows: int, dot: bool) -> None:
        tiling = Tiling(16, 32, dot=dot)
        x, weight, bias, gain, residual = rand(rows, 64), rand(48, 64), rand(48), rand(64), rand(rows, 48)
        plain = x.double() @ weight.double().T
        assert off(skinny_linear(x, weight, tiling, bias=bias), plain + bias) < 1e-5
        out = residual.clone()
        skinny_linear(x, weight, tiling, residual=out, out=out)
        assert off(out, plain + residual) < 1e-5
        both = (rms(x.double()) * gain) @ weight.double().T
        gated = torch.nn.functional.silu(both[:, :24]) * both[:, 24:]
        assert off(skinny_linear(x, weight, tiling, norm=gain, gated=True), gated) < 1e-5

    @pytest.mark.parametrize("programs", [2, 12, 40])
    @pytest.mark.parametrize("roped", [True, False])
    def test_paged_decode(programs: int, roped: bool) -> None:
        lengths = [0, 1, 15, 16, 40, 170]
        k, v, tables = cache(lengths)
        rope = rand(180, D) if roped else None
        slots = torch.tensor([4, 0, 3, 5, 1, 2], device=DEVICE)
        device_lengths = torch.tensor([*lengths, 0], dtype=torch.int32, device=DEVICE)
        qkv = rand(6, (HEADS + 2 * KV) * D)
        k_before, v_before = k.clone(), v.clone()
        arrived = torch.zeros(7, KV, dtype=torch.int32, device=DEVICE)
        made = plan(device_lengths, slots, KV, arrived, programs, compiled=(16, 4, 2))
        out = paged_decode(qkv, k, v, tables, device_lengths, slots, rope, HEADS, D**-0.5, made)
        assert not arrived.any()
        for row, slot in enumerate(slots.tolist()):
            n = lengths[slot]
            heads = qkv[row].view(-1, D)[None]
            place = torch.tensor([n], device=DEVICE)
            qk = rotate(heads[:, : HEADS + KV], place, rope)[0] if roped else heads[0, : HEADS + KV]
            new_v = heads[0, HEADS + KV :]
            keys = torch.cat([gather(k_before, tables, slot, n), qk[HEADS:, None]], 1)
            values = torch.cat([gather(v_before, tables, slot, n), new_v[:, None]], 1)
            assert off(out[row].view(HEADS, D), attend(qk[:HEADS], keys, values)) < 1e-5
            assert off(gather(k, tables, slot, n + 1), keys) < 1e-5
            assert off(gather(v, tables, slot, n + 1), values) < 1e-5

    @pytest.mark.parametrize("lengths", [[0], [5], [64] * 9, [1000, 3, 3, 3], [17, 300, 0, 90, 700], list(range(0, 600, 7))])
    @pytest.mark.parametrize("programs", [2, 64, 528])
    def test_the_shares_of_a_plan_cover_every_context_evenly(lengths: list[int], programs: int) -> None:
        rows, tile = len(lengths), 16
        slots = torch.arange(rows, device=DEVICE).flip(0)
        device_lengths = torch.tensor([*lengths, 0], dtype=torch.int32, device=DEVICE)
        made = plan(device_lengths, slots, KV, torch.zeros(rows, KV, dtype=torch.int32, device=DEVICE), programs, (tile, 4, 2))
        starts = made.starts.tolist()
        assert starts[0] == 0 and starts[-1] <= len(made.owner)
        even = max(1, -(-sum(lengths) * KV // programs // tile)) * tile + tile
        for row, past in enumerate(lengths[::-1]):
            count = starts[row + 1] - starts[row]
            assert made.owner[starts[row] : starts[row + 1]].tolist() == [row] * count
            share = math.ceil(math.ceil(past / count) / tile) * tile
            assert count >= 1 and share * count >= past and share <= even

    def test_rope_write_and_paged_prefill() -> None:
        past, new = [0, 20, 7], [5, 30, TILE_Q + 9]
        k, v, tables = cache([a + b for a, b in zip(past, new, strict=True)])
        rope = rand(200, D)
        starts = [0, 5, 35]
        positions = torch.tensor(
            [p + i for p, n in zip(past, new, strict=True) for i in range(n)], device=DEVICE, dtype=torch.int32
        )
        slots = torch.tensor([s for s, n in enumerate(new) for _ in range(n)], device=DEVICE)
        qkv = rand(sum(new), (HEADS + 2 * KV) * D)
        plain = qkv.clone().view(-1, HEADS + 2 * KV, D)
        rotated = rotate(plain[:, : HEADS + KV], positions.long(), rope)
        rope_write(qkv, k, v, tables, positions, slots, rope, HEADS)
        assert off(qkv.view(-1, HEADS + 2 * KV, D)[:, : HEADS + KV], rotated) < 1e-5
        tiles = torch.tensor([(c, t) for c, n in enumerate(new) for t in range(0, n, TILE_Q)], dtype=torch.int32, device=DEVICE)
        chunks = torch.tensor(list(zip(starts, past, new, range(3), strict=True)), dtype=torch.int32, device=DEVICE)
        out = paged_prefill(qkv, k, v, tables, tiles, chunks, HEADS, D**-0.5)
        for c in range(3):
            keys, values = gather(k, tables, c, past[c] + new[c]), gather(v, tables, c, past[c] + new[c])
            assert off(keys[:, past[c] :], rotated[starts[c] : starts[c] + new[c], HEADS:].transpose(0, 1)) < 1e-5
            assert torch.equal(values[:, past[c] :], plain[starts[c] : starts[c] + new[c], HEADS + KV :].transpose(0, 1))
            for i in (0, new[c] // 2, new[c] - 1):
                seen = past[c] + i + 1
                expected = attend(rotated[starts[c] + i, :HEADS], keys[:, :seen], values[:, :seen])
                assert off(out[starts[c] + i].view(HEADS, D), expected) < 1e-5

    @pytest.mark.parametrize("outer", [64, 48])
    def test_grouped_lora(outer: int) -> None:
        ends = (32, 48, 64) if outer == 64 else (48,)
        parts, rank, inner = len(ends), 16, 64
        a, b = rand(4, parts * rank, inner), rand(4, outer, rank)
        of_slot = torch.tensor([2, 0, 1, 3, 0], device=DEVICE)

        def expected(x, owner):
            rows = []
            for t in range(len(x)):
                if (adapter := int(of_slot[owner[t]])) == 0:
                    rows.append(torch.zeros(outer, device=DEVICE, dtype=torch.float64))
                    continue
                low = (a[adapter].double() @ x[t].double()).view(parts, rank)
                edges = zip((0, *ends), ends, strict=False)
                rows.append(torch.cat([b[adapter, i:j].double() @ low[p] for p, (i, j) in enumerate(edges)]))
            return torch.stack(rows)

        new, owners = [5, TILE_Q + 9, 3], [0, 3, 1]
        x, y = rand(sum(new), inner), rand(sum(new), outer)
        before = y.clone()
        tiles = torch.tensor([(c, t) for c, n in enumerate(new) for t in range(0, n, TILE_Q)], device=DEVICE)
        chunks = torch.tensor([(0, 7, 5, 0), (5, 0, TILE_Q + 9, 3), (TILE_Q + 14, 0, 3, 1)], device=DEVICE)
        grouped_lora(y, x, a, b, ends, of_slot, tiles, chunks, TILE_Q)
        assert off(y - before, expected(x, [o for o, n in zip(owners, new, strict=True) for _ in range(n)])) < 1e-4

    def test_the_model_with_all_kernels_equals_the_reference() -> None:
        """Prompts and decode steps with adapters: norms, activations, attention and low-rank products by Triton."""
        from systems.common.models import model
        from systems.common.torch_engine.attention import Chunks, SdpaAttention, TritonAttention
        from systems.common.torch_engine.cache import KVCache
        from systems.common.torch_engine.lora import AdapterBank, random_adapter
        from systems.common.torch_engine.model import Transformer
        from systems.common.torch_engine.numerics import numerics, rope_table
        from systems.common.torch_engine.weights import random_weights

        shape = model("tiny")
        weights = random_weights(shape, 3, DEVICE)
        adapter = random_adapter(shape, 16, 1, device=DEVICE)
        rope = rope_table(shape.head_dim, 64, numerics(shape), DEVICE)
        found = []
        for backend, lora in ((SdpaAttention, "bmm"), (TritonAttention, "triton")):
            cache = KVCache(shape, 3, 12, 4, device=DEVICE)
            cache.tables[:3] = (torch.arange(12, device=DEVICE) * 5 % 12 + 1).view(3, 4)
            bank = AdapterBank(shape, 1, 16, 3, device=DEVICE, backend=lora)
            bank.load("a", adapter)
            bank.of_slot[1] = 1
            transformer = Transformer(shape, weights, backend(shape, cache, rope), adapters=bank)
            transformer.adapted = True
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(0, shape.vocab, (60,), generator=generator).to(DEVICE)
            none = torch.empty(0, dtype=torch.int64, device=DEVICE)
            logits = [transformer.forward(tokens[:40], None, none, Chunks.of([0, 0], [30, 10], [0, 1], DEVICE), None)]
            cache.lengths[:2] = torch.tensor([30, 10], device=DEVICE)
            slots = torch.tensor([1, 0], device=DEVICE)
            chunks = Chunks.of([0], [18], [2], DEVICE)
            logits.append(transformer.forward(tokens[40:60], None, slots, chunks, None))
            found.append(torch.cat(logits))
        assert transformer.fused
        assert off(found[1], found[0]) < 1e-4
