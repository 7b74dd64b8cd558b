"""FlashInfer's backend against a stand-in for the library: it checks what it is given as the library does (read from
flashinfer-python 0.6.7) and computes in float64. The real library is checked on a GPU by `benchmarks/attention_backends.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine import attention, graphs  # noqa: E402
from systems.common.torch_engine import model as transformer  # noqa: E402
from systems.common.torch_engine.attention import FlashInferAttention, flashinfer, rotate  # noqa: E402
from systems.common.torch_engine.attention.mirror import Mirror  # noqa: E402
from systems.common.torch_engine.cache import KVCache  # noqa: E402
from systems.common.torch_engine.device import Device  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.sampling import Sampling  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402

SHAPE = model("tiny")
WEIGHTS = random_weights(SHAPE, 7)
torch.set_num_threads(1)


class Wrapper:
    """What both of the library's wrappers have in common. Layout HND; sizes are fixed where buffers are given."""

    made: list[Wrapper] = []

    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert workspace.dtype == torch.uint8 and not workspace.any() and layout == "HND"
        self.plans = self.runs = 0
        Wrapper.made.append(self)

    def _take(self, starts, blocks, last, heads: int, kv_heads: int, head_dim: int, page: int) -> None:
        for x in (starts, blocks, last):
            assert x.dtype == torch.int32 and x.ndim == 1
        assert len(starts) == len(last) + 1 and starts[0] == 0 and int(starts[-1]) == len(blocks)
        assert bool((starts[1:] > starts[:-1]).all()) and bool(((last >= 1) & (last <= page)).all())
        assert starts.device.type == last.device.type == "cpu", "else the plan waits for the device"
        assert heads % kv_heads == 0
        self.sizes = heads, kv_heads, head_dim, page
        self.plans += 1

    def _attend(self, q, pages, begins: list[int], scale: float):
        """Causal attention of the rows begins[i]..begins[i + 1] of q, the last ones of sequence i."""
        heads, kv_heads, head_dim, page = self.sizes
        k, v = pages
        assert q.shape == (begins[-1], heads, head_dim) and k.shape == v.shape and k.shape[1:] == (kv_heads, page, head_dim)
        assert q.stride(-1) == 1 and q.dtype == k.dtype == self.dtype
        out = torch.empty(q.shape, dtype=q.dtype)
        for i, (begin, end) in enumerate(pairwise(begins)):
            mine = self.blocks[int(self.starts[i]) : int(self.starts[i + 1])].long()
            tokens = (len(mine) - 1) * page + int(self.last[i])
            held = (x[mine].transpose(0, 1).flatten(1, 2)[:, :tokens].double() for x in (k, v))
            keys, values = (x.repeat_interleave(heads // kv_heads, 0) for x in held)
            mask = torch.ones(end - begin, tokens, dtype=torch.bool).tril(tokens - (end - begin))
            score = torch.einsum("qhd,hkd->hqk", q[begin:end].double(), keys) * scale
            weight = score.masked_fill(~mask, float("-inf")).softmax(-1)
            out[begin:end] = torch.einsum("hqk,hkd->qhd", weight, values).to(q.dtype)
        self.runs += 1
        return out


class Decode(Wrapper):
    """Stands in for BatchDecodeWithPagedKVCacheWrapper."""

    def __init__(
        self, workspace, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None,
    ) -> None:  # fmt: skip
        super().__init__(workspace, kv_layout)
        self.graph, self.tensor_cores = use_cuda_graph, use_tensor_cores
        if use_cuda_graph:
            self.starts, self.blocks, self.last = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
            assert len(self.starts) == len(self.last) + 1

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, q_data_type, kv_data_type,
        sm_scale,
    ) -> None:  # fmt: skip
        self._take(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size)
        if self.graph:
            assert len(last_page_len) == len(self.last) and len(indices) <= len(self.blocks)
            self.starts.copy_(indptr)
            self.blocks[: len(indices)].copy_(indices)
            self.last.copy_(last_page_len)
        else:
            self.starts, self.blocks, self.last = indptr, indices, last_page_len
        assert q_data_type == kv_data_type
        self.dtype, self.scale = q_data_type, sm_scale

    def run(self, q, paged_kv_cache):
        return self._attend(q, paged_kv_cache, list(range(len(self.last) + 1)), self.scale)


class Prefill(Wrapper):
    """Stands in for BatchPrefillWithPagedKVCacheWrapper."""

    def __init__(self, workspace, kv_layout="NHD", use_cuda_graph=False, *, backend="auto") -> None:
        super().__init__(workspace, kv_layout)
        assert not use_cuda_graph and backend in ("auto", "fa2", "fa3")

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
        page_size, *, causal, sm_scale, q_data_type, kv_data_type,
    ) -> None:  # fmt: skip
        self._take(
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk, page_size
        )
        assert causal and q_data_type == kv_data_type and qo_indptr.dtype == torch.int32
        self.starts, self.blocks, self.last = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.begins, self.dtype, self.scale = qo_indptr.tolist(), q_data_type, sm_scale

    def run(self, q, paged_kv_cache):
        return self._attend(q, paged_kv_cache, self.begins, self.scale)


class Replayed(graphs.Graphs[Any]):
    """Stands in for CUDA graphs."""

    def __init__(self) -> None:
        self._captured: dict[Any, Callable[[], Any]] = {}  # type: ignore[assignment]

    def run(self, key: object) -> Any:
        return self._captured[key]()

    def capture(self, key: object, work: Callable[[], Any]) -> None:
        work()
        self._captured[key] = work


def plain_rope_write(qkv, k_cache, v_cache, tables, positions, slots, rope, heads: int) -> None:
    """`kernels.rope_write` in PyTorch."""
    _, kv, page, width = k_cache.shape
    x, positions, slots = qkv.view(len(qkv), -1, width), positions.long(), slots.long()
    if rope is not None:
        x[:, : heads + kv] = rotate(x[:, : heads + kv], rope[positions])
    blocks = tables[slots, positions // page].long()
    k_cache[blocks, :, positions % page], v_cache[blocks, :, positions % page] = x[:, heads : heads + kv], x[:, heads + kv :]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[Wrapper]:
    """The stand-in in the library's place, and a backend that runs on a CPU."""
    fake = ModuleType("flashinfer")
    fake.BatchDecodeWithPagedKVCacheWrapper, fake.BatchPrefillWithPagedKVCacheWrapper = Decode, Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(FlashInferAttention, "lacks", staticmethod(lambda shape, cache: None))
    monkeypatch.setattr(flashinfer, "rope_write", plain_rope_write)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 64)
    monkeypatch.setattr(transformer, "KERNELS", ())  # norms and activations in PyTorch
    monkeypatch.setattr(graphs, "Graphs", Replayed)
    Wrapper.made = []
    return Wrapper


CONFIGS = {
    "chunked": EngineConfig(200, "chunked-prefill", max_num_batched_tokens=32, max_num_seqs=8),
    "prefill-first": EngineConfig(200, "prefill-first", max_num_batched_tokens=128, max_num_seqs=8),
    "preempting": EngineConfig(9, "chunked-prefill", max_num_batched_tokens=40, max_num_seqs=8),
}


def asked(count: int = 12) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(i, 0.0, int(rng.integers(1, 60)), int(rng.integers(1, 40))) for i in range(count)]


def sampling(request: Request) -> Sampling:
    return Sampling(temperature=0.9 if request.index % 3 == 0 else 0.0, seed=request.index)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_gives_the_tokens_of_plain_attention(name: str, captured: bool, library: type[Wrapper]) -> None:
    """Prompts, chunks, decode steps of changing batches, preemption; sampled rows too; eagerly and by graph."""
    expected = Live.build(SHAPE, WEIGHTS, CONFIGS[name], max_tokens=256, backend="sdpa", sampling=sampling).generate(asked())
    live = Live.build(SHAPE, WEIGHTS, CONFIGS[name], max_tokens=256, backend="flashinfer", sampling=sampling)
    half = live.executor.half
    assert isinstance(half, Device) and half.model.attention.name == "flashinfer"
    if captured:
        half.steps = live.executor.steps = graphs.Steps(half.model, half.cache, 8, True, prompts=half.model.attention.graphs[1])
        assert half.steps.mixed_rows == []
        live.executor.warm()
    sequences, outputs = live.generate(asked())
    assert outputs == expected[1]
    assert name != "preempting" or sum(s.preemptions for s in sequences) > 0
    by_graph = [w for w in library.made if isinstance(w, Decode) and w.graph]
    assert len(by_graph) == (4 if captured else 0)  # sizes 1, 2, 4, 8
    assert all(w.plans for w in by_graph)
    prompts = [w for w in library.made if isinstance(w, Prefill)]
    assert len(prompts) == 1 and prompts[0].runs >= prompts[0].plans - 1  # one plan for all layers; warming plans once
    mirror = half.model.attention.mirror
    assert mirror is not None
    np.testing.assert_array_equal(mirror.lengths, half.cache.lengths.numpy())


def test_scores_a_prompt(library: type[Wrapper]) -> None:
    prompt = np.arange(50) % SHAPE.vocab
    with torch.inference_mode():
        found, expected = (
            Live.build(SHAPE, WEIGHTS, CONFIGS["chunked"], max_tokens=64, backend=name).executor.half.score(prompt)
            for name in ("flashinfer", "sdpa")
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tensor_cores_for_groups_of_four_queries(library: type[Wrapper]) -> None:
    for kv_heads, expected in ((SHAPE.heads, False), (SHAPE.heads // 4 or 1, SHAPE.heads >= 4)):
        shape = replace(SHAPE, kv_heads=kv_heads)
        FlashInferAttention(shape, KVCache(shape, 1, 1, 1), None)
        assert [w.tensor_cores for w in library.made if isinstance(w, Decode)][-1] == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 99))
def test_pages_are_the_blocks_of_each_slot(tokens: list[int], seed: int) -> None:
    mirror, rng = Mirror(8, 16, 4), np.random.default_rng(seed)
    mirror.tables[:8] = rng.permutation(128).reshape(8, 16)
    slots = rng.choice(9, len(tokens), replace=True)
    starts, blocks, last = mirror.pages(slots, np.array(tokens, np.int32))
    assert starts.dtype == blocks.dtype == last.dtype == np.int32
    for i, (slot, count) in enumerate(zip(slots.tolist(), tokens, strict=True)):
        held = max(1, -(-count // 4))
        assert blocks[starts[i] : starts[i + 1]].tolist() == mirror.tables[slot, :held].tolist()
        assert (held - 1) * 4 + last[i] == max(1, count)


def test_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SHAPE, dtype="bf16", head_dim=64)
    with pytest.raises(InputError, match="needs the package flashinfer-python, Triton and a GPU"):
        attention.choose("flashinfer", shape, KVCache(shape, 1, 1, 1), None)
    monkeypatch.setattr(flashinfer.util, "find_spec", lambda name: name)
    monkeypatch.setattr(flashinfer.triton_guard, "AVAILABLE", True)

    class OnGpu(KVCache):
        """Says so."""

        def __init__(self, *a: Any, **b: Any) -> None:
            super().__init__(*a, **b)
            self.k = type("Tensor", (), {"device": torch.device("cuda")})()

    assert FlashInferAttention.lacks(shape, OnGpu(shape, 1, 1, 1)) is None
    assert "int8" in str(FlashInferAttention.lacks(shape, OnGpu(shape, 1, 1, 1, kv_dtype="int8")))
    for other in (replace(shape, dtype="fp32"), replace(shape, head_dim=80)):
        assert "bf16 or fp16, and heads of 64, 128, 256" in str(FlashInferAttention.lacks(other, OnGpu(other, 1, 1, 1)))


def test_auto_takes_what_runs() -> None:
    assert attention.choose("auto", SHAPE, KVCache(SHAPE, 1, 1, 1), None).name == "sdpa"
    assert attention.choose("reference", SHAPE, KVCache(SHAPE, 1, 1, 1), None).name == "sdpa"
