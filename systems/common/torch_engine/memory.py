"""Out of memory at start: what was needed, what was there, what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from systems.common.engine.config import EngineConfig
from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.cache import token_bytes
from systems.common.torch_engine.placement import Place


def expected_bytes(shape: ModelShape, place: Place | None, dtype: str | None) -> int:
    """Weights of `place` of `shape`, the layers' matrices in `dtype`; embedding and head shared out among tp ranks."""
    part = shape if place is None else place.local(shape)
    size = {None: part.dtype_bytes, "int8": 1.0, "int4": 0.5 + part.dtype_bytes / 128}[dtype]
    ends = (shape.embedding_parameters + shape.head_parameters) * shape.dtype_bytes
    share = ends if place is None else ends / place.layout.tp * (place.first or place.last)
    return int(part.layers * part.layer_parameters * size + share)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"


def free_bytes() -> int:
    """Free memory of the current GPU, what torch holds unused included; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@contextmanager
def or_say_what_to_lower(shape: ModelShape, place: Place | None, dtype: str | None) -> Iterator[None]:
    """Turn a GPU without room for the weights into one line.

    Raises:
        InputError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        need = expected_bytes(shape, place, dtype)
        free = gib(free_bytes())
        mend = f"its weights need {gib(need)} and ran out with {free} free: use int8 or int4, more ranks or a larger GPU"
        raise InputError("engine", "model", shape.name, mend) from error


def kv_too_large(shape: ModelShape, config: EngineConfig, weights_bytes: int) -> InputError:
    """The error for a KV cache that does not fit beside the weights; `shape` is the rank's."""
    blocks, block_bytes = config.num_gpu_blocks, config.block_tokens * token_bytes(shape, config.kv_dtype)
    need = blocks * block_bytes
    free = free_bytes()
    fits = max(0, int(free // block_bytes))
    mend = (
        f"weights {gib(weights_bytes)}, KV cache {gib(need)}, free {gib(free)}: lower num_gpu_blocks below {fits}"
        if fits > 1
        else f"weights {gib(weights_bytes)}, KV cache {gib(need)}, free {gib(free)}: use int8 or int4 weights, or more ranks"
    )
    return InputError("engine", "num_gpu_blocks", blocks, mend)


@contextmanager
def or_graphs_too_large(shape: ModelShape, config: EngineConfig, weights_bytes: int) -> Iterator[None]:
    """The same while graphs are captured; `shape` is the rank's.

    Raises:
        InputError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        kv = config.num_gpu_blocks * config.block_tokens * token_bytes(shape, config.kv_dtype)
        mend = (
            f"weights {gib(weights_bytes)}, KV cache {gib(kv)}, free {gib(free_bytes())}: "
            f"no room for CUDA graphs, lower it (or max_num_seqs {config.max_num_seqs})"
        )
        raise InputError("engine", "num_gpu_blocks", config.num_gpu_blocks, mend) from error
