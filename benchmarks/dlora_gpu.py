"""dLoRA's LoRA engine on one GPU: exactness and speed, against floors measured in the same run.

    python -m benchmarks.dlora_gpu [--model llama-2-7b] [--seed 0] [--out FILE] [--parts correct,merge,...] [--limit-s 240]

Random weights of the model's shape, random adapters of rank 16 on all four sites. A part that fails says so and the next goes
on; the file is written after each. Without a GPU the tiny model runs, so that the script itself can be tried. Parts, in order:

* `correct`: two layers in 16 bits against each request alone in float32: all back ends, both schemes.
* `merge`: merge, unmerge and a -> b of all layers, by kernel (several tilings) and addmm, in place and by copy; restoring.
* `decode`: batch 16, context 512, by CUDA graphs: merged; unmerged with 1 to 16 adapters in the batch and 8 to 128 resident.
* `figure5`: base product and LoRA branch by batch size, host- and GPU-timed.
* `constants`: t_m, t_u and c_sw as the scheduler gets them, eager and by graphs.
* `prefetch`: the first step after a miss: layer by layer, whole, prefetched, and with nothing missing.
* `hidden`: unmerged steps while a merge runs aside.
* `drift`: 10,000 switches on two layers.
* `iterations`, `policies`, `heldout`, `adapters`: a replica that serves (benchmarks/dlora_serving.py); they share one runner.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import dlora_serving
from benchmarks.dlora_serving import SLOTS, random_host_adapter, serving_runner
from harness.atomic import write_atomically
from systems.common.engine.config import EngineConfig
from systems.common.models import ModelShape, model
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.kernels.merge_lora import MergeTiling
from systems.common.torch_engine.lora import Adapter, matrices, merge, random_adapter
from systems.common.torch_engine.numerics import DTYPES
from systems.common.torch_engine.weights import Weights, random_weights
from systems.dlora.lora_engine.bank import SITES, SlotBank
from systems.dlora.lora_engine.constants import measure_constants
from systems.dlora.lora_engine.passes import Passes
from systems.dlora.lora_engine.runner import LoraRunner
from systems.dlora.lora_engine.switching import Copy, InPlace, drift_bound, layer_bytes

SERVING = ("iterations", "policies", "heldout", "adapters")
PARTS = ("correct", "merge", "decode", "figure5", "constants", "prefetch", "hidden", "drift", *SERVING)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RUNS = 20 if GPU else 2
RANK, ROWS, CONTEXT = 16, 16, 512
BACKENDS = ("grouped", "bmm", "einsum") if GPU else ("bmm", "einsum")
TILINGS = tuple(
    MergeTiling(*t)
    for t in ((64, 256, 8), (64, 128, 4), (32, 128, 4), (32, 128, 2), (64, 64, 4), (64, 64, 2), (128, 64, 4), (32, 64, 2))
)
"""Rows, columns and warps that `merge` tries. On an H200 64 x 256 by 4 warps took 2.8 floors and 128 x 128 by 8 took 1.9."""
SWITCHES = 10_000 if GPU else 200


# ---- measuring


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, milliseconds."""
    low, middle, high = statistics.quantiles([s * 1e3 for s in seconds], n=4)
    return {"ms": middle, "low_ms": low, "high_ms": high, "runs": len(seconds)}


def wait() -> None:
    """Until the device has done all that was launched."""
    if GPU:
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds of the host's clock, device included."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def on_gpu(work: Callable[[], object], runs: int = RUNS, before: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Time of `work` between two events on the device, `before` left out; the host's clock without a GPU."""
    times = []
    for _ in range(runs + 3):
        before()
        if not GPU:
            times.append(timed(work))
            continue
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return spread(times[3:])


def clean() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


# ---- what is measured


class Bench:
    """A model on the device, and what the parts share."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.shape, self.seed = shape, seed
        self.small = replace(shape, layers=2)
        self.weights = random_weights(shape, seed, DEVICE)
        self.server: LoraRunner | None = None
        self.ends_s = math.inf
        source = torch.empty(2**32 if GPU else 2**20, dtype=torch.uint8, device=DEVICE).random_()
        target = torch.empty_like(source)
        self.copy_bytes_per_s = 2 * source.numel() / on_gpu(lambda: target.copy_(source))["ms"] * 1e3

    def live(self, shape: ModelShape, weights: Weights, places: int = ROWS, **options) -> Live:
        """An engine for 16 requests (or `places`) of up to 1,024 tokens."""
        blocks = 1100 if places == ROWS else 2000
        config = EngineConfig(blocks if GPU else 200, max_num_batched_tokens=2048, max_num_seqs=places)
        return Live.build(shape, weights, config, max_tokens=1024 if GPU else 128, **options)

    def bank(self, shape: ModelShape, capacity: int, backend: str = "auto", beside: bool = True) -> SlotBank:
        """A bank whose slots all hold random adapters."""
        bank = SlotBank(shape, capacity, RANK, ROWS, SITES, DEVICE, backend, beside)
        for site in SITES:
            bank.a[site].normal_(0, bank.a[site].shape[-1] ** -0.5)
            bank.b[site].normal_(0, 0.1 * RANK**-0.5)
            bank.a[site][:, 0] = 0
            bank.b[site][:, 0] = 0
            if bank.turned:
                bank.turned[site].copy_(bank.b[site].transpose(2, 3))
        return bank

    def runner(self, capacity: int, known: int, places: int = ROWS, **options) -> LoraRunner:
        """A runner by copy with `known` random adapters in host memory."""
        bank = SlotBank(self.shape, capacity, RANK, places, SITES, DEVICE)
        live = self.live(self.shape, self.weights, places, **options)
        runner = LoraRunner(live, bank, Copy(self.weights, Passes(bank)))
        one = random_host_adapter(bank)
        for i in range(known):  # the numbers do not matter here: all names share one adapter's memory
            runner.add(f"a{i}", one)
        return runner


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """A copy in another format."""
    weights = copy.deepcopy(weights)
    weights.embedding, weights.head = weights.embedding.to(dtype), weights.head.to(dtype)
    for norm in [weights.norm, *(n for layer in weights.layers for n in (layer.norm1, layer.norm2))]:
        norm.gain = norm.gain.to(dtype)
    for layer in weights.layers:
        for matrix in matrices(layer).values():
            matrix.weight = matrix.weight.to(dtype)
    return weights


@torch.inference_mode()
def prompt_logits(live: Live, tokens: list[int]) -> torch.Tensor:
    """Logits after the last of `tokens`, by the base path."""
    return live.executor.half.score(np.array(tokens, np.int64))[-1].float()


@torch.inference_mode()
def row_logits(runner: LoraRunner, rows: list[int], merged: str | None) -> torch.Tensor:
    """Logits of the next decode step of `rows`, eagerly, without taking it."""
    executor = runner.live.executor
    slots = torch.tensor([runner.requests[i].slot for i in rows], device=DEVICE)
    runner.model.adapted = merged is None
    runner.model.weights = runner.scheme.for_merged if merged else runner.scheme.for_unmerged
    return runner.model.decode(executor.cache.last_token[slots], executor.cache.lengths, slots).float()


def correct(bench: Bench) -> dict[str, object]:
    """Relative error of logits against each request alone in float32 with its adapter merged in float32.

    `base`: the same in 16 bits without adapters, which is what rounding alone does. Prompts are served unmerged by the back
    end, then one decode step's logits are compared; merged ones have their prompt served merged.
    """
    shape, exact = bench.small, bench.small.with_dtype("fp32")
    weights = random_weights(shape, bench.seed, DEVICE)
    adapters = {f"a{i}": random_adapter(shape, RANK, i, SITES, DEVICE) for i in range(4)}
    names = [f"a{i % 4}" for i in range(8)]
    prompts = [np.random.default_rng(i).integers(0, shape.vocab, 20 + 7 * i) for i in range(8)]

    def reference(name: str, first: int, i: int) -> torch.Tensor:
        if (name, i) not in references:
            wide = cast(weights, torch.float32)
            if name:
                told = adapters[name]
                merge(exact, wide, Adapter({m: (a.float(), b.float()) for m, (a, b) in told.modules.items()}, told.scale))
            references[name, i] = bench.live(exact, wide, graphs=False, backend="reference")
        return prompt_logits(references[name, i], [*prompts[i].tolist(), first])

    references: dict[tuple[str, int], Live] = {}

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    report: dict[str, object] = {}
    base = bench.live(shape, weights, graphs=False)
    first = int(prompts[0][0])
    report["base"] = error(prompt_logits(base, [*prompts[0].tolist(), first]), reference("", first, 0))
    for backend in BACKENDS:
        for scheme in ("copy", "in-place"):
            runner = LoraRunner.build(
                shape, copy.deepcopy(weights), base.engine.config, 4, RANK, backend=backend, scheme=scheme,
                max_tokens=base.executor.max_tokens,
            )  # fmt: skip
            for name, adapter in adapters.items():
                runner.add(name, Adapter({m: (a.cpu(), b.cpu()) for m, (a, b) in adapter.modules.items()}, adapter.scale))
            for i, name in enumerate(names):
                runner.admit(i, prompts[i], name)
            first_tokens = runner.step(list(range(8)), [])
            unmerged = row_logits(runner, list(range(8)), None)
            graphed = runner.step([], list(range(8)))
            found: dict[str, object] = {
                "unmerged": [error(unmerged[i], reference(names[i], first_tokens[i], i)) for i in range(4)],
                "graph_equals_eager": sum(int(unmerged[i].argmax()) == graphed[i] for i in range(8)),
            }
            merged_errors = []
            for i in range(4):
                runner.admit(10 + i, prompts[i], names[i])
                token = runner.step([10 + i], [], names[i])[10 + i]
                logits = row_logits(runner, [10 + i], names[i])[0]
                merged_errors.append(error(logits, reference(names[i], token, i)))
            found["merged"] = merged_errors
            report[f"{backend}, {scheme}"] = found
            references.clear()
            del runner
            clean()
    return report


def merging(bench: Bench) -> dict[str, object]:
    """All layers; `floor_ms`: read and write of the matrices at the copy bandwidth."""
    weights = bench.weights
    bank = bench.bank(bench.shape, 2)
    floor_ms = 2 * layer_bytes(weights) / bench.copy_bytes_per_s * 1e3
    report: dict[str, object] = {"layer_bytes": layer_bytes(weights), "floor_ms": floor_ms}
    hows: list[tuple[str, Passes]] = [("addmm", Passes(bank, "addmm")), ("plain", Passes(bank, "plain"))]
    if GPU:
        hows = [("addmm", Passes(bank, "addmm")), ("kernel eager", Passes(bank, "kernel", graphs=False))]
        hows += [(f"kernel {t.bn}x{t.bk} {t.warps} warps", Passes(bank, "kernel", t)) for t in TILINGS]
    for name, passes in hows:
        try:
            times = {
                kind: on_gpu(partial(passes.run, weights, weights, take, put), 10 if GPU else 2)
                for kind, take, put in (("merge", 0, 1), ("unmerge", 1, 0), ("a_to_b", 1, 2), ("b_to_a", 2, 1))
            }
            times["host_ms"] = {"ms": timed(partial(passes.run, weights, weights, 1, 2)) * 1e3}
            passes.run(weights, weights, 2, 1)
            report[name] = {**times, "a_to_b_over_floor": times["a_to_b"]["ms"] / floor_ms}
        except Exception as error:
            report[name] = {"error": repr(error)}
    bench.weights = weights = None  # type: ignore[assignment]  # off by all those roundings
    clean()
    bench.weights = weights = random_weights(bench.shape, bench.seed, DEVICE)
    report["copy"] = copying(weights, bank, floor_ms)
    clean()
    if GPU:
        began = time.perf_counter()
        in_place = InPlace(weights, Passes(bank))
        report["keep_in_host_memory_s"] = time.perf_counter() - began
        report["restore_s"] = timed(in_place.restore)
    return report


def copying(weights: Weights, bank: SlotBank, floor_ms: float) -> dict[str, float]:
    """A merge into the copy, as the runner does it."""
    scheme, slots = Copy(weights, Passes(bank)), iter([1, 2] * 100)
    found = on_gpu(lambda: scheme.merge(next(slots)))
    return {**found, "over_floor": found["ms"] / floor_ms}


def decoding(bench: Bench) -> dict[str, object]:
    """Decode steps by graph between two events; every slot of the bank holds an adapter, the batch uses some of them."""
    report: dict[str, object] = {}
    context = CONTEXT if GPU else 32
    for backend, residents, beside in [
        *((backend, residents, True) for residents in ((8, 32, 128) if GPU else (4,)) for backend in BACKENDS),
        *([("grouped", 16, True), ("grouped", 16, False)] if GPU else []),
    ]:
        name = f"{backend}, {residents} resident" + ("" if beside else ", not beside")
        try:
            clean()
            bank = bench.bank(bench.shape, residents, backend, beside)
            passes = Passes(bank)
            runner = LoraRunner(bench.live(bench.shape, bench.weights), bank, InPlace(bench.weights, passes, 0))
            report[name] = decode_times(runner, context, residents)
            del runner, passes, bank
        except Exception as error:
            report[name] = {"error": repr(error)}
    return report


@torch.inference_mode()
def decode_times(runner: LoraRunner, context: int, residents: int) -> dict[str, object]:
    """Merged, and unmerged by adapters in the batch, by graph; both eagerly too."""
    executor, bank, half = runner.live.executor, runner.bank, runner.half
    rows = np.array([executor.tables.take_slot() for _ in range(ROWS)], np.int64)
    for slot in rows:
        executor.tables.grow(int(slot), context + 64)
    used = int(executor.tables.held[rows].max())
    half.tables(rows, executor.tables.tables[rows, :used].astype(np.int64).ravel(), np.zeros(ROWS, np.int64))
    half.rows(rows, np.empty(0, np.int64))
    places = torch.from_numpy(rows).to(DEVICE)

    def fresh() -> None:
        executor.cache.lengths[places] = context

    fresh()
    times: dict[str, object] = {"merged": (merged := on_gpu(lambda: half.decode(ROWS, True, False), before=fresh))}
    for count in (1, 2, 4, 8, 16):
        if count > residents:
            break
        bank.of_slot[places] = torch.arange(ROWS, device=DEVICE) % count + 1
        found = on_gpu(lambda: half.decode(ROWS, True, True), before=fresh)
        times[f"{count} adapters"] = {**found, "over_merged": found["ms"] / merged["ms"]}

    def eagerly(adapted: bool) -> None:
        runner.model.adapted = adapted
        runner.model.decode(executor.cache.last_token[places], executor.cache.lengths, places)

    times["eager merged"] = {"ms": statistics.median(timed(lambda: eagerly(False)) for _ in range(7)) * 1e3}
    times["eager unmerged"] = {"ms": statistics.median(timed(lambda: eagerly(True)) for _ in range(7)) * 1e3}
    return times


@torch.inference_mode()
def figure5(_: Bench) -> dict[str, object]:
    """Wx (4096 x 4096) and BAx (rank 16), microseconds; the paper's are float32, host-timed with a synchronisation each."""
    width, repeats = (4096, 1000) if GPU else (256, 20)
    torch.set_float32_matmul_precision("highest")
    series = []
    for dtype in (torch.float32, torch.bfloat16):
        w, a, b = (torch.randn(*s, device=DEVICE, dtype=dtype) for s in ((width, width), (width, RANK), (RANK, width)))
        for batch in range(2, 17, 2):
            x = torch.randn(batch, width, device=DEVICE, dtype=dtype)
            for name, work in (("Wx", partial(torch.matmul, x, w)), ("BAx", lambda x=x, a=a, b=b: (x @ a) @ b)):
                for _ in range(200 if GPU else 1):
                    work()
                host_us = statistics.median(timed(work) for _ in range(repeats)) * 1e6
                point = {"dtype": str(dtype)[6:], "batch": batch, "series": name, "host_us": host_us}
                if GPU:
                    point["gpu_us"] = graph_us(work)
                series.append(point)
    return {"points": series, "repeats": repeats, "width": width, "rank": RANK}


def graph_us(work: Callable[[], object], count: int = 100) -> float:
    """Microseconds of `work` on the GPU: a graph of many, one after another (so operands may sit in L2)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            work()
    return on_gpu(graph.replay, 10)["ms"] * 1e3 / count


def constants(bench: Bench) -> dict[str, object]:
    """What `measure_constants` tells the scheduler."""
    report: dict[str, object] = {}
    for name, options in (("graphs", {}), ("eager", {"graphs": False})):
        runner = bench.runner(8 if GPU else 2, 8 if GPU else 3, **options)
        found = measure_constants(runner, ROWS if GPU else 4, RUNS)
        report[name] = {**asdict(found), "t_m_over_t_u": found.t_merged_s / found.t_unmerged_s}
        del runner
        clean()
    return report


def prefetching(bench: Bench) -> dict[str, object]:
    """A step of 16 decoding requests, one of whose adapters is not resident; and a prompt of such an adapter."""
    runner = bench.runner(4, 8)
    report: dict[str, object] = {"adapter_bytes": runner.store.host["a0"].bytes}
    rows = list(range(ROWS - 1))
    for i in rows:
        runner.admit(i, np.arange(32) + i, f"a{i % 3}")
    runner.step(rows, [])
    others = [f"a{i}" for i in range(3, 8)]

    def decode_with(name: str, ahead: bool = False) -> float:
        runner.admit(100, np.arange(40), name)
        merged_prompt = runner.step([100], [], None)  # its prompt brings it in
        assert merged_prompt
        for other in others:  # and others drive it out again
            if other != name:
                runner.store.fetch([f"a{i}" for i in range(3)] + [other])
        wait()
        if not ahead:
            seconds = timed(lambda: runner.step([], [*rows, 100]))
        else:
            runner.launch([], rows)
            runner.prefetch([f"a{i}" for i in range(3)] + [name])
            wait()
            seconds = timed(lambda: runner.step([], [*rows, 100]))
        runner.finish(100)
        return seconds

    def prompt_with(name: str, hit: bool) -> float:
        tokens = np.arange(1500 if GPU else 60) % 99
        runner.admit(100, tokens[: 900 if GPU else 60], name)
        if hit:
            runner.store.fetch([name])
        else:
            for other in others:
                if other != name:
                    runner.store.fetch([f"a{i}" for i in range(3)] + [other])
        wait()
        seconds = timed(lambda: runner.step([100], []))
        runner.finish(100)
        return seconds

    def several(work: Callable[[str], float]) -> dict[str, float]:
        return spread([work(others[i % len(others)]) for i in range(10 if GPU else 4)][2:])

    report["copy alone"] = several(lambda name: timed(lambda: runner.store.fetch([name])))
    report["decode, all resident"] = spread([timed(lambda: runner.step([], rows)) for _ in range(10)][2:])
    for way in ("whole", "layers"):
        runner.wait = way
        report[f"decode after a miss, {way}"] = several(decode_with)
        report[f"prompt of 900 after a miss, {way}"] = several(partial(prompt_with, hit=False))
    report["prompt of 900, resident"] = several(partial(prompt_with, hit=True))
    runner.wait = "auto"
    report["decode, prefetched during the step before"] = several(partial(decode_with, ahead=True))
    return report


def hidden(bench: Bench) -> dict[str, object]:
    """Host times of unmerged steps: alone; with a merge aside; and of the step that a merge holds up."""
    runner = bench.runner(4, 4)
    rows = list(range(ROWS))
    for i in rows:
        runner.admit(i, np.arange(32) + i, f"a{i % 4}")
    runner.step(rows, [])
    for name in ("a0", "a1"):
        runner.prepare_merged(name)
        for _ in range(3):
            runner.step([], rows)
    report: dict[str, object] = {"unmerged step": spread([timed(lambda: runner.step([], rows)) for _ in range(RUNS)])}
    beside, counts, totals, stalls = [], [], [], []
    for i in range(10 if GPU else 3):
        wait()
        began = time.perf_counter()
        runner.prepare_merged(f"a{i % 2}" if runner.merged != f"a{i % 2}" else f"a{(i + 1) % 2}", ahead=True)
        count = 0
        while not runner.merge_done() or not count:
            beside.append(timed_step(runner, rows))
            count += 1
        counts.append(count)
        totals.append(time.perf_counter() - began)
    for i in range(10 if GPU else 3):
        stalls.append(timed(lambda i=i: (runner.prepare_merged(f"a{2 + i % 2}"), runner.step([], rows))))
    report["unmerged step beside a merge"] = spread(beside) if len(beside) > 1 else beside
    report["steps taken while it ran"] = counts
    report["merge beside steps, in all"] = spread(totals)
    report["step held up by a merge"] = spread(stalls)
    return report


def timed_step(runner: LoraRunner, rows: list[int]) -> float:
    """A step on the host's clock, without waiting for other streams."""
    began = time.perf_counter()
    runner.step([], rows)
    return time.perf_counter() - began


def drifting(bench: Bench) -> dict[str, object]:
    """Two layers, `SWITCHES` changes between two adapters and none."""
    report: dict[str, object] = {"switches": SWITCHES}
    for kind in ("fp16", "bf16"):
        shape = bench.small.with_dtype(kind)
        bank, dtype = bench.bank(shape, 2), DTYPES[kind]
        pristine = random_weights(shape, bench.seed, DEVICE)
        by_copy = Copy(copy.deepcopy(pristine), Passes(bank))
        by_copy.merge(1)
        first = copy.deepcopy(by_copy.for_merged)
        for i in range(SWITCHES):
            by_copy.merge(2 - i % 2)
        by_copy.merge(1)
        report[f"copy, {kind}"] = {
            "merged_again_is_equal": equal(by_copy.for_merged, first),
            "pristine_is_equal": equal(by_copy.for_unmerged, pristine),
        }
        in_place, found = InPlace(copy.deepcopy(pristine), Passes(bank), 0), {}
        for i in range(SWITCHES):
            in_place.merge((1, 2, 0)[i % 3])
            if in_place.merged == 0 and in_place.passes in (3, 21, 99, 999, 9999):
                found[in_place.passes] = {
                    **drift(in_place.for_unmerged, pristine),
                    "bound": drift_bound(dtype, in_place.passes),
                }
        report[f"in place, {kind}"] = found
        restored = InPlace(copy.deepcopy(pristine), Passes(bank))
        for i in range(SWITCHES // 10):
            restored.merge((1, 2, 0)[i % 3])
        restored.unmerge()
        report[f"in place, restored, {kind}"] = {**drift(restored.for_unmerged, pristine), "restores": restored.restores}
        clean()
    return report


def pairs(one: Weights, other: Weights) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The matrices of both."""
    for x, y in zip(one.layers, other.layers, strict=True):
        for site, matrix in matrices(x).items():
            yield matrix.weight, matrices(y)[site].weight


def equal(one: Weights, other: Weights) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in pairs(one, other))


def drift(found: Weights, pristine: Weights) -> dict[str, float]:
    """Root mean square and largest change of a weight, over the weights' root mean square."""
    square = total = largest = 0.0
    for x, y in pairs(found, pristine):
        change = x.float() - y.float()
        square += float(change.square().sum())
        total += float(y.float().square().sum())
        largest = max(largest, float(change.abs().max()) / float(y.float().square().mean().sqrt()))
    return {"rms_over_rms": (square / total) ** 0.5, "max_over_rms": largest}


def serving(part: str, bench: Bench) -> dict[str, object]:
    """A part of benchmarks/dlora_serving.py, on the runner that these parts share."""
    if bench.server is None:
        bench.server = serving_runner(bench.shape, bench.weights, SLOTS, SLOTS)
    work: Callable[..., dict[str, object]] = getattr(dlora_serving, part)
    left_s = max(1.0, bench.ends_s - time.perf_counter())
    try:
        return work(bench.server, **({} if part == "iterations" else {"seconds": min(left_s, dlora_serving.SECONDS[part])}))
    except Exception:
        bench.server = None  # requests may be left in it
        raise


WORK: dict[str, Callable[[Bench], dict[str, object]]] = {
    "correct": correct,
    "merge": merging,
    "decode": decoding,
    "figure5": figure5,
    "constants": constants,
    "prefetch": prefetching,
    "hidden": hidden,
    "drift": drifting,
    **{part: partial(serving, part) for part in SERVING},
}


def machine() -> dict[str, object]:
    """What ran this."""
    if not GPU:
        return {"device": "cpu", "torch": torch.__version__}
    told = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    return {"device": done.stdout.strip(), "torch": torch.__version__, "cuda": torch.version.cuda}


def main() -> int:
    """Run the parts; 1 when any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b" if GPU else "tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--limit-s", type=float, default=240.0, help="no part, nor any run of a part that serves, begins after so many seconds"
    )
    given = parser.parse_args()
    started = time.perf_counter()
    report: dict[str, object] = {"command": sys.argv, "model": given.model, "seed": given.seed, "machine": machine()}
    bench = Bench(model(given.model), given.seed)
    report["copy_bytes_per_s"] = bench.copy_bytes_per_s
    bench.ends_s = started + given.limit_s
    failed = False
    for part in given.parts.split(","):
        began = time.perf_counter()
        if began - started > given.limit_s:
            report[part] = {"skipped": f"{began - started:.0f} s had passed"}
            continue
        try:
            report[part] = WORK[part](bench)
        except Exception as error:
            failed = True
            report[part] = {"error": repr(error), "trace": traceback.format_exc()}
            print(f"{part} failed: {error!r}", file=sys.stderr)
        report[f"{part}_took_s"] = time.perf_counter() - began
        print(f"{part}: {report[f'{part}_took_s']:.1f} s", flush=True)
        if part not in SERVING:
            bench.server = None
        clean()
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(given.out, json.dumps(report, indent=1).encode())
    print(json.dumps(report, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
