# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Steps as CUDA graphs: decode steps by bucket of batch sizes, small batches with prompts by bucket of rows and tokens.

A graph reads its inputs from static buffers and everything else (tokens, lengths, block tables) from the cache by slot,
chooses the next tokens and moves the lengths, all on the device: step n + 1 can be launched while step n runs. Rows that only
fill a bucket point to the padding slot. Without graphs (a CPU) the same functions run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from systems.common.torch_engine.cache import KVCache
from systems.common.torch_engine.mixed import Bucket, Inputs, MixedStep, mixed_step, nothing
from systems.common.torch_engine.model import Transformer

Result = TypeVar("Result")

MIXED_ROWS = (0, *range(16, 128, 16), 128, 192, 256)
MIXED_TOKENS = (*range(32, 512, 32), *range(512, 1025, 128))
"""Fine steps: rows and tokens that only pad are multiplied too. Above, a batch outlasts its launch kernel by kernel."""
PROMPT_TOKENS = 384
"""The same for prompts alone."""
MIXED_CHUNKS = 8


def buckets(most: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, every 8 up to 64, every 16 up to 256, every 32 above."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 32, 32)]
    return [size for size in sizes if size < most] + [most]


_STREAMS: dict[tuple[int, int], torch.cuda.Stream] = {}


def capture_stream() -> torch.cuda.Stream:
    """The stream that graphs of the current device are captured on: one for each priority, and always the same.

    A graph's kernels keep the priority of the stream that they were captured on, wherever it is replayed: so it is the current
    stream's, which is high where serving shares the GPU. One stream, for cuBLAS keeps a workspace for each that it has seen.
    """
    key = torch.cuda.current_device(), torch.cuda.current_stream().priority
    if key not in _STREAMS:
        _STREAMS[key] = torch.cuda.Stream(priority=key[1])
    return _STREAMS[key]


def captured_on(stream: torch.cuda.Stream) -> bool:
    """Whether graphs are captured on `stream`: nothing that runs beside them may use it."""
    return stream in _STREAMS.values()


class Graphs(Generic[Result]):
    """Captured work by key; all graphs share one memory pool, so what one returns holds until any of them runs again."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, Result]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._captured

    def run(self, key: object) -> Result:
        """Replay; the tensors that the captured work returned."""
        graph, result = self._captured[key]
        graph.replay()
        return result

    def drop(self) -> None:
        """Let go of all: NCCL's communicators do not end while a graph that uses them lives."""
        self._captured.clear()

    def capture(self, key: object, work: Callable[[], Result]) -> None:
        """Capture `work` under `key`, after one run of it on that stream (compiles kernels, creates handles).

        Replays have the priority of the stream that is current now.
        """
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog may touch events meanwhile: only this thread is held to what a capture allows
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = work()
        self._captured[key] = graph, result


@dataclass(slots=True)
class DecodeStep:
    """Tensors of one decode step: `slots` in, `logits` and likeliest `tokens` out (before the last stage as in `MixedStep`)."""

    slots: Tensor
    logits: Tensor
    tokens: Tensor


class Steps:
    """Runs steps.

    Attributes:
        slots: slots of the decoding rows, uploaded by the caller when the batch changes; unused rows hold the padding slot.
        hidden: on a later pipeline stage the residual stream of a step's tokens, filled by the caller; [most tokens, hidden].
    """

    def __init__(
        self, model: Transformer, cache: KVCache, most: int, graphs: bool, most_tokens: int = 0, prompts: bool = True
    ) -> None:
        """Of up to `most` rows and `most_tokens` tokens; by graph if `graphs`, those with prompts if `prompts` too."""
        self.model, self.cache = model, cache
        self._mirror = model.attention.mirror
        device = cache.k.device
        self.hidden: Tensor | None = None
        if not model.links.first:
            size = max(most, most_tokens) + MIXED_TOKENS[-1] + most
            self.hidden = torch.zeros(size, model.shape.hidden, dtype=cache.dtype, device=device)
        self.slots = torch.full((most,), cache.pad_slot, dtype=torch.int64, device=device)
        self.sizes = buckets(most)
        self.mixed_rows = [rows for rows in MIXED_ROWS if rows <= most] if graphs and prompts and model.fused else []
        largest = Bucket(most, MIXED_TOKENS[-1], MIXED_CHUNKS)
        self._packed = torch.zeros(largest.length, dtype=torch.int64, device=device)
        self._decode: Graphs[DecodeStep] | None = Graphs() if graphs else None
        self._mixed: Graphs[MixedStep] | None = Graphs() if graphs else None

    # ---- decode

    def size(self, rows: int) -> int:
        """The bucket of `rows` decoding rows."""
        return next(size for size in self.sizes if size >= rows)

    def decode(self, rows: int, greedy: bool = True) -> DecodeStep:
        """One step of the first `rows` slots. When `greedy` the next tokens are committed to the cache too."""
        size = self.size(rows)
        if self._decode is not None and (size, greedy, self.model.adapted) not in self._decode:
            self._capture_decode(size, greedy)
        if self._mirror is not None:
            self.model.attention.plan(size, self._decode is not None)
        if self._decode is None:
            return self._decode_step(size, greedy)
        return self._decode.run((size, greedy, self.model.adapted))

    def commit(self, slots: Tensor, tokens: Tensor) -> None:
        """Make `tokens` the newest of `slots`, one longer each; the padding slot keeps its length 0."""
        self.cache.last_token.index_copy_(0, slots, tokens)
        self.cache.lengths.index_add_(0, slots, (slots != self.cache.pad_slot).to(torch.int32))

    def _decode_step(self, size: int, greedy: bool) -> DecodeStep:
        slots = self.slots[:size]
        hidden = None if self.hidden is None else self.hidden[:size]
        logits = self.model.decode(self.cache.last_token[slots], self.cache.lengths, slots, hidden)
        if not self.model.links.last:
            return DecodeStep(slots, logits, slots[:0])
        tokens = self.model.likeliest(logits)
        if greedy:
            self.commit(slots, tokens)
        return DecodeStep(slots, logits, tokens)

    def _capture_decode(self, size: int, greedy: bool) -> None:
        assert self._decode is not None
        kept, received = self.slots.clone(), None if self.hidden is None else self.hidden[:size].clone()
        self.slots.fill_(self.cache.pad_slot)  # the run before the capture must touch no sequence
        if self._mirror is not None:
            rows, self._mirror.rows = self._mirror.rows, np.full(len(kept), self.cache.pad_slot, np.int64)
            self.model.attention.plan(size, True)
            self._mirror.rows = rows
        self._decode.capture((size, greedy, self.model.adapted), lambda: self._decode_step(size, greedy))
        self.slots.copy_(kept)
        if self.hidden is not None and received is not None:
            self.hidden[:size].copy_(received)  # which that run has worked on

    # ---- batches with prompts

    def bucket(self, rows: int, tokens: int, chunks: int) -> tuple[Bucket, bool]:
        """Sizes to pad a batch to, and whether a graph serves it; its own sizes where none does."""
        fitting = [size for size in self.mixed_rows if size >= rows]
        if not fitting or tokens > (MIXED_TOKENS[-1] if rows else PROMPT_TOKENS) or chunks > MIXED_CHUNKS:
            return Bucket(rows, tokens, chunks), False
        return Bucket(fitting[0], next(size for size in MIXED_TOKENS if size >= tokens), MIXED_CHUNKS), True

    def mixed(self, packed: Tensor, bucket: Bucket, greedy: bool = True) -> MixedStep:
        """One batch that `bucket` gave a graph for."""
        assert self._mixed is not None
        if (bucket, greedy, self.model.adapted) not in self._mixed:
            self._capture_mixed(bucket, greedy)
        self._packed[: len(packed)].copy_(packed)
        return self._mixed.run((bucket, greedy, self.model.adapted))

    def _capture_mixed(self, bucket: Bucket, greedy: bool) -> None:
        assert self._mixed is not None
        empty = nothing(bucket, self.cache.pad_slot)
        self._packed[: len(empty)].copy_(torch.from_numpy(empty))

        def work() -> MixedStep:
            hidden = None if self.hidden is None else self.hidden[: bucket.rows + bucket.tokens]
            return mixed_step(self.model, self.cache, Inputs.of(self._packed, bucket, None), greedy, hidden)

        received = None if self.hidden is None else self.hidden[: bucket.rows + bucket.tokens].clone()
        self._mixed.capture((bucket, greedy, self.model.adapted), work)
        if self.hidden is not None and received is not None:
            self.hidden[: len(received)].copy_(received)

    def drop(self) -> None:
        """Let go of all graphs."""
        for graphs in (self._decode, self._mixed):
            if graphs is not None:
                graphs.drop()

    def warm(self) -> None:
        """Capture all graphs of greedy steps, largest first as they share memory; with adapters too where there is a bank."""
        if self._decode is None or self._mixed is None:
            return
        greedy = self.model.links.stages == 1  # with several stages the tokens are committed outside the graph
        for adapted in (False, True) if self.model.adapters is not None else (False,):
            self.model.adapted = adapted
            for size in reversed(self.sizes):
                if (size, greedy, adapted) not in self._decode:
                    self._capture_decode(size, greedy)
            for rows in reversed(self.mixed_rows):
                for tokens in reversed(MIXED_TOKENS if rows else [size for size in MIXED_TOKENS if size <= PROMPT_TOKENS]):
                    bucket = Bucket(rows, tokens, MIXED_CHUNKS)
                    if (bucket, greedy, adapted) not in self._mixed:
                        self._capture_mixed(bucket, greedy)
        self.model.adapted = False
