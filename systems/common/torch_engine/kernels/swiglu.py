# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""SwiGLU: silu(gate) * up from the two halves of one product.

    out[t, i] = silu(both[t, i]) * both[t, width + i]         both: [tokens, 2 width], out: [tokens, width]

Bytes floor: 3 * tokens * width * size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _swiglu(both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < width
    gate = tl.load(both + row * 2 * width + at, mask=live).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, mask=live)
    silu = (gate / (1 + tl.exp(-gate))).to(up.dtype)
    tl.store(out + row * width + at, silu * up, mask=live)


def swiglu(both: Tensor) -> Tensor:
    """The gated activation of `both`."""
    tokens, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(tokens, width, dtype=both.dtype, device=both.device)
    block = min(2048, triton.next_power_of_2(width))
    _swiglu[(tokens, triton.cdiv(width, block))](both, out, width, BLOCK=block, num_warps=4 if block < 2048 else 8)
    return out
