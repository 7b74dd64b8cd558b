"""Attention backends on one GPU: the same numbers, and how long they take.

    python benchmarks/attention_backends.py --out DIR [--limit-s 60] [--sections decode,prefill,...] [--model llama-3.1-8b]

Attention of all layers of the model over a random cache, without the rest of it. Each section is tried, what goes wrong is its
finding, and DIR/attention_backends.json is written after each; one that would not end within `--limit-s` is left out.
FlashInfer compiles its kernels (fa2, fa3) in processes of their own meanwhile; without it its rows hold the reason. Sections:

* `int8`: decode steps over a cache in int8: 1, 32 and 128 rows at contexts of 512, 128 uneven ones, 32 rows at 2,048.
* `decode`: the same over a cache in the model's format, by our kernel and FlashInfer's, its plan on the host beside it.
* `prefill`: prompts of 512 and 2,048 tokens, and a chunk of 512 behind 1,536.
* `engine`: the whole model: decode steps as served and prompts, tokens compared (random weights; not by default).

`off` is the distance of an output from float64 attention over what the cache holds, relative. Times are microseconds per layer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.models import ModelShape, model
from systems.common.torch_engine.attention import Attention, Chunks, FlashInferAttention, TritonAttention, rotate
from systems.common.torch_engine.cache import KVCache, unrounded
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.kernels.triton_guard import triton
from systems.common.torch_engine.numerics import numerics, rope_table
from systems.common.torch_engine.weights import random_weights

SECTIONS = ("int8", "decode", "prefill")
COSTS_S = {"decode": 10, "int8": 8, "prefill": 8, "engine": 40}
ROWS, CONTEXT, LONG, SLOTS = (1, 32, 128), 512, 2048, 128
BLOCK = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU shows that the script runs, in Triton's interpreter


def on_gpu(work: Callable[[], object], runs: int = 20) -> float:
    """Median milliseconds of `work` as a CUDA graph."""
    if DEVICE == "cpu":
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(runs + 3):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def off(found: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Bench:
    """The run: one cache at a time, and what was found."""

    def __init__(self, shape: ModelShape, out: Path, limit_s: float) -> None:
        self.shape, self.out, self.began, self.limit_s = shape, out, time.monotonic(), limit_s
        self.found: dict[str, Any] = {}
        self.rope = rope_table(shape.head_dim, LONG + 2 * BLOCK, numerics(shape), DEVICE)
        self.width = shape.q_width + 2 * shape.kv_width
        self.compiling: dict[str, subprocess.Popen[bytes]] = {}
        self.cache: KVCache | None = None

    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.limit_s - (time.monotonic() - self.began)

    def keep(self, name: str, value: object) -> None:
        """Note a finding and write all of them."""
        self.found[name] = value
        self.out.mkdir(parents=True, exist_ok=True)
        new = self.out / "attention_backends.json.new"
        new.write_text(json.dumps(self.found, indent=1))
        new.replace(self.out / "attention_backends.json")
        print(f"== {name} ({self.left_s():.0f} s left): {json.dumps(value)}", flush=True)

    def tried(self, work: Callable[[], object]) -> object:
        """What `work` finds, or what went wrong."""
        try:
            return work()
        except Exception as error:  # one must not take the others along
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    def section(self, name: str, work: Callable[[], object]) -> None:
        """Run one section if there is time for it."""
        if self.left_s() < COSTS_S.get(name, 0):
            self.keep(name, {"skipped": f"{self.left_s():.0f} s left"})
            return
        self.keep(name, self.tried(work))
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()

    # ---- FlashInfer's compiler

    def compile(self) -> object:
        """Have FlashInfer compile what decode steps and prompts need, beside what follows here."""
        small = KVCache(replace(self.shape, layers=1), 1, 1, 1, BLOCK, DEVICE)
        if (lack := FlashInferAttention.lacks(self.shape, small)) is not None:
            return {"error": f"needs {lack}"}
        for kind in ("fa2", "fa3"):
            command = [sys.executable, __file__, "--out", str(self.out), "--model", self.shape.name, "--compile", kind]
            self.compiling[kind] = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        return {"version": __import__("flashinfer").__version__}

    def ready(self, kind: str, spare_s: float) -> bool:
        """Wait for kernels of `kind`, but leave `spare_s`."""
        if kind not in self.compiling:
            return False
        try:
            done = self.compiling[kind].wait(max(0.0, self.left_s() - spare_s)) == 0
        except subprocess.TimeoutExpired:
            done = False
        self.keep(f"{kind} ready", {"done": done, "at_s": time.monotonic() - self.began})
        return done

    def end(self) -> None:
        """Leave no compiler behind."""
        for process in self.compiling.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    # ---- caches and backends

    def filled(self, kv_dtype: str) -> KVCache:
        """A cache of random numbers, each slot with scattered blocks for `LONG` tokens of few rows or `CONTEXT` of many."""
        if self.cache is not None and (self.cache.k_scale is not None) == (kv_dtype == "int8"):
            return self.cache
        self.cache = None
        torch.cuda.empty_cache()
        width = LONG // BLOCK + 2
        blocks = SLOTS * (2 * CONTEXT // BLOCK + 2)
        cache = KVCache(self.shape, SLOTS, blocks, width, BLOCK, DEVICE, kv_dtype)
        for x, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            if scale is None:
                for layer in x:
                    layer.normal_()
            else:
                for layer in x:
                    layer.random_(-127, 128)
                scale.uniform_(0.5 / 127, 3 / 127)
        self.order = np.random.default_rng(0).permutation(blocks).astype(np.int32) + 1
        self.cache = cache
        return cache

    def flashinfer(self, cache: KVCache, prefill: str = "fa2") -> FlashInferAttention:
        """The backend, or an error that says what is missing."""
        if (lack := FlashInferAttention.lacks(self.shape, cache)) is not None:
            raise RuntimeError(f"needs {lack}")
        return FlashInferAttention(self.shape, cache, self.rope, prefill)

    def hold(self, cache: KVCache, backend: Attention, lengths: list[int]) -> Tensor:
        """Give slots 0, 1, ... the contexts `lengths`; the slots."""
        counts = [-(-(n + 1) // BLOCK) for n in lengths]
        tables = np.zeros((SLOTS + 1, cache.tables.shape[1]), np.int32)
        at = 0
        for slot, count in enumerate(counts):
            tables[slot, :count] = self.order[at : at + count]
            at += count
        cache.tables.copy_(torch.from_numpy(tables))
        cache.lengths.zero_()
        cache.lengths[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        if backend.mirror is not None:
            backend.mirror.tables[:], backend.mirror.rows = tables, np.arange(len(lengths))
            backend.mirror.lengths[:] = 0
            backend.mirror.lengths[: len(lengths)] = lengths
        return torch.arange(len(lengths), device=DEVICE)

    def qkv(self, tokens: int) -> Tensor:
        """Random products."""
        generator = torch.Generator(DEVICE).manual_seed(tokens)
        return torch.randn(tokens, self.width, device=DEVICE, generator=generator).to(torch.bfloat16)

    def truth(self, cache: KVCache, qkv: Tensor, layer: int, slot: int, past: int) -> Tensor:
        """Float64 attention of the tokens after `past` of a slot over what the cache holds; [tokens, heads * head_dim]."""
        shape, tokens = self.shape, len(qkv)
        blocks = cache.tables[slot, : -(-(past + tokens) // BLOCK)].long()
        held, scales = (cache.k[layer][blocks], cache.v[layer][blocks]), cache.scales(layer)
        if scales is not None:
            held = tuple(unrounded(x, s[blocks], torch.float64) for x, s in zip(held, scales, strict=True))
        group = shape.heads // shape.kv_heads
        k, v = (x.transpose(0, 1).flatten(1, 2)[:, : past + tokens].double().repeat_interleave(group, 0) for x in held)
        q = rotate(qkv.view(tokens, -1, shape.head_dim)[:, : shape.heads], self.rope[past : past + tokens]).double()
        score = torch.einsum("qhd,hkd->hqk", q, k) * shape.head_dim**-0.5
        later = torch.ones(tokens, past + tokens, dtype=torch.bool, device=DEVICE).triu(past + 1)
        return torch.einsum("hqk,hkd->qhd", score.masked_fill_(later, float("-inf")).softmax(-1), v).reshape(tokens, -1)

    # ---- sections

    @torch.inference_mode()
    def step(self, cache: KVCache, backend: Attention, lengths: list[int]) -> dict[str, float]:
        """A decode step's attention over all layers."""
        slots, layers = self.hold(cache, backend, lengths), self.shape.layers
        if backend.mirror is not None:
            backend.plan(len(lengths), True)
        backend.decode(self.qkv(len(lengths)), 0, slots)  # compiles, and is layer 0 for backends that keep its plan
        layer, fresh = layers // 2, self.qkv(len(lengths))
        out = backend.decode(fresh.clone(), layer, slots)
        some = range(0, len(lengths), max(1, len(lengths) // 8))
        found = {"off": max(off(out[i], self.truth(cache, fresh[i : i + 1], layer, i, lengths[i])[0]) for i in some)}
        products = [self.qkv(len(lengths)) for _ in range(layers)]
        found["us"] = on_gpu(lambda: [backend.decode(x, i, slots) for i, x in enumerate(products)]) / layers * 1e3
        if backend.mirror is not None:
            times = []
            for _ in range(20):
                torch.cuda.synchronize()
                began = time.perf_counter()
                backend.plan(len(lengths), True)
                times.append(time.perf_counter() - began)
            found["plan_us_a_step"] = statistics.median(times) * 1e6
        return found

    def steps(self, cache: KVCache, backend: Attention, long: bool) -> dict[str, object]:
        """Decode steps of all kinds."""
        found: dict[str, object] = {}
        for rows in ROWS:
            found[f"{rows} x {CONTEXT}"] = self.tried(lambda rows=rows: self.step(cache, backend, [CONTEXT] * rows))
        uneven = np.random.default_rng(1).integers(16, 2 * CONTEXT - 16, SLOTS).tolist()
        found[f"{SLOTS} uneven"] = self.tried(lambda: self.step(cache, backend, uneven))
        if long:
            found[f"32 x {LONG}"] = self.tried(lambda: self.step(cache, backend, [LONG] * 32))
        return found

    def decode(self) -> object:
        """Our kernel and FlashInfer's."""
        cache = self.filled("auto")
        found: dict[str, object] = {"triton": self.steps(cache, TritonAttention(self.shape, cache, self.rope), True)}
        self.keep("decode", found)
        if self.ready("fa2", COSTS_S["prefill"] / 2):
            found["flashinfer"] = self.tried(lambda: self.steps(cache, self.flashinfer(cache), True))
        return found

    def int8(self) -> object:
        """Our kernel over an int8 cache."""
        cache = self.filled("int8")
        return {"triton": self.steps(cache, TritonAttention(self.shape, cache, self.rope), True)}

    @torch.inference_mode()
    def prompt(self, cache: KVCache, backend: Attention, past: int, new: int) -> dict[str, float]:
        """Attention of one prompt chunk over all layers but the first."""
        self.hold(cache, backend, [past + new - 1])
        chunks, layers = Chunks.of([past], [new], [0], DEVICE), self.shape.layers
        fresh = self.qkv(new)
        out = backend.prefill(fresh.clone(), 0, chunks)
        found = {"off": off(out, self.truth(cache, fresh, 0, 0, past))}
        products = [self.qkv(new) for _ in range(layers)]
        work = lambda: [backend.prefill(x, i, chunks) for i, x in enumerate(products) if i]  # noqa: E731
        found["us"] = on_gpu(work) / (layers - 1) * 1e3
        return found

    def prefill(self) -> object:
        """Whole prompts and a chunk: cuDNN and our kernel, FlashInfer's fa2 and fa3."""
        cache = self.filled("auto")
        makers: dict[str, Callable[[], Attention]] = {
            "triton": lambda: TritonAttention(self.shape, cache, self.rope),
        }
        for kind in ("fa2", "fa3"):
            if self.ready(kind, 4.0):
                makers[f"flashinfer {kind}"] = lambda kind=kind: self.flashinfer(cache, kind)
        found: dict[str, object] = {}
        for name, make in makers.items():
            kinds = ((0, 512), (0, 2048), (1536, 512))
            found[name] = {
                f"{new} after {past}": self.tried(lambda make=make, past=past, new=new: self.prompt(cache, make(), past, new))
                for past, new in kinds
            }
            self.keep("prefill", found)
        return found

    def engine(self) -> object:
        """Whole models: decode steps as served, prompts, and whether the tokens agree."""
        self.cache = None
        torch.cuda.empty_cache()
        weights, found = random_weights(self.shape, 0, DEVICE), {}
        config = EngineConfig(6000, max_num_batched_tokens=2048, max_num_seqs=SLOTS)
        kinds = {"triton": {}, "flashinfer": {"backend": "flashinfer"}, "triton int8 cache": {}}
        tokens: dict[str, list[list[int]]] = {}
        for name, options in kinds.items():

            def run(name: str = name, options: dict[str, Any] = options) -> dict[str, object]:
                kv_dtype = "int8" if "int8" in name else "auto"
                limits = replace(config, kv_dtype=kv_dtype)
                began = time.perf_counter()
                live = Live.build(self.shape, weights, limits, max_tokens=4096, **options)
                live.executor.steps.mixed_rows = []  # as FlashInfer has none: prompts are not what is compared here
                live.executor.warm()
                result: dict[str, object] = {"warm_s": time.perf_counter() - began, **live.executor.choices}
                tokens[name] = live.generate([Request(i, 0.0, 100 + i, 24) for i in range(16)])[1]
                pairs = [(a, b) for x, y in zip(tokens[name], tokens["triton"], strict=True) for a, b in zip(x, y, strict=True)]
                result["tokens as triton's"] = sum(a == b for a, b in pairs) / len(pairs)
                for rows in ROWS:
                    first = len(live.executor.flights.ended_s)
                    live.generate([Request(1000 * rows + i, 0.0, CONTEXT - 16, 40) for i in range(rows)])
                    periods = np.diff(live.executor.flights.ended_s[first:])[-32:]
                    result[f"decode {rows} ms"] = float(np.median(periods)) * 1e3
                return result

            found[name] = self.tried(run)
            self.keep("engine", found)
            gc.unfreeze()
            gc.collect()
            torch.cuda.empty_cache()
        return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--limit-s", type=float, default=60.0)
    parser.add_argument("--compile", choices=("fa2", "fa3"), help="only have FlashInfer compile these kernels for prompts")
    options = parser.parse_args()
    shape = model(options.model).with_dtype("bf16")
    if options.compile:
        small = replace(shape, layers=1)
        FlashInferAttention(small, KVCache(small, 1, 4, 4, BLOCK, DEVICE), None, options.compile).warm(BLOCK)
        return
    bench = Bench(shape, options.out, options.limit_s)
    machine = {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton.__version__ if triton is not None else None,
        "command": sys.argv,
        "model": shape.name,
    }
    bench.keep("machine", machine)
    try:
        bench.keep("flashinfer", bench.tried(bench.compile))
        for name in options.sections.split(","):
            bench.section(name, getattr(bench, name))
    finally:
        bench.end()


if __name__ == "__main__":
    main()
