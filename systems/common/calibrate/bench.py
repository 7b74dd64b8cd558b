"""The engine under measurement, and a cache that looks as if sequences were running."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from systems.common.engine.config import EngineConfig
from systems.common.models import ModelShape
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.executor import fitting_blocks
from systems.common.torch_engine.weights import Weights, random_weights


@dataclass(slots=True)
class Bench:
    """One engine with random weights.

    Attributes:
        live: the engine, graphs not captured yet.
        shape, weights, config: what it was built from.
    """

    live: Live
    shape: ModelShape
    weights: Weights
    config: EngineConfig

    @classmethod
    def build(
        cls, shape: ModelShape, device: torch.device, max_num_seqs: int, blocks: int | None = None, seed: int = 0
    ) -> Bench:
        """An engine over random weights; the KV cache takes `blocks`, or what the GPU has left."""
        weights = random_weights(shape, seed, device)
        batched = max(8192, max_num_seqs)
        config = EngineConfig(blocks or fitting_blocks(shape), max_num_batched_tokens=batched, max_num_seqs=max_num_seqs)
        tokens = 16384 if blocks is None else blocks * config.block_tokens
        bench = cls(Live.build(shape, weights, config, max_tokens=tokens), shape, weights, config)
        cache = bench.live.executor.cache
        for values in (*cache.k, *cache.v):
            values.normal_()
        return bench

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.embedding.device

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.config.num_gpu_blocks * self.config.block_tokens

    @torch.inference_mode()
    def fill(self, rows: int, context: int, chunk: int = 0, past: int = 0, prompts: int = 1) -> None:
        """Give `rows` slots blocks for `context` tokens and a few more, the next `prompts` ones for a chunk behind `past`."""
        cache, steps = self.live.executor.cache, self.live.executor.steps
        wide, long = -(-(context + 8) // cache.block_tokens), -(-(past + chunk) // cache.block_tokens)
        order = torch.randperm(self.config.num_gpu_blocks, device=self.device).to(torch.int32) + 1
        order = order.repeat(-(-(rows * wide + prompts * long) // len(order)))  # shared where the pool is just too small
        cache.tables[:rows, :wide] = order[: rows * wide].view(rows, wide)
        if long:
            cache.tables[rows : rows + prompts, :long] = order[rows * wide : rows * wide + prompts * long].view(prompts, long)
        cache.last_token.random_(0, self.shape.vocab)
        steps.slots.fill_(cache.pad_slot)
        steps.slots[:rows] = torch.arange(rows, device=self.device)
        cache.lengths.zero_()
        self.rewind(rows, context, chunk, past, prompts)

    @torch.inference_mode()
    def rewind(self, rows: int, context: int, chunk: int = 0, past: int = 0, prompts: int = 1) -> None:
        """Set the lengths back to what `fill` made them."""
        lengths = self.live.executor.cache.lengths
        lengths[:rows] = context
        if chunk:
            lengths[rows : rows + prompts] = past
