"""Attention over the paged cache behind one interface: our Triton kernels, FlashInfer, and plain PyTorch (any device).

Rooms: `base` (the interface, and prompt chunks as tensors), one file per backend (`sdpa`, `paged`, `flashinfer`), `mirror`
(what a backend that plans on the host must know there). `choose` decides at start; the backend's `name` is recorded.
"""

from __future__ import annotations

from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.attention.base import Attention, Chunks
from systems.common.torch_engine.attention.flashinfer import FlashInferAttention
from systems.common.torch_engine.attention.paged import TritonAttention
from systems.common.torch_engine.attention.sdpa import SdpaAttention, rotate
from systems.common.torch_engine.cache import KVCache

__all__ = [
    "AUTO", "Attention", "Chunks", "FlashInferAttention", "SdpaAttention", "TritonAttention", "choose", "rotate",
]  # fmt: skip

BACKENDS: dict[str, type[TritonAttention | FlashInferAttention | SdpaAttention]] = {
    "triton": TritonAttention,
    "flashinfer": FlashInferAttention,
    "sdpa": SdpaAttention,
}
AUTO = ("triton", "flashinfer", "sdpa")
"""What `auto` tries, in this order. Our kernels come first because every speed in docs/engine.md was measured with them (decode
steps 0.87 to 0.96 of vLLM's) and they serve all batches by CUDA graph; `benchmarks/attention_backends.py` compares."""
ALIASES = {"reference": "sdpa"}
"""The name that files recorded before 2026-11-21 have."""


def choose(name: str, shape: ModelShape, cache: KVCache, rope: Tensor | None) -> Attention:
    """The backend called `name`; `auto` takes the first of `AUTO` that can run here.

    Raises InputError for a name that there is none of, or that cannot run here.
    """
    name = ALIASES.get(name, name)
    if name == "auto":
        name = next(one for one in AUTO if BACKENDS[one].lacks(shape, cache) is None)
    if name not in BACKENDS:
        raise InputError("engine", "attention", name, f"use auto or one of {', '.join(BACKENDS)}")
    if (lack := BACKENDS[name].lacks(shape, cache)) is not None:
        raise InputError("engine", "attention", name, f"needs {lack}: use auto or sdpa")
    return BACKENDS[name](shape, cache, rope)
