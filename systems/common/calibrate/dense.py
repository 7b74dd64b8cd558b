"""Token-wise operators: one decoder layer's, the embedding, the head.

A layer's time is the slope between a model of all layers and one of half of them, both without attention: so gaps between
kernels count, and weights come from memory as they do in a real step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.calibrate.bench import Bench
from systems.common.calibrate.clock import Clock
from systems.common.torch_engine.attention import Chunks
from systems.common.torch_engine.attention.mirror import Mirror
from systems.common.torch_engine.kernels.skinny_linear import skinny_linear
from systems.common.torch_engine.model import SKINNY_ROWS, Transformer
from systems.common.torch_engine.weights import Weights


class NoAttention:
    """In attention's place: hands out numbers that are there already."""

    graphs = (True, True)
    mirror: Mirror | None = None

    def __init__(self, name: str, out: Tensor) -> None:
        self.name, self._out = name, out

    def warm(self, tokens: int) -> None:
        """Nothing to make ready."""

    def plan(self, rows: int, graph: bool) -> None:
        """Nothing to plan."""

    def decode(self, qkv: Tensor, layer: int, slots: Tensor) -> Tensor:
        """The first rows."""
        return self._out[: len(qkv)]

    def prefill(self, qkv: Tensor, layer: int, chunks: Chunks) -> Tensor:
        """The first rows."""
        return self._out[: len(qkv)]


def layer_s(bench: Bench, clock: Clock, tokens: Iterable[int]) -> Iterator[tuple[int, float]]:
    """Seconds of one layer's token-wise operators, by tokens in the step."""
    whole, half = (_without_attention(bench, layers) for layers in (bench.shape.layers, bench.shape.layers // 2))
    layers = bench.shape.layers - bench.shape.layers // 2
    for count in tokens:
        times = [clock.time_s(partial(_body, bench, model, count)) for model in (whole, half)]
        yield count, (times[0] - times[1]) / layers


def embedding_s(bench: Bench, clock: Clock, tokens: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Seconds of the token embedding (from the cache's newest tokens) and one norm, by tokens."""
    model, weights = bench.live.executor.model, bench.weights
    ids = torch.zeros(max([1, *tokens]), dtype=torch.int64, device=bench.device).random_(0, bench.shape.vocab)
    places = torch.arange(len(ids), device=bench.device)

    def work(count: int) -> Tensor:
        positions = places[:count].clamp(max=bench.shape.positions - 1) if bench.shape.positions else None
        x = model.embed(ids[places[:count]], positions)
        return x if _skinny(model, count) else model._add_norm(x, None, weights.layers[0].norm1)

    for count in tokens:
        yield count, clock.time_s(partial(work, count))


def head_s(bench: Bench, clock: Clock, sequences: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Seconds from the last layer's output to committed next tokens (greedy), by rows of logits."""
    executor, weights = bench.live.executor, bench.weights
    model, steps = executor.model, executor.steps
    h = torch.randn(max([1, *sequences]), bench.shape.hidden, device=bench.device).to(weights.embedding.dtype)

    def work(count: int) -> Tensor:
        if _skinny(model, count):
            logits = skinny_linear(
                h[:count], weights.head, model.tilings["head"], norm=weights.norm.gain, eps=model.numerics.eps
            )
        else:
            logits = functional.linear(h[:count], weights.head)
        tokens = logits.argmax(-1)
        steps.commit(steps.slots[:count], tokens)
        return tokens

    bench.fill(0, 0)  # every slot is the padding one: nothing is committed
    for count in sequences:
        yield count, clock.time_s(partial(work, count))


def _skinny(model: Transformer, count: int) -> bool:
    return model.skinny and count <= SKINNY_ROWS


def _without_attention(bench: Bench, layers: int) -> Transformer:
    weights: Weights = replace(bench.weights, layers=bench.weights.layers[:layers])
    widest = bench.config.max_num_batched_tokens + bench.config.max_num_seqs
    out = torch.randn(widest, bench.shape.q_width, device=bench.device).to(weights.embedding.dtype)
    real = bench.live.executor.model
    return Transformer(bench.shape, weights, NoAttention(real.attention.name, out), real.numerics)


def _body(bench: Bench, model: Transformer, count: int) -> Tensor:
    """A step of `count` tokens with one row of logits: the fast body where the engine would take it."""
    slots = torch.zeros(0, dtype=torch.int64, device=bench.device)
    tokens = torch.zeros(count, dtype=torch.int64, device=bench.device)
    if _skinny(model, count):
        return model.forward_skinny(tokens, slots)
    positions = tokens if bench.shape.positions else None
    none = torch.zeros(0, dtype=torch.int64, device=bench.device)
    chunks = Chunks(none, None, none, none, none, none)
    return model.forward(tokens, positions, slots, chunks, tokens[:1])
