"""Streams that run on some of the SMs only (CUDA green contexts), fail-soft.

Through cuda-bindings, whose driver calls are stable; torch's own `GreenContext` is beta and in 2.11 gives no stream of its
own. Where none is to be had the stream is an ordinary one and the note says why: a run must say that its SM limit did not hold.
"""

from __future__ import annotations

from typing import Any

import torch

_KEPT: list[object] = []
"""Contexts live as long as the process: a stream of theirs may be in use."""


def limited_stream(sms: int) -> tuple[torch.cuda.Stream, str]:
    """A stream whose kernels run on `sms` SMs (rounded up to what the GPU can split off), and an empty note.

    Where that fails: an ordinary stream, and a note that says why.
    """
    try:
        return _green_stream(sms), ""
    except Exception as error:  # whatever a young API raises: the run goes on without the limit, and says so
        return torch.cuda.Stream(), f"no SM limit on tuning: {type(error).__name__}: {error}"


def _green_stream(sms: int) -> torch.cuda.Stream:
    from cuda.bindings import driver

    torch.cuda.current_stream()  # the primary context exists
    device = _checked(driver.cuDeviceGet(torch.cuda.current_device()))
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    whole = _checked(driver.cuDeviceGetDevResource(device, kind))
    parts, _count, _rest = _checked(driver.cuDevSmResourceSplitByCount(1, whole, 0, sms))
    description = _checked(driver.cuDevResourceGenerateDesc(parts[:1], 1))
    context = _checked(driver.cuGreenCtxCreate(description, device, driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM))
    non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    stream = _checked(driver.cuGreenCtxStreamCreate(context, non_blocking, 0))
    _KEPT.extend((context, stream))
    return torch.cuda.ExternalStream(int(stream))


def _checked(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401 - whatever the driver gives
    """What a driver call gave besides its status; raises RuntimeError when that is not success."""
    status, *given = answer
    if int(status) != 0:
        raise RuntimeError(str(status))
    return given[0] if len(given) == 1 else tuple(given)
