"""What adapters add to one decoder layer: all of a bank's sites, by tokens and by distinct adapters in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from systems.common.calibrate.bench import Bench
from systems.common.calibrate.clock import Clock
from systems.common.torch_engine.attention import Chunks
from systems.common.torch_engine.lora import AdapterBank, random_adapter


@dataclass(frozen=True, slots=True)
class AdapterPoint:
    """`tokens` decoding rows (`kind` decode) or prompt tokens of one chunk per adapter (`prefill`); seconds of one layer."""

    kind: str
    tokens: int
    adapters: int
    rank: int
    took_s: float


def adapters_s(
    bench: Bench, clock: Clock, rank: int, adapters: tuple[int, ...], rows: tuple[int, ...], prompts: tuple[int, ...],
    sites: tuple[str, ...],
) -> Iterator[AdapterPoint]:  # fmt: skip
    """Every combination in which each adapter has a token."""
    bank = AdapterBank(bench.shape, max(adapters), rank, bench.config.max_num_seqs, sites, bench.device)
    for i in range(max(adapters)):
        bank.load(f"a{i}", random_adapter(bench.shape, rank, i, sites, bench.device))
    for distinct in adapters:
        bank.of_slot[:-1] = torch.arange(len(bank.of_slot) - 1, device=bench.device) % distinct + 1
        for tokens in rows:
            if tokens >= distinct:
                slots = torch.arange(tokens, device=bench.device)
                yield AdapterPoint("decode", tokens, distinct, rank, _layer_s(bench, clock, bank, tokens, slots, None))
        for tokens in prompts:
            if tokens >= distinct:
                new = [tokens // distinct] * (distinct - 1)
                chunks = Chunks.of([0] * distinct, [*new, tokens - sum(new)], list(range(distinct)), bench.device)
                none = torch.zeros(0, dtype=torch.int64, device=bench.device)
                yield AdapterPoint("prefill", tokens, distinct, rank, _layer_s(bench, clock, bank, tokens, none, chunks))


def _layer_s(bench: Bench, clock: Clock, bank: AdapterBank, tokens: int, slots: torch.Tensor, chunks: Chunks | None) -> float:
    dtype = bench.weights.embedding.dtype
    x = {site: torch.randn(tokens, bank.a[site].shape[-1], device=bench.device).to(dtype) for site in bank.sites}
    y = {site: torch.zeros(tokens, bank.b[site].shape[-2], device=bench.device, dtype=dtype) for site in bank.sites}

    def work() -> None:
        for layer in range(bench.shape.layers):
            for site in bank.sites:
                bank.add(y[site], x[site], layer, site, slots, chunks)

    return clock.time_s(work) / bench.shape.layers
