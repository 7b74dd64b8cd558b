# mypy: disable-error-code="no-untyped-call, no-any-return"
"""FlashInfer's paged kernels (https://docs.flashinfer.ai, read from flashinfer-python 0.6.7), where that package is installed.

Our cache of one layer, [blocks, kv_heads, block_tokens, head_dim], is FlashInfer's layout HND as it is. Keys are rotated and
stored by our own kernel first. FlashInfer cuts the work on the host before every step, from block tables and lengths there
(`mirror`): decode steps by a wrapper for each graph's size, whose buffers the graph reads; batches with prompts have no graph.
"""

from __future__ import annotations

from importlib import import_module, util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from systems.common.models import ModelShape
from systems.common.torch_engine.attention.base import Chunks, heads_of
from systems.common.torch_engine.attention.mirror import Mirror
from systems.common.torch_engine.cache import KVCache
from systems.common.torch_engine.kernels import triton_guard
from systems.common.torch_engine.kernels.rope_write import rope_write

WORKSPACE_BYTES = 384 << 20
"""Partial results of split contexts, shared by all wrappers as their kernels run one after another: 512 rows of 32 heads of 128
need 256 MiB."""
HEAD_DIMS = (64, 128, 256)
LAYOUT = "HND"


class FlashInferAttention:
    """See the module.

    Attributes:
        mirror: block tables and lengths on the host, kept by the device half.
    """

    name = "flashinfer"
    graphs = (True, False)
    mirror: Mirror | None

    def __init__(self, shape: ModelShape, cache: KVCache, rope: Tensor | None, prefill: str = "auto") -> None:
        """`prefill`: FlashInfer's own choice of kernels for prompts: auto, fa2 or fa3."""
        self.shape, self.cache, self.rope = shape, cache, rope
        self.mirror = Mirror(len(cache.lengths) - 1, cache.tables.shape[1], cache.block_tokens)
        self._library: Any = import_module("flashinfer")
        self._device = cache.k.device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        self._eager = self._decoder()
        self._by_size: dict[int, Any] = {}
        self._prefill = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT, backend=prefill)
        self._now, self._positions = self._eager, cache.lengths
        self._copied: dict[int, torch.cuda.Event] = {}

    @staticmethod
    def lacks(shape: ModelShape, cache: KVCache) -> str | None:
        """What it would need; None where it can run."""
        if not (util.find_spec("flashinfer") and triton_guard.AVAILABLE and cache.k.device.type == "cuda"):
            return "the package flashinfer-python, Triton and a GPU"
        if cache.k_scale is not None:
            return "the cache in the model's own format, not in int8"
        if cache.dtype == torch.float32 or shape.head_dim not in HEAD_DIMS:
            return f"bf16 or fp16, and heads of {', '.join(map(str, HEAD_DIMS))}"
        return None

    def warm(self, tokens: int) -> None:
        """Have the kernels for prompts compiled (those for decode steps are, when their graphs are captured)."""
        assert self.mirror is not None
        self._plan_prefill(np.array([(0, 0, min(tokens, self.mirror.block_tokens), self.mirror.pad_slot)], np.int32))

    # ---- decode

    def plan(self, rows: int, graph: bool) -> None:
        """See `Attention`."""
        mirror, shape = self.mirror, self.shape
        assert mirror is not None
        if graph and rows not in self._by_size:
            self._by_size[rows] = self._decoder(rows)
        self._now = self._by_size[rows] if graph else self._eager
        slots = mirror.rows[:rows]
        starts, blocks, last = mirror.pages(slots, mirror.lengths[slots] + 1)
        self._wait(self._now)
        self._now.plan(
            torch.from_numpy(starts), self._on_device(blocks), torch.from_numpy(last), shape.heads, shape.kv_heads,
            shape.head_dim, mirror.block_tokens, q_data_type=self.cache.dtype, kv_data_type=self.cache.dtype,
            sm_scale=shape.head_dim**-0.5,
        )  # fmt: skip
        self._note(self._now)

    def decode(self, qkv: Tensor, layer: int, slots: Tensor) -> Tensor:
        """See `Attention`. `plan` comes before."""
        if layer == 0:  # the layers of one step have the same positions
            self._positions = self.cache.lengths[slots]
        return self._now.run(self._stored(qkv, layer, self._positions, slots), self._pages(layer)).view(len(qkv), -1)

    def _decoder(self, rows: int | None = None) -> Any:  # noqa: ANN401 - the library's wrapper
        """A wrapper for decode steps: of `rows` rows by graph, or of any number."""
        tensor_cores = self.shape.heads // self.shape.kv_heads >= 4  # FlashInfer's advice for grouped queries
        make = self._library.BatchDecodeWithPagedKVCacheWrapper
        if rows is None:
            return make(self._workspace, LAYOUT, use_tensor_cores=tensor_cores)
        width = min(rows * self.cache.tables.shape[1], self.cache.k.shape[1] + rows)  # rows that pad share a block
        starts, blocks, last = (torch.zeros(n, dtype=torch.int32, device=self._device) for n in (rows + 1, width, rows))
        return make(
            self._workspace, LAYOUT, use_cuda_graph=True, use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=starts,
            paged_kv_indices_buffer=blocks, paged_kv_last_page_len_buffer=last,
        )  # fmt: skip

    # ---- prompts

    def prefill(self, qkv: Tensor, layer: int, chunks: Chunks) -> Tensor:
        """See `Attention`."""
        assert chunks.host is not None, "no graph holds FlashInfer's kernels for prompts"
        if layer == 0:
            self._plan_prefill(chunks.host)
        q = self._stored(qkv, layer, chunks.positions, chunks.slots)
        return self._prefill.run(q, self._pages(layer)).view(len(qkv), -1)

    def _plan_prefill(self, chunks: NDArray[np.int32]) -> None:
        mirror, shape = self.mirror, self.shape
        assert mirror is not None
        past, new, slots = chunks[:, 1], chunks[:, 2], chunks[:, 3].astype(np.int64)
        starts, blocks, last = mirror.pages(slots, past + new)
        begins = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        self._wait(self._prefill)
        self._prefill.plan(
            torch.from_numpy(begins), torch.from_numpy(starts), self._on_device(blocks), torch.from_numpy(last),
            shape.heads, shape.kv_heads, shape.head_dim, mirror.block_tokens, causal=True, sm_scale=shape.head_dim**-0.5,
            q_data_type=self.cache.dtype, kv_data_type=self.cache.dtype,
        )  # fmt: skip
        self._note(self._prefill)

    # ---- both

    def _stored(self, qkv: Tensor, layer: int, positions: Tensor, slots: Tensor) -> Tensor:
        """Rotate q and k, store k and v; q."""
        cache = self.cache
        rope_write(qkv, cache.k[layer], cache.v[layer], cache.tables, positions, slots, self.rope, self.shape.heads)
        return heads_of(qkv, self.shape)[0]

    def _pages(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.k[layer], self.cache.v[layer]

    def _on_device(self, blocks: NDArray[np.int32]) -> Tensor:
        host = torch.from_numpy(blocks)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def _wait(self, wrapper: object) -> None:
        """Until its last plan has left the host: a wrapper makes all its plans in one pinned buffer, and launches run ahead."""
        if (copied := self._copied.get(id(wrapper))) is not None:
            copied.synchronize()

    def _note(self, wrapper: object) -> None:
        if self._device.type == "cuda":
            self._copied[id(wrapper)] = torch.cuda.Event()
            self._copied[id(wrapper)].record()
