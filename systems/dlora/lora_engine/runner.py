# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Runs one batch of requests in one mode, switching first where needed.

dLoRA picks any of its requests for a batch, prompts and decoding ones together, and a mode (sheet, 2.5); the engine's own
scheduling state knows no request that pauses, so the runner itself keeps who holds which slot and blocks, and drives the
device half that a `Live` has. Merged batches run the model's plain graphs, on weights that hold the adapter; unmerged ones
the graphs with adapters, on pristine weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from systems.common.engine.config import EngineConfig
from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.device import GREEDY, NONE, Device, packed_wants
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.graphs import MIXED_CHUNKS, MIXED_TOKENS, PROMPT_TOKENS
from systems.common.torch_engine.mixed import Bucket, nothing, pack
from systems.common.torch_engine.sampling import Sampling
from systems.common.torch_engine.weights import Weights
from systems.dlora.lora_engine.bank import SITES, SlotBank
from systems.dlora.lora_engine.modes import Modes
from systems.dlora.lora_engine.passes import Passes
from systems.dlora.lora_engine.switching import MergedWeights, choose

Ints = NDArray[np.int64]
WAITS = ("auto", "layers", "whole")


@dataclass(slots=True)
class Held:
    """A request in the runner: its slot, its adapter (None: the base model), its prompt, how it wants its tokens.

    `until`: position before which none of its stop tokens may come.
    """

    slot: int
    adapter: str | None
    prompt: Ints
    sampling: Sampling = GREEDY
    until: int = 0


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way: the token of request `indices[i]` is `tokens[places[i]]`; valid until the next launch."""

    indices: list[int]
    tokens: Tensor
    places: list[int]

    def read(self) -> dict[int, int]:
        """Wait for the step; its tokens by request."""
        values = self.tokens.tolist()
        return {index: values[place] for index, place in zip(self.indices, self.places, strict=True)}


class LoraRunner(Modes):
    """See the module.

    Attributes:
        live: the engine whose device half runs the batches.
        requests: who holds a place, by number.
    """

    def __init__(self, live: Live, bank: SlotBank, scheme: MergedWeights, wait: str = "auto") -> None:
        """`wait` for adapters still arriving: by `layers` (eager step), `whole` (then the graph), `auto` (no graph: layers)."""
        if wait not in WAITS:
            raise InputError("lora engine", "wait", wait, f"use one of {', '.join(WAITS)}")
        super().__init__(bank, scheme)
        self.live, self.wait = live, wait
        assert isinstance(live.executor.half, Device), "one rank"
        self.half, self.model = live.executor.half, live.executor.model
        self.half.adapters = self.model.adapters = live.executor.adapters = bank
        self.requests: dict[int, Held] = {}
        self._rows: Ints = NONE

    @classmethod
    def build(
        cls, shape: ModelShape, weights: Weights, config: EngineConfig, capacity: int, rank: int, *,
        sites: tuple[str, ...] = SITES, backend: str = "auto", beside: bool = True, scheme: str = "auto", merge: str = "auto",
        wait: str = "auto", keep_bytes: int = 0, **options: object,
    ) -> LoraRunner:  # fmt: skip
        """A runner over `weights` with `capacity` slots; `options` are `TorchExecutor`'s, `keep_bytes` is `choose`'s.

        Raises:
            InputError: an unknown back end or scheme, quantised weights, or too little memory.
        """
        device = weights.layers[0].norm1.gain.device
        bank = SlotBank(shape, capacity, rank, config.max_num_seqs, sites, device, backend, beside)
        scheme_ = choose(scheme, weights, Passes(bank, merge), keep_bytes)
        live = Live.build(shape, weights, config, **options)
        return cls(live, bank, scheme_, wait)

    @torch.inference_mode()
    def warm(self, rows: int | None = None, prompts: bool = True) -> None:
        """Capture the CUDA graphs of the pass over the weights and, for up to `rows` decoding requests, of both modes.

        Without `prompts` those of batches with prompts are left to when they first run (0.2 s each).
        """
        steps, pad = self.live.executor.steps, self.live.executor.cache.pad_slot
        if self._aside is None:
            return
        self._unmerge()
        self.scheme.warm()
        for adapted in (False, True):
            self.model.adapted, self.model.weights = adapted, self.scheme.for_unmerged if adapted else self.scheme.for_merged
            self.half.rows(np.full(len(steps.slots), pad, np.int64), NONE)
            most = min(rows or len(steps.slots), len(steps.slots))
            for size in [size for size in reversed(steps.sizes) if size <= steps.size(most)]:
                steps.decode(size)
            mixed = [size for size in steps.mixed_rows if size < most or size == steps.bucket(most, 1, 1)[0].rows]
            for size in reversed(mixed if prompts else []):
                for tokens in reversed([tokens for tokens in MIXED_TOKENS if size or tokens <= PROMPT_TOKENS]):
                    bucket = Bucket(size, tokens, MIXED_CHUNKS)
                    steps.mixed(self.half.to_device(nothing(bucket, pad)), bucket)
        self._rows = NONE

    # ---- requests

    def admit(self, index: int, prompt: Ints, adapter: str | None, sampling: Sampling = GREEDY, answered: int = 0) -> None:
        """Take a request in; it holds a place until it finishes, also while it pauses.

        Its stop tokens end nothing here, which is the caller's affair, but none comes before its `min_tokens` tokens. The last
        `answered` tokens of the prompt are such as it has got already.

        Raises:
            InputError: an unknown adapter, a prompt that is too long, or no place (`max_num_seqs`, which bounds the requests
                that hold KV cache, not the batch).
        """
        most = self.live.engine.config.max_num_batched_tokens
        if not 0 < len(prompt) <= most:
            raise InputError("request", "input_tokens", len(prompt), f"give 1 to {most} tokens (max_num_batched_tokens)")
        if len(self.requests) == (places := self.live.engine.config.max_num_seqs):
            raise InputError(
                "lora engine", "max_num_seqs", places, "as many requests hold KV cache: raise it, or let some finish"
            )
        if adapter is not None:
            self.store.residents.begin(adapter)
        slot = self.live.executor.tables.take_slot()
        until = len(prompt) - answered + sampling.min_tokens if sampling.stop_tokens else 0
        self.requests[index] = Held(slot, adapter, np.asarray(prompt, np.int64), sampling, until)

    def finish(self, index: int) -> None:
        """A request has ended, or moves away: its slot and blocks are free."""
        held = self.requests.pop(index)
        self.live.executor.tables.release(held.slot)
        self._rows = NONE
        if held.adapter is not None and self.store.residents.end(held.adapter):
            self._left(held.adapter)

    def can_run(self, indices: Sequence[int]) -> list[int]:
        """The requests of `indices` whose adapters fit the slots together (unmerged), in order; the others must wait."""
        wanted = [adapter for i in indices if (adapter := self.requests[i].adapter) is not None]
        fit = {None, *self.store.residents.fitting(wanted)}
        return [i for i in indices if self.requests[i].adapter in fit]

    # ---- steps

    def step(self, prefill: Sequence[int], decode: Sequence[int], merged: str | None = None) -> dict[int, int]:
        """Run one batch and wait for it; the next token of each request. Raises as `launch`."""
        return self.launch(prefill, decode, merged).read()

    @torch.inference_mode()
    def launch(self, prefill: Sequence[int], decode: Sequence[int], merged: str | None = None) -> Launched:
        """Launch one batch: `decode` one token each, whole prompts of `prefill`; merged with adapter `merged`, or unmerged.

        Raises:
            InputError: unmerged with more adapters than slots (`can_run` first); merged with requests of another adapter.
        """
        indices = [*decode, *prefill]
        adapters = {adapter for i in indices if (adapter := self.requests[i].adapter) is not None}
        if merged is None:
            self.prepare_unmerged(sorted(adapters))
        else:
            if wrong := [i for i in indices if self.requests[i].adapter != merged]:
                raise InputError("lora engine", "merged", merged, f"requests {wrong[:5]} are not of this adapter")
            self.prepare_merged(merged)
        self.model.weights = self.scheme.for_merged if merged is not None else self.scheme.for_unmerged
        launched = self._mixed(prefill, decode, merged is None) if prefill else self._decode(decode, merged is None)
        if merged is None:
            self.store.used([self.store.residents.slot_of[a] for a in adapters])
        return launched

    def _decode(self, decode: Sequence[int], adapted: bool) -> Launched:
        executor = self.live.executor
        rows, wants = self._slots(decode), self._wants(decode)
        banned = self._banned(decode, range(len(rows)), (executor.tables.lengths[rows] + 1).tolist())
        greedy = not banned and all(want.temperature == 0 for want in wants)
        self._tell_adapters(rows, decode, adapted)
        if not np.array_equal(rows, self._rows):
            padded = np.full(len(executor.steps.slots), executor.cache.pad_slot, np.int64)
            padded[: len(rows)] = rows
            self.half.rows(padded, NONE if greedy else packed_wants(wants + [GREEDY] * (len(padded) - len(rows)), banned))
            self._rows = rows
        self._grow(rows)
        if adapted and self._by_layers(decode, graphed=True, may=greedy):
            tokens = self._eager_decode(len(rows))
        else:
            tokens = self.half.decode(len(rows), greedy, adapted)
        executor.tables.lengths[rows] += 1
        return Launched(list(decode), tokens, list(range(len(rows))))

    def _eager_decode(self, count: int) -> Tensor:
        """A decode step kernel by kernel: each layer waits for its own part of what is still arriving."""
        executor = self.live.executor
        slots, self.model.adapted = executor.steps.slots[:count], True
        logits = self.model.decode(executor.cache.last_token[slots], executor.cache.lengths, slots)
        tokens = self.model.likeliest(logits)
        executor.steps.commit(slots, tokens)
        self.bank.awaited = []
        return tokens

    def _mixed(self, prefill: Sequence[int], decode: Sequence[int], adapted: bool) -> Launched:
        executor = self.live.executor
        tables, pad = executor.tables, executor.cache.pad_slot
        rows, slots = self._slots(decode), self._slots(prefill)
        prompts = [self.requests[i].prompt for i in prefill]
        new = np.array([len(prompt) for prompt in prompts], np.int64)
        for slot, tokens in zip(slots, new, strict=True):
            tables.grow(int(slot), int(tokens))
        self._tell_adapters(rows, decode, adapted)
        used = int(tables.held[slots].max())
        mine = self._places([*prefill], adapted)
        self.half.tables(slots, tables.tables[slots, :used].astype(np.int64).ravel(), mine)
        self._grow(rows)
        tables.lengths[rows] += 1
        tables.lengths[slots] = new
        bucket, graphed = executor.steps.bucket(len(rows), int(new.sum()), len(new))
        if adapted and self._by_layers([*decode, *prefill], graphed):
            bucket, graphed = Bucket(len(rows), int(new.sum()), len(new)), False
        past, ended = np.zeros(len(new), np.int64), np.ones(len(new), np.bool_)
        lengths = tables.lengths[rows].astype(np.int64)
        packed = pack(bucket, prompts, rows, lengths, past, slots, ended, pad)
        table = NONE if graphed else np.stack([np.cumsum(new) - new, past, new, slots], 1).astype(np.int64).ravel()
        places = [*range(len(rows)), *(bucket.rows + i for i in range(len(new)))]
        banned = self._banned([*decode, *prefill], places, [*lengths.tolist(), *new.tolist()])
        padding = [GREEDY] * (bucket.rows - len(rows)), [GREEDY] * (bucket.chunks - len(new))
        wants = packed_wants([*self._wants(decode), *padding[0], *self._wants(prefill), *padding[1]], banned)
        tokens = self.half.mixed(packed, bucket, table, not len(wants), adapted, wants)
        self.bank.awaited = []
        return Launched([*decode, *prefill], tokens, places)

    def _by_layers(self, indices: Sequence[int], graphed: bool, may: bool = True) -> bool:
        """Whether to step layer by layer, as adapters of the batch still arrive; else the stream waits for them here.

        An eager decode step takes the likeliest tokens: it is for batches that want those (`may`).
        """
        slots = {int(place) for place in self._places(indices, True)}
        copies = self.store.coming(slots)
        if copies and may and (self.wait == "layers" or (self.wait == "auto" and not graphed)):
            self.bank.awaited = copies
            return True
        self.store.wait(copies)
        return False

    def _slots(self, indices: Sequence[int]) -> Ints:
        return np.array([self.requests[i].slot for i in indices], np.int64)

    def _banned(self, indices: Sequence[int], places: Sequence[int], positions: Sequence[int]) -> list[tuple[int, int, int]]:
        """Stop tokens that must not come yet (`sampling.Wants`); request `indices[i]` answers at `places[i]`."""
        found: list[tuple[int, int, int]] = []
        for index, place, position in zip(indices, places, positions, strict=True):
            if (held := self.requests[index]).until > position:
                tokens = [token for token in held.sampling.stop_tokens if token < self.bank.shape.vocab]
                found += [(place, token, held.until) for token in tokens]
        return found

    def _wants(self, indices: Sequence[int]) -> list[Sampling]:
        return [self.requests[i].sampling for i in indices]

    def _places(self, indices: Sequence[int], adapted: bool) -> Ints:
        slot_of = self.store.residents.slot_of if adapted else {}
        return np.array([slot_of.get(self.requests[i].adapter or "", 0) for i in indices], np.int64)

    def _tell_adapters(self, rows: Ints, decode: Sequence[int], adapted: bool) -> None:
        """Tell the bank where each decoding row's adapter is: it may have moved since the row's last step."""
        if adapted and len(rows):
            both = self.half.to_device(np.concatenate([rows, self._places(decode, True)]))
            self.bank.of_slot.index_copy_(0, both[: len(rows)], both[len(rows) :])

    def _grow(self, rows: Ints) -> None:
        if len(rows):
            places, blocks = self.live.executor.tables.grow_one(rows)
            if len(places):
                self.half.grow(places, blocks.astype(np.int64))
