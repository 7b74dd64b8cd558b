"""A model with its engine and trainer on one device, kept from trial to trial: starting takes longer than many a trial."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.executor import Bank, fitting_blocks
from systems.common.torch_engine.lora import random_adapter
from systems.common.torch_engine.weights import Weights, random_weights
from systems.llmstation.adapters import AdapterLimited
from systems.llmstation.corun.beside import Beside
from systems.llmstation.corun.driver import Colocated
from systems.llmstation.corun.executor import CoRunExecutor
from systems.llmstation.corun.fusing import Fuser
from systems.llmstation.corun.lanes import Lanes, lanes_of
from systems.llmstation.corun.observed import Observed
from systems.llmstation.corun.pace import Counted
from systems.llmstation.corun.tuner import Tuner
from systems.llmstation.training import Trains
from systems.llmstation.training.trainer import Trainer

PROFILED = (1, 4, 16, 32, 64)
"""Decode batches of the offline profile."""
PROFILE_CONTEXT = 256
PROFILE_TASKLETS = 4
MAX_LORAS = 4
"""The artifact's `max-loras`."""
SERVED_SITES = ("qkv",)
"""Where the artifact's served adapters sit (LoRA on q, k and v)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a session is made of; trials that want the same share it.

    Attributes:
        shape: the model.
        device: `cuda` or `cpu`.
        utilisation: share of the GPU's memory that weights and KV cache may take.
        blocks: KV blocks, or 0 for as many as fit (a GPU only).
        max_tokens: longest request.
        tuning_tokens: length of a tuning sample; 0 for no trainer.
        rank: of the LoRA that is tuned.
        recompute: activation checkpointing in tuning.
        sms: SMs that tuning may use; None for all.
        adapters: LoRA adapters that requests may name, all of `served_rank`.
    """

    shape: ModelShape
    device: str = "cuda"
    utilisation: float = 0.75
    blocks: int = 0
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_tokens: int = 2048
    tuning_tokens: int = 500
    rank: int = 8
    recompute: bool = False
    sms: int | None = None
    adapters: tuple[str, ...] = ()
    served_rank: int = 8


@dataclass(slots=True)
class Session:
    """See the module. `profile` is filled by `profiled`, `fusing` by `fuser`."""

    wanted: Wanted
    config: EngineConfig
    executor: CoRunExecutor
    lanes: Lanes
    weights: Weights
    trainer: Trains | None
    notes: tuple[str, ...]
    profile: Observed | None = field(default=None)
    fusing: Fuser | str | None = field(default=None)

    @classmethod
    def start(cls, wanted: Wanted, trainer: Trains | None = None) -> Session:
        """Weights (random), engine and trainer, warmed up.

        Raises:
            InputError: no such device, or the model and a KV cache do not fit.
        """
        if wanted.device == "cuda" and not torch.cuda.is_available():
            raise InputError("llmstation", "hardware", "cuda", "no GPU here: measure on a GPU host, or use hardware=cpux1")
        shape = wanted.shape
        weights = weights_of(shape, wanted.device)
        if wanted.tuning_tokens and trainer is None:
            trainer = make_trainer(shape, weights, wanted)
        share, limit = wanted.utilisation, wanted.max_num_batched_tokens
        blocks = wanted.blocks or (fitting_blocks(shape, share, limit) if wanted.device == "cuda" else 512)
        config = EngineConfig(blocks, "prefill-first", 16, limit, wanted.max_num_seqs, watermark=0.01)
        lanes = lanes_of(torch.device(wanted.device), wanted.sms)
        sites = (len(wanted.adapters), wanted.served_rank, SERVED_SITES) if wanted.adapters else None
        executor = CoRunExecutor(shape, weights, config, max_tokens=wanted.max_tokens, adapters=sites)
        executor.beside = Beside(lanes)
        if executor.adapters is not None:
            _load_adapters(executor.adapters, wanted)
        if wanted.device == "cuda":
            torch.cuda.synchronize()  # weights and cache were made on another stream
            with lanes.serving():
                executor.warm()
            torch.cuda.synchronize()
        notes = (*_device_notes(wanted.device), *getattr(lanes, "notes", ()), *_engine_notes(executor, config))
        session = cls(wanted, config, executor, lanes, weights, trainer, notes)
        if trainer is not None:
            session.warm_trainer()
        return session

    def warm_trainer(self) -> None:
        """Two samples alone: compiles kernels and captures what trainers capture."""
        tuner = self.tuner()
        while tuner.launched < 2 * tuner.length:
            tuner.wait_for_room()
            tuner.launch()
        tuner.drain()

    def tuner(self, seed: int = 0) -> Tuner:
        """A tuning job from its first sample."""
        assert self.trainer is not None
        tokens = self.wanted.tuning_tokens
        batches = samples(self.wanted.shape, tokens, seed, self.wanted.device)
        return Tuner(self.trainer, batches, self.trainer.plan(1, tokens), self.lanes)

    def colocated(self, beside: Beside) -> Colocated:
        """A fresh engine on this session's executor, tuning by `beside`."""
        engine = Engine(self.config, self.executor, AdapterLimited(MAX_LORAS) if self.wanted.adapters else None)
        self.executor.beside = beside
        self.executor.renew(engine)
        return Colocated(engine, self.executor)

    def fuser(self) -> Fuser | str:
        """Fused steps, captured once; or why there are none."""
        if self.fusing is None:
            try:
                self.fusing = self._make_fuser()
            except (RuntimeError, AssertionError) as error:  # out of memory, or a capture that failed: tuning goes on without
                self.fusing = f"not fused: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        return self.fusing

    def _make_fuser(self) -> Fuser | str:
        if self.wanted.sms is not None:
            return "not fused: tuning is limited to some SMs, a decode step is not"
        trainer = getattr(self.trainer, "trainer", self.trainer)  # a graphed one's own
        if not isinstance(trainer, Trainer):
            return "not fused: this trainer has no forward phase of whole layers"
        fuser = Fuser(trainer, self.executor.steps, self.wanted.tuning_tokens)
        with self.lanes.serving():
            fuser.warm()
        self.executor.may_fuse()
        return fuser

    def profiled(self) -> Observed:
        """The offline profile of co-run latencies, measured once: decode steps with and without tasklets beside them."""
        if self.profile is None:
            observed = Observed(self.wanted.shape.layers, self.wanted.tuning_tokens)
            for count in [count for count in PROFILED if count <= self.wanted.max_num_seqs]:
                self._profile_one(observed, count)
            observed.source.adopt_record()
            self.profile = observed
        return self.profile

    def _profile_one(self, observed: Observed, count: int) -> None:
        context = min(PROFILE_CONTEXT, self.wanted.max_tokens // 2)
        # steps enough for a whole sample, both of its phases, at a few tasklets each and every fourth step alone
        tuner = self.tuner()
        steps = min(context, 2 * len(tuner.trainer.plan(1, self.wanted.tuning_tokens)) // PROFILE_TASKLETS + 8)
        beside = Beside(self.lanes, tuner, Counted(PROFILE_TASKLETS, pause=4), observed)
        requests = [Request(i, 0.0, context, steps) for i in range(count)]
        self.colocated(beside).serve(requests, 120.0)
        tuner.drain()


def make_trainer(shape: ModelShape, weights: Weights, wanted: Wanted) -> Trains:
    """LoRA on q, k and v over the weights that serve."""
    from systems.llmstation.training.adapters import LoraConfig
    from systems.llmstation.training.trainer import Options, Trainer

    options = Options(LoraConfig(wanted.rank), recompute=wanted.recompute, positions=max(2048, wanted.tuning_tokens))
    trainer = Trainer(shape, weights, options)
    if wanted.device != "cuda" or wanted.sms is not None:
        return trainer  # a graph's kernels keep the context they were captured in, and so would ignore a limit on SMs
    from systems.llmstation.training.graphs import GraphedTrainer

    graphed = GraphedTrainer(trainer)  # launched tasklet by tasklet as ever, in microseconds
    graphed.warm(1, wanted.tuning_tokens)
    return graphed


def samples(shape: ModelShape, tokens: int, seed: int, device: str, distinct: int = 16) -> Iterator[Any]:
    """Endless tuning samples of `tokens` random tokens, the same for the same seed; `distinct` of them, in turn."""
    from systems.llmstation.training.trainer import Batch

    rng = np.random.default_rng([seed, tokens])
    ids = torch.from_numpy(rng.integers(0, shape.vocab, (distinct, 1, tokens))).to(device)
    return itertools.cycle([Batch(sample) for sample in ids])


def _load_adapters(bank: Bank, wanted: Wanted) -> None:
    """Random adapters, as unlike each other as trained ones."""
    for seed, name in enumerate(wanted.adapters):
        bank.load(name, random_adapter(wanted.shape, wanted.served_rank, seed, SERVED_SITES, wanted.device))


def _device_notes(device: str) -> tuple[str, ...]:
    if device != "cuda":
        return ("measured on a CPU with a tiny model: not the paper's experiment",)
    return (f"measured on {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}",)


def _engine_notes(executor: CoRunExecutor, config: EngineConfig) -> tuple[str, ...]:
    attention = type(executor.model.attention).__name__
    graphs = f"{len(executor.steps.sizes)} decode graphs" if executor.device.type == "cuda" else "no graphs"
    return (f"attention {attention}, {config.num_gpu_blocks} KV blocks of {config.block_tokens} tokens, {graphs}",)


_WEIGHTS: dict[tuple[ModelShape, str], Weights] = {}


def weights_of(shape: ModelShape, device: str) -> Weights:
    """Random weights, those of the call before if they are of the same model: nobody changes them."""
    if (shape, device) not in _WEIGHTS:
        _WEIGHTS.clear()
        _WEIGHTS[shape, device] = random_weights(shape, 0, device)
    return _WEIGHTS[shape, device]


_KEPT: dict[Wanted, Session] = {}


def session(wanted: Wanted) -> Session:
    """The session for `wanted`: the one of the trial before, or a new one (a GPU holds only one at a time)."""
    if wanted not in _KEPT:
        _KEPT.clear()
        if wanted.device == "cuda":
            import gc

            gc.unfreeze()
            gc.collect()
            torch.cuda.empty_cache()
        _KEPT[wanted] = Session.start(wanted)
    return _KEPT[wanted]
