"""The two streams of one GPU, and marks on them; on a CPU, where nothing overlaps, the same with a clock.

A mark is put behind the work that is on a lane now. It says whether that work has ended, and two marks how far apart.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in the work of a lane."""

    def done(self) -> bool:
        """Whether the work before it has ended."""
        ...

    def wait(self) -> None:
        """Block until it has."""
        ...

    def after_s(self, earlier: Mark) -> float:
        """Seconds from `earlier` to this one (negative if it came first); both must be done."""
        ...


class Lanes(Protocol):
    """Where serving and tuning put their work."""

    overlaps: bool
    """Whether work on the two lanes can run at the same time."""

    def serving(self) -> AbstractContextManager[object]:
        """Work launched inside goes to the serving lane."""
        ...

    def tuning(self) -> AbstractContextManager[object]:
        """Work launched inside goes to the tuning lane."""
        ...

    def mark(self, tuning: bool) -> Mark:
        """A mark behind what is on that lane now."""
        ...

    def gate(self, mark: Mark) -> None:
        """Later work on the tuning lane waits for `mark`."""
        ...

    def hold(self, mark: Mark) -> None:
        """Later work on the serving lane waits for `mark`."""
        ...


class CudaMark:
    """A CUDA event."""

    __slots__ = ("event",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def done(self) -> bool:
        """Whether the work before it has ended."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Block until it has."""
        self.event.synchronize()

    def after_s(self, earlier: Mark) -> float:
        """Seconds from `earlier` to this one."""
        assert isinstance(earlier, CudaMark)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaLanes:
    """Serving on a stream of high priority, tuning on another; optionally tuning on `sms` SMs only (a green context)."""

    overlaps = True

    def __init__(self, sms: int | None = None) -> None:
        from systems.common.gpu.green import limited_stream

        self.notes: tuple[str, ...] = ()
        self._serving = torch.cuda.Stream(priority=-1)
        self._tuning, note = (_own_stream(), "") if sms is None else limited_stream(sms)
        if note:
            self.notes = (note,)
        for stream in (self._serving, self._tuning):
            stream.wait_stream(torch.cuda.current_stream())

    def serving(self) -> AbstractContextManager[object]:
        """Work launched inside goes to the serving stream."""
        return torch.cuda.stream(self._serving)

    def tuning(self) -> AbstractContextManager[object]:
        """Work launched inside goes to the tuning stream."""
        return torch.cuda.stream(self._tuning)

    def mark(self, tuning: bool) -> Mark:
        """An event behind what is on that stream now."""
        return CudaMark(self._tuning if tuning else self._serving)

    def gate(self, mark: Mark) -> None:
        """Later work on the tuning stream waits for `mark`."""
        assert isinstance(mark, CudaMark)
        self._tuning.wait_event(mark.event)

    def hold(self, mark: Mark) -> None:
        """Later work on the serving stream waits for `mark`."""
        assert isinstance(mark, CudaMark)
        self._serving.wait_event(mark.event)


def _own_stream() -> torch.cuda.Stream:
    """A stream that no graph is captured on: torch deals streams out in turn, and cuBLAS keeps one workspace for each."""
    from systems.common.torch_engine.graphs import captured_on

    stream = torch.cuda.Stream()
    while stream == torch.cuda.graph.default_capture_stream or captured_on(stream):
        stream = torch.cuda.Stream()
    return stream


class HostMark:
    """A time: on a CPU work has ended when the call that does it returns."""

    __slots__ = ("at_s",)

    def __init__(self) -> None:
        self.at_s = time.perf_counter()

    def done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def after_s(self, earlier: Mark) -> float:
        """Seconds from `earlier` to this one."""
        assert isinstance(earlier, HostMark)
        return self.at_s - earlier.at_s


class HostLanes:
    """A CPU: both lanes are the calling thread."""

    overlaps = False

    def serving(self) -> AbstractContextManager[object]:
        """Nothing to switch."""
        return nullcontext()

    def tuning(self) -> AbstractContextManager[object]:
        """Nothing to switch."""
        return nullcontext()

    def mark(self, tuning: bool) -> Mark:
        """Now."""
        return HostMark()

    def gate(self, mark: Mark) -> None:
        """Nothing runs ahead."""

    def hold(self, mark: Mark) -> None:
        """Nothing runs ahead."""


def lanes_of(device: torch.device, sms: int | None = None) -> Lanes:
    """The lanes of `device`."""
    return CudaLanes(sms) if device.type == "cuda" else HostLanes()
