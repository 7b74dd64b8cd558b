"""How many KV blocks a testbed leaves for serving."""

from __future__ import annotations

from systems.common.errors import InputError
from systems.common.hardware import Testbed
from systems.common.models import ModelShape

ACTIVATION_BYTES = 10**9
"""Peak activations of vLLM's profiling run per GPU, about 1 GB for 2,048 batched tokens (llmstation sheet, 7.1)."""


def kv_blocks(shape: ModelShape, testbed: Testbed, tp: int, utilisation: float, block_tokens: int = 16) -> int:
    """KV blocks of `block_tokens` tokens over `tp` GPUs, when serving may use the share `utilisation` of their memory.

    An estimate from datasheet sizes: a real engine reports what it resolved, and that number is to be preferred.

    Raises:
        InputError: the weights and activations alone do not fit.
    """
    per_gpu = testbed.gpu.memory_bytes * utilisation - shape.weight_bytes / tp - ACTIVATION_BYTES
    blocks = int(per_gpu * tp // (shape.kv_bytes_per_token * block_tokens))
    if blocks < 1:
        raise InputError(
            f"hardware {testbed.name}",
            "gpu_memory_utilisation",
            utilisation,
            f"{shape.name} does not fit on {tp} GPU(s): raise it, or use more or larger GPUs",
        )
    return blocks
