# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""SwiGLU's backward pass (its forward is serving's own kernel).

out = silu(gate) * up;  dgate = dout * up * s * (1 + gate * (1 - s)),  dup = dout * silu(gate),  s = sigmoid(gate)

both, dboth: [tokens, 2 width] (gate | up); dout: [tokens, width]. Bytes floor: 5 * tokens * width * size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _backward(both, dout, dboth, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < width
    gate = tl.load(both + row * 2 * width + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, mask=live, other=0.0).to(tl.float32)
    grad = tl.load(dout + row * width + at, mask=live, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    dtype = dboth.dtype.element_ty
    tl.store(dboth + row * 2 * width + at, (grad * up * s * (1 + gate * (1 - s))).to(dtype), mask=live)
    tl.store(dboth + row * 2 * width + width + at, (grad * gate * s).to(dtype), mask=live)


def swiglu_backward(both: Tensor, dout: Tensor) -> Tensor:
    """Gradient of gate | up; contiguous inputs."""
    tokens, width = dout.shape
    dboth = torch.empty_like(both)
    block = min(2048, triton.next_power_of_2(width))
    _backward[(tokens, triton.cdiv(width, block))](both, dout, dboth, width, BLOCK=block, num_warps=8)
    return dboth
