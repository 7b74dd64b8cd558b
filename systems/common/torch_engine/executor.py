# mypy: disable-error-code="no-untyped-call, no-any-return"
"""The executor that runs the engine's batches with PyTorch, in wall-clock time.

It reads the engine's state (who runs, who decodes) and gives each running sequence a slot and real blocks. Launches are one
step ahead of the GPU: `run` and `decode_run` put step n + 1 on the stream, then wait for step n, so the host's work hides
behind the GPU's. Output lengths are forced, so no decision waits for a token's value; stop tokens are seen one step late and
what came after them is dropped.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.engine.executor import Batch, DecodeRun
from systems.common.engine.sequence import Sequence
from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine import attention
from systems.common.torch_engine.cache import BlockTables, KVCache
from systems.common.torch_engine.flights import Flights
from systems.common.torch_engine.graphs import Steps
from systems.common.torch_engine.lora import AdapterBank
from systems.common.torch_engine.mixed import Inputs, mixed_step, pack
from systems.common.torch_engine.model import Transformer
from systems.common.torch_engine.numerics import Numerics, numerics, rope_table
from systems.common.torch_engine.sampling import Sampling, sample, uniform
from systems.common.torch_engine.weights import Weights

Tokens = NDArray[np.int64]


def random_prompts(vocab: int, seed: int = 0) -> Callable[[Request], Tokens]:
    """Prompts of random tokens, the same for the same seed and request."""

    def prompt(request: Request) -> Tokens:
        return np.random.default_rng([seed, request.index]).integers(0, vocab, request.input_tokens)

    return prompt


class TorchExecutor:
    """See the module.

    Attributes:
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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.shape, self.config, self.clock = shape, config, clock
        self.device = weights.embedding.device
        self.overlap = overlap
        width = config.blocks(max_tokens)
        self.max_tokens = width * config.block_tokens
        given = given or numerics(shape)
        self.cache = _kv_cache(shape, config, width, self.device)
        self.tables = BlockTables(config.max_num_seqs, config.num_gpu_blocks, width, config.block_tokens)
        rope = None if shape.positions else rope_table(shape.head_dim, self.max_tokens, given, self.device)
        self.adapters = None
        if adapters is not None:
            capacity, rank, sites = adapters
            self.adapters = AdapterBank(shape, capacity, rank, config.max_num_seqs, sites, self.device, lora)
        self.model = Transformer(shape, weights, attention.choose(backend, shape, self.cache, rope), given, self.adapters)
        self.steps = Steps(self.model, self.cache, config.max_num_seqs, graphs and self.device.type == "cuda")
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
        self.model.adapted = self._any_adapter([*decoding, *(sequence for sequence, _, _ in batch.chunks)])
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
        greedy, self.model.adapted = self._greedy, self._adapted
        step = self.steps.decode(len(self._rows), greedy)
        tokens = step.tokens
        if not greedy:
            tokens = self._sample(step.logits, step.slots)
            self.steps.commit(step.slots, tokens)
        self.flights.launch(self._decoding, tokens[: len(self._rows)], rows=len(self._rows))
        self.tables.lengths[self._rows] += 1
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

    @torch.inference_mode()
    def warm(self) -> None:
        """Capture the CUDA graphs and plan what else must be planned, so that serving never waits for it."""
        self.steps.warm()
        self.model.attention.warm(self.config.max_num_batched_tokens)
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
        self.steps.slots.copy_(self._to_device(padded))
        self._adapted = self._any_adapter(self._decoding)
        wants = [self._samplings[s.index] for s in self._decoding]
        self._greedy = all(want.temperature == 0 for want in wants)
        if not self._greedy:
            size = len(padded)
            wants += [GREEDY] * (size - len(wants))
            self._want = self._wanted(wants)

    def _any_adapter(self, sequences: list[Sequence]) -> bool:
        return self.adapters is not None and any(s.request.adapter is not None for s in sequences)

    def _grow_tables(self) -> None:
        """A new block for every decoding sequence whose last one is full."""
        places, blocks = self.tables.grow_one(self._rows)
        if len(places):
            both = self._to_device(np.concatenate([places, blocks.astype(np.int64)]))
            self.cache.tables.view(-1).index_copy_(0, both[: len(places)], both[len(places) :].to(torch.int32))

    def _to_device(self, values: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

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
        greedy = all(want.temperature == 0 for want in wants)
        device = self._to_device(packed)
        if graphed:
            step = self.steps.mixed(device, bucket, greedy)
        else:
            host = np.stack([np.cumsum(new) - new, past, new, slots], 1).astype(np.int32)
            step = mixed_step(self.model, self.cache, Inputs.of(device, bucket, host), greedy)
        answer = step.tokens
        if not greedy:
            wants += [GREEDY] * (len(answer) - len(wants))
            temperature, top_p, seeds = self._wanted(wants)
            answer = sample(step.logits, temperature, top_p, uniform(seeds, self.cache.lengths[step.answered].long()))
            self.cache.last_token.index_copy_(0, step.answered, answer)
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
        self._samplings[sequence.index] = self.sampling(sequence.request)

    def _upload_tables(self, slots: list[int], sequences: list[Sequence]) -> None:
        used = int(self.tables.held[slots].max())
        rows = torch.from_numpy(self.tables.tables[slots, :used])
        where = torch.tensor(slots)
        if self.device.type == "cuda":
            rows, where = (x.pin_memory().to(self.device, non_blocking=True) for x in (rows, where))
        self.cache.tables[:, :used].index_copy_(0, where, rows)
        if (bank := self.adapters) is not None:
            mine = [bank.index[s.request.adapter] if s.request.adapter is not None else 0 for s in sequences]
            bank.of_slot.index_copy_(0, where, self._to_device(np.array(mine, np.int64)))

    # ---- tokens

    def _wanted(self, wants: list[Sampling]) -> tuple[Tensor, Tensor | None, Tensor]:
        temperature = torch.tensor([want.temperature for want in wants], device=self.device)
        top_p = torch.tensor([want.top_p for want in wants], device=self.device)
        seeds = torch.tensor([want.seed for want in wants], device=self.device)
        return temperature, top_p if any(want.top_p < 1 for want in wants) else None, seeds

    def _sample(self, logits: Tensor, slots: Tensor) -> Tensor:
        rows = len(logits)
        temperature, top_p, seeds = self._want
        temperature, seeds, top_p = temperature[:rows], seeds[:rows], None if top_p is None else top_p[:rows]
        return sample(logits, temperature, top_p, uniform(seeds, self.cache.lengths[slots].long() + 1))

    def _settle(self, keep: int) -> None:
        """Wait until at most `keep` steps are in flight; hand out the tokens of the others."""
        for sequences, tokens in self.flights.settle(keep):
            for sequence, token in zip(sequences, tokens, strict=True):
                if sequence.index not in self._over:
                    self.outputs[sequence.index].append(token)
                    if token in self._samplings[sequence.index].stop_tokens:
                        self._over.add(sequence.index)
                        self._stopped.append(sequence)
            if self.on_tokens is not None:
                self.on_tokens(sequences, tokens)


GREEDY = Sampling()


def _kv_cache(shape: ModelShape, config: EngineConfig, width: int, device: torch.device) -> KVCache:
    try:
        return KVCache(shape, config.max_num_seqs, config.num_gpu_blocks, width, config.block_tokens, device)
    except torch.OutOfMemoryError as error:
        need = config.num_gpu_blocks * config.block_tokens * shape.kv_bytes_per_token / 2**30
        mend = f"the KV cache needs {need:.1f} GiB, more than the GPU has left beside the weights: lower it"
        raise InputError("engine", "num_gpu_blocks", config.num_gpu_blocks, mend) from error


def fitting_blocks(shape: ModelShape, utilisation: float = 0.9, batched_tokens: int = 8192, block_tokens: int = 16) -> int:
    """KV blocks that fit beside what the GPU holds already (the weights), using the share `utilisation` of its memory.

    Left out of the pool: activations of `batched_tokens` tokens (the widest product and its neighbours), graphs' workspaces.

    Raises:
        InputError: none fits.
    """
    free, total = torch.cuda.mem_get_info()
    activations = int(batched_tokens * (shape.up_width + 2 * shape.mlp + 6 * shape.hidden) * shape.dtype_bytes) + 2**31
    blocks = int((free - total * (1 - utilisation) - activations) // (shape.kv_bytes_per_token * block_tokens))
    if blocks < 1:
        mend = f"{shape.name} and its activations leave no memory for a KV cache: raise it, or use a larger GPU"
        raise InputError("engine", "gpu_memory_utilisation", utilisation, mend)
    return blocks
