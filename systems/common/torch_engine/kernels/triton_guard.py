"""Triton where it is installed; elsewhere stand-ins, so that every kernel file imports on any machine."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    jit: Any = triton.jit
except ImportError:  # a CPU build of torch comes without Triton
    triton, tl, AVAILABLE = None, None, False

    def jit(function: Any = None, **options: Any) -> Any:  # noqa: ANN401, ARG001
        """Leaves a kernel a plain function that nobody calls."""
        return function if function is not None else jit


__all__ = ["AVAILABLE", "jit", "tl", "triton"]
