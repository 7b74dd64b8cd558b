# ruff: noqa: ANN001, ANN201, N803, SIM300
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Small integers in kernels: int8 to floats by bits, and rows of the KV cache as int8 with a scale (`cache.rounded`).

2^23 + n is n in the lowest bits of 2^23's pattern (in bf16 2^7, in fp16 2^10); conversion instructions run at a quarter of
the rate. The 16-bit forms take two numbers per instruction.
"""

from __future__ import annotations

from systems.common.torch_engine.kernels.triton_guard import jit, tl


@jit
def signed(byte):
    """An int8 as float32."""
    bits = (byte.to(tl.int32) + 128) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@jit
def narrow8(byte, DTYPE: tl.constexpr):
    """An int8 as `DTYPE`."""
    if DTYPE == tl.bfloat16:  # 128 + seven bits, less 128, or 256 where the eighth is set
        bits = byte.to(tl.int16)
        value = ((bits & 0x7F) | 0x4300).to(tl.bfloat16, bitcast=True) - ((bits & 0x80) | 0x4300).to(tl.bfloat16, bitcast=True)
    elif DTYPE == tl.float16:
        value = ((byte.to(tl.int16) + 128) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        value = signed(byte).to(DTYPE)
    return value


@jit
def narrow4(half, DTYPE: tl.constexpr):
    """Four bits, kept plus 8, as `DTYPE`; `half` is int16."""
    if DTYPE == tl.bfloat16:
        value = (half | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    elif DTYPE == tl.float16:
        value = (half | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    else:
        value = ((half.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0).to(DTYPE)
    return value


@jit
def scale_of(most):
    """The float16 scale of a row whose largest number has the size `most`."""
    return tl.minimum(most / 127, 65504.0).to(tl.float16)


@jit
def whole(x, scale):
    """The integers of `x`, as float32."""
    step = scale.to(tl.float32)
    near = tl.floor(x.to(tl.float32) / tl.where(step > 0, step, 1.0) + 0.5)
    return tl.minimum(tl.maximum(near, -127.0), 127.0)
