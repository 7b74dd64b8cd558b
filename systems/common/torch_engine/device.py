# mypy: disable-error-code="no-untyped-call, no-any-return"
"""The device half of an executor: what one rank's GPU holds and does.

The host half decides (slots, blocks, batches) and says so in a few calls whose arguments are plain numbers and int64 arrays.
With several ranks `parallel` sends the same calls to all of them; each runs its part, so all caches move alike.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from systems.common.engine.config import EngineConfig
from systems.common.models import ModelShape
from systems.common.torch_engine import attention, torchao_products
from systems.common.torch_engine.attention import Chunks
from systems.common.torch_engine.cache import KVCache
from systems.common.torch_engine.comm import Links, leave
from systems.common.torch_engine.graphs import Graphs, Steps
from systems.common.torch_engine.lora import AdapterBank
from systems.common.torch_engine.memory import kv_too_large, or_graphs_too_large
from systems.common.torch_engine.mixed import Bucket, Inputs, mixed_step
from systems.common.torch_engine.model import Transformer
from systems.common.torch_engine.numerics import Numerics, numerics, rope_table
from systems.common.torch_engine.placement import Place
from systems.common.torch_engine.sampling import Sampling, Wants
from systems.common.torch_engine.weights import Weights, weight_bytes

Ints = NDArray[np.int64]
GREEDY = Sampling()
NONE: Ints = np.empty(0, np.int64)


def packed_wants(wants: Many[Sampling], banned: Many[tuple[int, int, int]] = ()) -> Ints:
    """How many rows; temperatures, top-p and seeds, the fractions by their bits; rows, tokens and positions of `banned`.

    Empty where all rows are greedy and nothing is banned (`sampling.Wants`).
    """
    if not banned and all(want.temperature == 0 for want in wants):
        return NONE
    fractions = np.array([[want.temperature for want in wants], [want.top_p for want in wants]], np.float64)
    bans = np.array(banned, np.int64).reshape(-1, 3).T.ravel()
    seeds = np.array([want.seed for want in wants], np.int64)
    return np.concatenate([np.array([len(wants)], np.int64), fractions.view(np.int64).ravel(), seeds, bans])


class DeviceHalf(Protocol):
    """What the host half calls. Work is launched, not awaited."""

    def rows(self, slots: Ints, wants: Ints) -> None:
        """The decoding rows of the coming decode steps: their `slots`, padded, and `packed_wants` of as many."""
        ...

    def grow(self, places: Ints, blocks: Ints) -> None:
        """Write `blocks` at flat `places` of the block tables."""
        ...

    def tables(self, slots: Ints, blocks: Ints, adapters: Ints) -> None:
        """The first blocks of each of `slots` (all rows laid end to end), and its adapter where there is a bank."""
        ...

    def decode(self, rows: int, greedy: bool, adapted: bool) -> Tensor:
        """One decode step of the first `rows` rows, committed; the tokens, padding included."""
        ...

    def mixed(self, packed: Ints, bucket: Bucket, chunks: Ints, greedy: bool, adapted: bool, wants: Ints) -> Tensor:
        """One batch with prompts, committed (`mixed.pack`); the tokens.

        `chunks`: the chunk table where no graph serves the batch (`Chunks.host`, flat), else empty.
        """
        ...

    def warm(self) -> None:
        """Capture graphs and plan what must be planned."""
        ...

    def score(self, prompt: Ints) -> Tensor:
        """Logits of every token of `prompt`, by slot 0 and the first blocks; only while nothing runs."""
        ...

    def sums(self, elements: int, count: int) -> Tensor:
        """Seconds that one of `count` sums of `elements` numbers over a stage's ranks takes, one after the other."""
        ...


class Device:
    """One rank's half. `shape` is the whole model; `place` and `links` say which part of it is here.

    Attributes:
        choices: what runs attention, quantised products and adapters, and what the cache holds; recorded with measurements.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        config: EngineConfig,
        *,
        max_tokens: int,
        backend: str = "auto",
        graphs: bool = True,
        given: Numerics | None = None,
        adapters: tuple[int, int, tuple[str, ...]] | None = None,
        lora: str = "auto",
        quantised: str = "auto",
        place: Place | None = None,
        links: Links | None = None,
    ) -> None:
        self.links = links or Links()
        self.shape = local = shape if place is None else place.local(shape)
        self.vocab, self.config = shape.vocab, config
        self.device = weights.layers[0].norm1.gain.device
        given = given or numerics(shape)
        width = config.blocks(max_tokens)
        try:
            self.cache = KVCache(
                local, config.max_num_seqs, config.num_gpu_blocks, width, config.block_tokens, self.device, config.kv_dtype
            )
        except torch.OutOfMemoryError as error:
            raise kv_too_large(local, config, weight_bytes(weights)) from error
        rope = None if shape.positions else rope_table(shape.head_dim, width * config.block_tokens, given, self.device)
        self.adapters = None
        if adapters is not None:
            capacity, rank, sites = adapters
            self.adapters = AdapterBank(local, capacity, rank, config.max_num_seqs, tuple(sites), self.device, lora)
        backend_ = attention.choose(backend, local, self.cache, rope)
        self.choices = {
            "attention": backend_.name,
            "kv_dtype": local.dtype if config.kv_dtype == "auto" else config.kv_dtype,
            "quantised": torchao_products.apply(quantised, weights),
            "lora": self.adapters.backend if self.adapters is not None else "none",
        }
        self.model = Transformer(local, weights, backend_, given, self.adapters, self.links)
        captured = graphs and self.device.type == "cuda" and backend_.graphs[0]
        self.steps = Steps(
            self.model, self.cache, config.max_num_seqs, captured, config.max_num_batched_tokens, backend_.graphs[1]
        )
        self._mirror = backend_.mirror
        self._want: Wants | None = None

    # ---- what changes between steps

    def rows(self, slots: Ints, wants: Ints) -> None:
        """See `DeviceHalf`."""
        self.steps.slots.copy_(self.to_device(slots))
        if self._mirror is not None:
            self._mirror.rows = slots
        self._want = self._unpacked(wants) if len(wants) else None

    def grow(self, places: Ints, blocks: Ints) -> None:
        """See `DeviceHalf`."""
        both = self.to_device(np.concatenate([places, blocks]))
        self.cache.tables.view(-1).index_copy_(0, both[: len(places)], both[len(places) :].to(torch.int32))
        if self._mirror is not None:
            self._mirror.tables.reshape(-1)[places] = blocks

    def tables(self, slots: Ints, blocks: Ints, adapters: Ints) -> None:
        """See `DeviceHalf`."""
        count = len(slots)
        values = self.to_device(np.concatenate([slots, adapters, blocks]))
        where, mine, used = values.split([count, len(adapters), len(blocks)])
        rows = used.view(count, -1).to(torch.int32)
        self.cache.tables[:, : rows.shape[1]].index_copy_(0, where, rows)
        if self.adapters is not None:
            self.adapters.of_slot.index_copy_(0, where, mine)
        if self._mirror is not None:
            self._mirror.tables[slots, : rows.shape[1]] = blocks.reshape(count, -1)

    # ---- steps

    def decode(self, rows: int, greedy: bool, adapted: bool) -> Tensor:
        """See `DeviceHalf`."""
        steps, self.model.adapted = self.steps, adapted
        alone = self.links.stages == 1
        if steps.hidden is not None:
            self.links.receive(steps.hidden[: steps.size(rows)])
        step = steps.decode(rows, greedy and alone)
        if self._mirror is not None:
            self._mirror.stepped(len(step.slots))
        if greedy and alone:
            return step.tokens
        positions = self.cache.lengths[step.slots].long() + 1
        tokens = self._agreed(step.logits, step.tokens, len(step.slots), None if greedy else self._want, positions)
        steps.commit(step.slots, tokens)
        return tokens

    def mixed(self, packed: Ints, bucket: Bucket, chunks: Ints, greedy: bool, adapted: bool, wants: Ints) -> Tensor:
        """See `DeviceHalf`."""
        steps, self.model.adapted = self.steps, adapted
        alone, hidden = self.links.stages == 1, None
        array = self.to_device(packed)
        if self._mirror is not None:
            self._plan(packed, bucket)
        if steps.hidden is not None:
            hidden = self.links.receive(steps.hidden[: bucket.rows + bucket.tokens])
        if len(chunks):
            inputs = Inputs.of(array, bucket, chunks.reshape(-1, 4).astype(np.int32))
            step = mixed_step(self.model, self.cache, inputs, greedy and alone, hidden)
        else:
            step = steps.mixed(array, bucket, greedy and alone)
        if greedy and alone:
            return step.tokens
        positions = self.cache.lengths[step.answered].long()
        want = self._unpacked(wants) if len(wants) else None
        tokens = self._agreed(step.logits, step.tokens, len(step.answered), want, positions)
        self.cache.last_token.index_copy_(0, step.answered, tokens)
        return tokens

    def _plan(self, packed: Ints, bucket: Bucket) -> None:
        """Let the host know what a batch with prompts does to the cache, its decoding rows planned."""
        assert self._mirror is not None
        inputs, mirror = Inputs.of(torch.from_numpy(packed), bucket, None), self._mirror
        if bucket.rows:
            mirror.rows = inputs.row_slots.numpy()
            self.model.attention.plan(bucket.rows, False)
        mirror.moved(inputs.moved.numpy(), inputs.lengths.numpy())

    def _agreed(self, out: Tensor, tokens: Tensor, count: int, want: Wants | None, positions: Tensor) -> Tensor:
        """The step's tokens: sampled by the last stage's rank 0, known to its stage and the first one (zeros between)."""
        links = self.links
        if not links.last:
            links.send_on(out)
            tokens = torch.zeros(count, dtype=torch.int64, device=out.device)
            return links.receive_back(tokens) if links.first else tokens
        if want is not None:
            logits = self.model.whole(out)
            if links.tp_rank == 0:
                tokens = want.choose(logits, positions)
            tokens = links.from_first(tokens)
        if not links.first:
            links.send_back(tokens)
        return tokens

    # ---- the rest

    def warm(self) -> None:
        """See `DeviceHalf`."""
        with or_graphs_too_large(self.shape, self.config, weight_bytes(self.model.weights)):
            self.steps.warm()
            self.model.attention.warm(self.config.max_num_batched_tokens)

    def score(self, prompt: Ints) -> Tensor:
        """See `DeviceHalf`. Given by rank 0; elsewhere only its part."""
        links, count = self.links, len(prompt)
        self.model.adapted = False
        width = self.config.blocks(count)
        self.cache.tables[0, :width] = torch.arange(1, width + 1, dtype=torch.int32, device=self.device)
        if self._mirror is not None:
            self._mirror.tables[0, :width] = np.arange(1, width + 1)
        tokens, slots = self.to_device(prompt), torch.empty(0, dtype=torch.int64, device=self.device)
        chunks = Chunks.of([0], [count], [0], self.device)
        hidden = None
        if not links.first:
            hidden = links.receive(torch.empty(count, self.shape.hidden, dtype=self.cache.dtype, device=self.device))
        out = self.model.forward(tokens, chunks.positions.long(), slots, chunks, None, hidden)
        if not links.last:
            links.send_on(out)
            out = torch.empty(count, self.vocab, dtype=out.dtype, device=out.device)
            return links.receive_back(out) if links.first else out
        out = self.model.whole(out)
        if not links.first:
            links.send_back(out)
        return out

    def sums(self, elements: int, count: int) -> Tensor:
        """See `DeviceHalf`. By one CUDA graph, as in a decode step; on a CPU it says nothing (zero)."""
        x = torch.zeros(elements, dtype=self.cache.dtype, device=self.device)
        if self.device.type != "cuda":
            self.links.reduce(x)
            return torch.zeros(1)
        graphs: Graphs[None] = Graphs()

        def work() -> None:
            for _ in range(count):
                self.links.reduce(x)

        graphs.capture("sums", work)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graphs.run("sums")
        start.record()
        graphs.run("sums")
        end.record()
        end.synchronize()
        return torch.tensor([start.elapsed_time(end) / 1e3 / count])

    def close(self) -> None:
        """Let go of the graphs, then of the links to the other ranks; a rank that hangs in that is left alone."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps.drop()
        gc.collect()
        leave()

    def to_device(self, values: Ints) -> Tensor:
        """A copy on the device, by pinned memory where that is a GPU."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _unpacked(self, wants: Ints) -> Wants:
        count = int(wants[0])
        fractions = wants[1 : 1 + 2 * count].view(np.float64).reshape(2, -1).astype(np.float32)
        hot, kept = (torch.from_numpy(x).to(self.device) for x in fractions)
        seeds, bans = wants[1 + 2 * count : 1 + 3 * count], wants[1 + 3 * count :].reshape(3, -1)
        banned = self.to_device(np.ascontiguousarray(bans)) if bans.size else None
        return Wants(hot, kept if (fractions[1] < 1).any() else None, self.to_device(seeds), banned)
