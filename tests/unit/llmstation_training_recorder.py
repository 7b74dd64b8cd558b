"""A stand-in for CUDA graphs on a CPU: operations are recorded with their tensors and done again into the same memory."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Every operation with its arguments and results; a replay does them again into the same memory, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, old in self.done:
                new = func(*args, **kwargs)
                for was, now in zip(tree_leaves(old), tree_leaves(new), strict=True):
                    if isinstance(was, torch.Tensor) and was.data_ptr() != now.data_ptr():
                        was.copy_(now)


class Recorder:
    """A stand-in for CUDA graphs."""

    @contextmanager
    def session(self, warm):
        warm()
        yield

    def record(self, work):
        with Recording() as recording:
            work()
        return recording.replay
