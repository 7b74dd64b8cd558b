# mypy: disable-error-code="no-untyped-call, no-any-return"
"""The executor that runs the engine's batches with PyTorch, in wall-clock time.

It reads the engine's state (who runs, who decodes) and gives each running sequence a slot and real blocks. Launches are one
step ahead of the GPU: `run` and `decode_run` put step n + 1 on the stream, then wait for step n, so the host's work hides
behind the GPU's. Output lengths are forced, so no decision waits for a token's value; stop tokens are seen one step late and
what came after them is dropped.

This is the host half. What the device holds and does is `device`; what goes there is numbers and int64 arrays, so that other
ranks can be told the same (`parallel`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.engine.executor import Batch, DecodeRun
from systems.common.engine.sequence import Sequence
from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.cache import BlockTables, token_bytes
from systems.common.torch_engine.comm import Links
from systems.common.torch_engine.device import GREEDY, NONE, Device, DeviceHalf, packed_wants
from systems.common.torch_engine.flights import Flights
from systems.common.torch_engine.lora import Adapter
from systems.common.torch_engine.memory import gib
from systems.common.torch_engine.mixed import pack
from systems.common.torch_engine.numerics import Numerics
from systems.common.torch_engine.placement import Place
from systems.common.torch_engine.sampling import Sampling
from systems.common.torch_engine.weights import Weights

Tokens = NDArray[np.int64]


def random_prompts(vocab: int, seed: int = 0) -> Callable[[Request], Tokens]:
    """Prompts of random tokens, the same for the same seed and request."""

    def prompt(request: Request) -> Tokens:
        return np.random.default_rng([seed, request.index]).integers(0, vocab, request.input_tokens)

    return prompt


class Bank(Protocol):
    """What an executor and a server ask of the adapters' bank: `lora.AdapterBank`, or all ranks' together."""

    @property
    def index(self) -> Mapping[str, int]:
        """Where each adapter is."""
        ...

    def load(self, name: str, adapter: Adapter) -> None:
        """Copy `adapter` in under `name`."""
        ...

    def unload(self, name: str) -> None:
        """Free the place of an adapter that no sequence uses."""
        ...


class TorchExecutor:
    """See the module.

    Attributes:
        half: the device half; `device`, `cache`, `model`, `steps` and `choices` are its parts.
        adapters: the adapters' bank, or None; built where `adapters` (capacity, highest rank, sites) is given.
        outputs: tokens generated so far by request index, those of steps still in flight left out.
        flights: steps on their way, and when those before them ended.
        on_tokens: called with the sequences and tokens of each step that ended.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        config: EngineConfig,
        *,
        max_tokens: int = 8192,
        backend: str = "auto",
        graphs: bool = True,
        overlap: bool = True,
        prompt: Callable[[Request], Tokens] | None = None,
        sampling: Callable[[Request], Sampling] | None = None,
        given: Numerics | None = None,
        adapters: tuple[int, int, tuple[str, ...]] | None = None,
        lora: str = "auto",
        quantised: str = "auto",
        clock: Callable[[], float] = time.perf_counter,
        place: Place | None = None,
        links: Links | None = None,
    ) -> None:
        self.shape, self.config, self.clock = shape, config, clock
        self.overlap = overlap
        width = config.blocks(max_tokens)
        self.max_tokens = width * config.block_tokens
        self.tables = BlockTables(config.max_num_seqs, config.num_gpu_blocks, width, config.block_tokens)
        mine = Device(
            shape, weights, config, max_tokens=max_tokens, backend=backend, graphs=graphs, given=given, adapters=adapters,
            lora=lora, quantised=quantised, place=place, links=links,
        )  # fmt: skip
        self.half: DeviceHalf = mine
        self.device, self.cache, self.model, self.steps = mine.device, mine.cache, mine.model, mine.steps
        self.adapters: Bank | None = mine.adapters
        self.choices = mine.choices
        self.prompt = prompt or random_prompts(shape.vocab)
        self.sampling = sampling or (lambda _: GREEDY)
        self.outputs: dict[int, list[int]] = {}
        self.on_tokens: Callable[[list[Sequence], list[int]], None] | None = None
        self.flights = Flights(clock)
        self._prompts: dict[int, Tokens] = {}
        self._samplings: dict[int, Sampling] = {}
        self._slots: dict[int, int] = {}
        self._decoding: list[Sequence] = []
        self._rows: NDArray[np.int64] = np.empty(0, np.int64)
        self._stale = True
        self._greedy, self._adapted = True, False
        self._patient, self._banned_steps = False, 0
        self._finished = self._preemptions = 0
        self._stopped: list[Sequence] = []
        self._over: set[int] = set()
        self._engine: Engine | None = None

    # ---- what the engine calls

    @torch.inference_mode()
    def run(self, batch: Batch) -> float:
        """Launch one iteration that has prefill chunks; seconds until the step before it had ended."""
        began = self.clock()
        self._reconcile()
        if batch.decodes and self._stale:
            self._gather_rows()
        decoding = self._decoding if batch.decodes else []
        self._launch_mixed(decoding, batch)
        self._stale = True
        self._settle(1 if self.overlap else 0)
        return self.clock() - began

    @torch.inference_mode()
    def decode_run(self, batch: Batch) -> DecodeRun:
        """Launch one decode step; it lasts until the step before it had ended."""
        began = self.clock()
        self._reconcile()
        if self._stale:
            self._gather_rows()
            self._upload_rows()
        self._grow_tables()
        tokens = self.half.decode(len(self._rows), self._greedy, self._adapted)
        self.flights.launch(self._decoding, tokens[: len(self._rows)], rows=len(self._rows))
        self.tables.lengths[self._rows] += 1
        if self._banned_steps:
            self._banned_steps -= 1
            if not self._banned_steps:
                self._stale = True  # all rows may stop now: back to steps that choose by graph
        self._settle(1 if self.overlap else 0)
        return DecodeRun(self.clock() - began, 0.0, 1)

    def advanced(self, steps: int) -> None:
        """Each `decode_run` is one step."""
        assert steps == 1

    def idle(self, now_s: float, until_s: float) -> float:
        """Let what is in flight end; the loop that drives the engine waits."""
        self.drain()
        return until_s

    # ---- what drivers call

    def attach(self, engine: Engine) -> None:
        """Serve this engine, whose state says who runs."""
        self._engine = engine

    def drain(self) -> None:
        """Wait for every step in flight."""
        self._settle(0)

    def take_stopped(self) -> list[Sequence]:
        """Sequences that have come to one of their stop tokens since the last call; later tokens of theirs are dropped."""
        stopped, self._stopped = self._stopped, []
        return stopped

    def drop(self, sequence: Sequence) -> None:
        """Throw away the tokens of an aborted `sequence` that are still in flight."""
        self._over.add(sequence.index)

    def forget(self, sequences: list[Sequence]) -> None:
        """Let go of everything about ended `sequences`, none of which has a step in flight any more (for long-lived loops)."""
        self._reconcile()
        for sequence in sequences:
            for kept in (self.outputs, self._samplings, self._prompts):
                kept.pop(sequence.index, None)
            self._over.discard(sequence.index)

    def trim(self, keep: int = 1000) -> None:
        """Let go of the oldest entries of the logs: the engine's steps and ended sequences, and when steps ended."""
        assert self._engine is not None
        self._reconcile()
        self._engine.finished.clear()
        self._finished = 0
        flights = self.flights
        for log in (self._engine.steps_log, flights.ended_s, flights.waited_s, flights.decode_rows):
            del log[: max(0, len(log) - keep)]

    @torch.inference_mode()
    def warm(self) -> None:
        """Capture the CUDA graphs and plan what else must be planned, so that serving never waits for it."""
        self.half.warm()
        gc.collect()
        gc.freeze()  # what start-up made is never garbage: later collections need not walk it (a pause of tens of ms)

    def check(self, request: Request) -> None:
        """Raises InputError for a request longer than the block tables, or for an adapter that is not loaded."""
        total = request.input_tokens + request.output_tokens
        if total > self.max_tokens:
            mend = f"longer than the model's context here ({self.max_tokens}): shorten it or raise max_tokens"
            raise InputError("request", "input_tokens + output_tokens", total, mend)
        known = self.adapters.index if self.adapters is not None else {}
        if request.adapter is not None and request.adapter not in known:
            raise InputError(
                "request", "adapter", request.adapter, f"use one of {', '.join(known) or 'none: no adapter is loaded'}"
            )

    # ---- sequences, slots and blocks

    def _reconcile(self) -> None:
        """Take back the slots of sequences that finished or were preempted since the last step."""
        assert self._engine is not None, "attach() the engine first"
        engine = self._engine
        for sequence in engine.finished[self._finished :]:
            self._release(sequence.index)
            self._prompts.pop(sequence.index, None)
        self._finished = len(engine.finished)
        if engine.state.preemptions != self._preemptions:
            self._preemptions = engine.state.preemptions
            running = engine.state.running
            for index in [i for i in self._slots if i not in running or running[i].prefilled == 0]:
                self._release(index)

    def _release(self, index: int) -> None:
        if (slot := self._slots.pop(index, None)) is not None:
            self.tables.release(slot)
            self._stale = True

    def _gather_rows(self) -> None:
        """Who decodes, in order of admission."""
        assert self._engine is not None
        self._decoding = [s for s in self._engine.state.running.values() if s.finish_clock >= 0]
        self._rows = np.array([self._slots[s.index] for s in self._decoding], np.int64)
        self._stale = False

    def _upload_rows(self) -> None:
        padded = np.full(len(self.steps.slots), self.cache.pad_slot, np.int64)
        padded[: len(self._rows)] = self._rows
        self._adapted = self._any_adapter(self._decoding)
        wants = [self._samplings[s.index] for s in self._decoding]
        banned = self._banned(enumerate(self._decoding), 1)
        self._banned_steps = max((until - int(self.tables.lengths[self._rows[row]]) - 1 for row, _, until in banned), default=0)
        packed = packed_wants(wants + [GREEDY] * (len(padded) - len(wants)), banned)
        self._greedy = not len(packed)
        self.half.rows(padded, packed)

    def _banned(self, rows: Iterable[tuple[int, Sequence]], ahead: int) -> list[tuple[int, int, int]]:
        """Stop tokens that must not come yet: row, token, position before which it must not.

        The next token of each of `rows` will stand `ahead` places after what `tables.lengths` says.
        """
        if not self._patient:
            return []
        found = []
        for row, sequence in rows:
            want = self._samplings[sequence.index]
            until = sequence.request.input_tokens + want.min_tokens
            if until > self.tables.lengths[self._slots[sequence.index]] + ahead:
                found += [(row, token, until) for token in want.stop_tokens if token < self.shape.vocab]
        return found

    def _any_adapter(self, sequences: list[Sequence]) -> bool:
        return self.adapters is not None and any(s.request.adapter is not None for s in sequences)

    def _grow_tables(self) -> None:
        """A new block for every decoding sequence whose last one is full."""
        places, blocks = self.tables.grow_one(self._rows)
        if len(places):
            self.half.grow(places, blocks.astype(np.int64))

    # ---- batches with prompts

    def _launch_mixed(self, decoding: list[Sequence], batch: Batch) -> None:
        prompts, past, new, slots = [], [], [], []
        for sequence, done, tokens in batch.chunks:
            if done == 0:
                self._begin(sequence)
            slot = self._slots[sequence.index]
            self.tables.grow(slot, done + tokens)
            prompts.append(self._prompts[sequence.index][done : done + tokens])
            past.append(done)
            new.append(tokens)
            slots.append(slot)
        rows = self._rows if decoding else np.empty(0, np.int64)
        if decoding:
            self._grow_tables()
            self.tables.lengths[rows] += 1
        self._upload_tables(slots, [sequence for sequence, _, _ in batch.chunks])
        self.tables.lengths[slots] = np.array(past) + np.array(new)
        ended = np.array([done + tokens == sequence.prompt_tokens for sequence, done, tokens in batch.chunks])
        bucket, graphed = self.steps.bucket(len(rows), sum(new), len(new))
        lengths = self.tables.lengths[rows].astype(np.int64)
        packed = pack(bucket, prompts, rows, lengths, np.array(past), np.array(slots), ended, self.cache.pad_slot)
        answers = [*decoding, *(sequence if end else None for (sequence, _, _), end in zip(batch.chunks, ended, strict=True))]
        padding = [None] * (bucket.rows - len(rows))
        wants = [
            GREEDY if s is None else self._samplings[s.index] for s in [*answers[: len(rows)], *padding, *answers[len(rows) :]]
        ]
        at = ((i if i < len(rows) else i + len(padding), s) for i, s in enumerate(answers) if s is not None)
        banned = self._banned(at, 0)
        want = packed_wants(wants + [GREEDY] * (bucket.rows + bucket.chunks - len(wants)), banned)
        table = NONE if graphed else np.stack([np.cumsum(new) - new, past, new, slots], 1).astype(np.int64).ravel()
        adapted = self._any_adapter([*decoding, *(sequence for sequence, _, _ in batch.chunks)])
        answer = self.half.mixed(packed, bucket, table, not len(want), adapted, want)
        places = [i if i < len(rows) else i + len(padding) for i, s in enumerate(answers) if s is not None]
        self.flights.launch([s for s in answers if s is not None], answer, places)

    def _begin(self, sequence: Sequence) -> None:
        """A slot for a sequence that starts its prompt; after a preemption the prompt includes what it had generated."""
        if sequence.index in self._slots:
            self._release(sequence.index)
        self._slots[sequence.index] = self.tables.take_slot()
        prompt = np.asarray(self.prompt(sequence.request), np.int64)
        if sequence.preemptions and sequence.generated:
            self.drain()
            prompt = np.concatenate([prompt, np.array(self.outputs[sequence.index], np.int64)])
        else:
            self.outputs[sequence.index] = []
            self._over.discard(sequence.index)
        assert len(prompt) == sequence.prompt_tokens, (len(prompt), sequence.prompt_tokens)
        self._prompts[sequence.index] = prompt
        self._samplings[sequence.index] = want = self.sampling(sequence.request)
        self._patient |= want.min_tokens > 0 and bool(want.stop_tokens)

    def _upload_tables(self, slots: list[int], sequences: list[Sequence]) -> None:
        used = int(self.tables.held[slots].max())
        mine = NONE
        if (bank := self.adapters) is not None:
            mine = np.array(
                [bank.index[s.request.adapter] if s.request.adapter is not None else 0 for s in sequences], np.int64
            )
        self.half.tables(np.array(slots, np.int64), self.tables.tables[slots, :used].astype(np.int64).ravel(), mine)

    # ---- tokens

    def _settle(self, keep: int) -> None:
        """Wait until at most `keep` steps are in flight; hand out the tokens of the others."""
        for sequences, tokens in self.flights.settle(keep):
            for sequence, token in zip(sequences, tokens, strict=True):
                if sequence.index not in self._over:
                    self.outputs[sequence.index].append(token)
                    want = self._samplings[sequence.index]
                    if token in want.stop_tokens and len(self.outputs[sequence.index]) > want.min_tokens:
                        self._over.add(sequence.index)
                        self._stopped.append(sequence)
            if self.on_tokens is not None:
                self.on_tokens(sequences, tokens)


def fitting_blocks(
    shape: ModelShape,
    utilisation: float = 0.9,
    batched_tokens: int = 8192,
    block_tokens: int = 16,
    memory: tuple[int, int] | None = None,
    kv_dtype: str = "auto",
) -> int:
    """KV blocks that fit beside what the GPU holds already (the weights), using the share `utilisation` of its memory.

    `memory` is (free, total) bytes of the GPU in question, else the current one's; `shape` is what that GPU holds; `kv_dtype`
    as in `EngineConfig`.
    Left out of the pool: activations of `batched_tokens` tokens (the widest product and its neighbours), graphs' workspaces.

    Raises:
        InputError: none fits.
    """
    free, total = memory or torch.cuda.mem_get_info()
    activations = int(batched_tokens * (shape.up_width + 2 * shape.mlp + 6 * shape.hidden) * shape.dtype_bytes) + 2**31
    blocks = int((free - total * (1 - utilisation) - activations) // (token_bytes(shape, kv_dtype) * block_tokens))
    if blocks < 1:
        mend = (
            f"no room for a KV cache: {gib(total - free)} of {gib(total)} hold {shape.name}'s weights, its activations need "
            f"{gib(activations)}: raise it, lower max_num_batched_tokens, use int8 or int4 weights, more ranks or a larger GPU"
        )
        raise InputError("engine", "gpu_memory_utilisation", utilisation, mend)
    return blocks
