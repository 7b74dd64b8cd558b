"""Several GPUs, and quantised weights: correctness and speed on H200s.

    python benchmarks/parallel.py --out DIR [--parts layouts,exact,kernels,quantised,torchao] [--model M] [--budget 220]

Runs what the GPUs present allow and writes DIR/parallel.json after every part; a part that fails is recorded, the rest goes on.
Under four minutes each: on one GPU `--parts kernels,quantised`, on two or four `--parts exact,layouts`.

* `layouts`: the whole model on every tp and pp map that fits: logits against one GPU, share of greedy tokens that agree, decode
  steps as served (batch 1, 32, 128, context 512), prompts of 512 and 2,048, sums (all-reduce) by size where tp > 1; with int8
  and int4 weights on tp 2.
* `exact`: float32, four layers, plain PyTorch: logits and tokens must agree.
* `kernels`: int8 and int4 products of the model's matrices against cuBLAS in bf16 and the floor their bytes set.
* `quantised`: the whole model in int8 and int4: decode and prefill against bf16; logits against the dequantised model.
* `torchao` (not by default; needs that package): the same with torchao's products.

`benchmarks/tilings.py` searches the tilings of the int8 and int4 kernels.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast stays off
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import numpy as np
import torch

from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine
from systems.common.models import ModelShape, model
from systems.common.torch_engine.drivers import Live
from systems.common.torch_engine.kernels.quant_linear import dequantised, quant_linear
from systems.common.torch_engine.kernels.triton_guard import triton
from systems.common.torch_engine.linear import Linear
from systems.common.torch_engine.parallel.executor import start
from systems.common.torch_engine.placement import layout
from systems.common.torch_engine.quantised import dequantise, quantise
from systems.common.torch_engine.weights import Weights, random_weights, weight_bytes

PARTS = ("exact", "layouts", "kernels", "quantised")
CONFIG = EngineConfig(4800, max_num_batched_tokens=8192, max_num_seqs=128)
CONTEXT, STEPS, ROWS = 512, 48, (1, 32, 128)


def on_gpu(work: Callable[[], object], runs: int = 30) -> float:
    """Median milliseconds of `work` as a CUDA graph of ten, so that launches do not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()
    times = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 10)
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes per second of a large copy, read plus written: the ceiling of all floors here."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
    rates = []
    for _ in range(10):
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        rates.append(2 * 2**31 / begin.elapsed_time(end) * 1e3)
    return statistics.median(rates)


def free() -> None:
    """Give back what earlier parts held."""
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()


def served(live: Live, rows: int, runs: int = 3) -> dict[str, float]:
    """Milliseconds between the ends of decode-only steps of `rows` sequences at contexts around 512; first run left out."""
    found = []
    for run in range(runs):
        first = len(live.executor.flights.ended_s)
        asked = [Request(10_000 * rows + 1000 * run + i, 0.0, CONTEXT - STEPS // 2, STEPS) for i in range(rows)]
        live.generate(asked)
        periods = np.diff(live.executor.flights.ended_s[first:])[-STEPS + 6 :]
        if run:
            found += periods.tolist()
    low, middle, high = statistics.quantiles([period * 1e3 for period in found], n=4)
    return {"ms": middle, "low_ms": low, "high_ms": high, "runs": len(found)}


def prefill(live: Live, tokens: int, runs: int = 8) -> float:
    """Median milliseconds from submit to first token of one prompt."""
    times = []
    for run in range(runs):
        torch.cuda.synchronize()
        began = time.perf_counter()
        live.generate([Request(9_000_000 + 100 * tokens + run, 0.0, tokens, 1)])
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:]) * 1e3


def tokens_of(live: Live, base: int) -> list[list[int]]:
    """Greedy tokens of a few prompts (the prompt follows from the index)."""
    return live.generate([Request(i, 0.0, 40 + i, 24) for i in range(base, base + 12)])[1]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def agree(found: list[list[int]], expected: list[list[int]]) -> float:
    """Share of requests' tokens that agree up to their first difference (after it texts differ anyway)."""
    same = total = 0
    for a, b in zip(found, expected, strict=True):
        equal = [x == y for x, y in zip(a, b, strict=True)]
        same += equal.index(False) if False in equal else len(equal)
        total += len(equal)
    return same / total


class Bench:
    """The run: what is known so far, and until when it may go on."""

    def __init__(self, shape: ModelShape, out: Path, budget_s: float) -> None:
        self.shape, self.out, self.ends = shape, out, time.monotonic() + budget_s
        self.gpus = torch.cuda.device_count()
        self.result: dict[str, object] = {}
        self.prompt = np.random.default_rng(0).integers(0, shape.vocab, 256)

    def keep(self, name: str, value: object) -> None:
        """Note a finding and write all of them."""
        self.result[name] = value
        self.out.mkdir(parents=True, exist_ok=True)
        new = self.out / "parallel.json.new"
        new.write_text(json.dumps(self.result, indent=1))
        new.replace(self.out / "parallel.json")
        print(f"== {name}: {json.dumps(value)}", flush=True)

    def section(self, name: str, work: Callable[[], object]) -> object:
        """Run one section; what goes wrong is its finding."""
        if time.monotonic() > self.ends:
            self.keep(name, {"skipped": "out of time"})
            return None
        began = time.monotonic()
        try:
            value = work()
        except BaseException as error:  # a section must not take the others along
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc()
            self.keep(name, {"error": f"{type(error).__name__}: {error}"[:500]})
            return None
        finally:
            free()
        self.keep(name, value)
        print(f"   ({time.monotonic() - began:.1f} s)", flush=True)
        return value

    def alone(self, shape: ModelShape, weights: Weights, config: EngineConfig = CONFIG, **options: object) -> Live:
        """One GPU."""
        return Live.build(shape, weights, config, max_tokens=4096, **options)

    def times(self, live: Live, rows: tuple[int, ...] = ROWS) -> dict[str, object]:
        """Decode steps by batch size, and a prompt."""
        found: dict[str, object] = {f"decode {n}": served(live, n) for n in rows}
        return found | {"prefill 512 ms": prefill(live, 512), "prefill 2048 ms": prefill(live, 2048)}

    # ---- several GPUs

    def maps(self) -> list[tuple[int, list[int]]]:
        """Layouts for the GPUs present: tp, layers per stage."""
        n = self.shape.layers
        all_ = [
            (2, [n]),
            (1, [n // 2] * 2),
            (1, [n * 5 // 8, n - n * 5 // 8]),
            (4, [n]),
            (2, [n // 2] * 2),
            (1, [n // 4] * 4),
            (1, [n // 4 + 4, n // 4, n // 4, n // 4 - 4]),
        ]
        return [(tp, m) for tp, m in all_ if tp * len(m) <= self.gpus and (self.gpus < 4 or tp * len(m) >= 2)]

    def layouts(self) -> None:
        """One GPU first, then every layout."""

        def reference() -> dict[str, object]:
            live = self.alone(self.shape, random_weights(self.shape, 0, "cuda"))
            with torch.inference_mode():
                self.logits = live.executor.half.score(self.prompt).cpu()
            self.tokens = tokens_of(live, 0)
            found = self.times(live)
            self.again = agree(tokens_of(live, 0), self.tokens)
            return found | {"weight_bytes": weight_bytes(live.executor.model.weights)}

        if self.section("tp1", reference) is None:
            return
        for tp, pp_map in self.maps():
            self.section(f"tp{tp} pp{pp_map}", lambda tp=tp, m=pp_map: self.layout(tp, m))
        if self.gpus >= 2:
            for dtype in ("int8", "int4"):
                self.section(f"tp2 {dtype}", lambda dtype=dtype: self.layout(2, [self.shape.layers], dtype))

    def layout(self, tp: int, pp_map: list[int], dtype: str | None = None) -> dict[str, object]:
        """One layout: against one GPU, and how fast."""
        began = time.monotonic()
        split = layout(self.shape, tp, pp_map=pp_map)
        options = {"device": "cuda", "dtype": dtype, "max_tokens": 4096}
        with start(self.shape, split, CONFIG, **options) as executor:
            found: dict[str, object] = {"start_s": time.monotonic() - began, "rooms": executor.rooms}
            live = Live(Engine(CONFIG, executor), executor)
            executor.attach(live.engine)
            found["attention"] = executor.model.attention.name
            if dtype is None:
                found["logits_off"] = off(executor.score(self.prompt), self.logits)
                found["tokens_agree"] = agree(tokens_of(live, 0), self.tokens)
            found |= self.times(live)
            if tp > 1 and len(pp_map) == 1 and dtype is None:
                with torch.inference_mode(), executor.cluster.guard():
                    sizes = [self.shape.hidden * rows for rows in (1, 8, 32, 128, 512, 2048)]
                    found["sums"] = {
                        f"{2 * size} bytes": float(executor.half.sums(size, 50)) * 1e6 for size in sizes
                    }  # microseconds
        return found

    def exact(self) -> None:
        """Float32, four layers, attention and steps by plain PyTorch: no rounding to hide behind."""
        shape = replace(self.shape.with_dtype("fp32"), layers=4)
        config = EngineConfig(400, max_num_batched_tokens=512, max_num_seqs=16)
        prompt, kept, plain = self.prompt[:100], {}, {"backend": "sdpa", "graphs": False}

        def reference() -> str:
            live = self.alone(shape, random_weights(shape, 0, "cuda"), config, **plain)
            with torch.inference_mode():
                kept["logits"] = live.executor.half.score(prompt).cpu()
            kept["tokens"] = tokens_of(live, 0)
            return "ok"

        def several(tp: int, pp_map: list[int]) -> dict[str, object]:
            split = layout(shape, tp, pp_map=pp_map)
            with start(shape, split, config, device="cuda", max_tokens=4096, **plain) as executor:
                live = Live(Engine(config, executor), executor)
                executor.attach(live.engine)
                error = float((executor.score(prompt) - kept["logits"]).abs().max())
                return {"logits_max_difference": error, "tokens_equal": tokens_of(live, 0) == kept["tokens"]}

        if self.section("exact tp1", reference) is None:
            return
        for tp, pp_map in ((2, [4]), (1, [3, 1]), (4, [4]), (2, [1, 3])):
            if tp * len(pp_map) <= self.gpus:
                self.section(f"exact tp{tp} pp{pp_map}", lambda tp=tp, m=pp_map: several(tp, m))

    # ---- quantised

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's products."""
        s = self.shape
        return {
            "qkv": (s.q_width + 2 * s.kv_width, s.hidden),
            "o": (s.hidden, s.q_width),
            "up": (s.up_width, s.hidden),
            "down": (s.hidden, s.mlp),
        }

    @torch.inference_mode()
    def kernels(self) -> dict[str, object]:
        """Products by number format, matrix and rows: microseconds, cuBLAS in bf16, floor by bytes, error to float64."""
        rate, found = copy_rate(), {}
        for name, (outer, inner) in self.matrices().items():
            # copies so that no weight stays in the cache from one product to the next
            dense = [torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16) / inner**0.5 for _ in range(3)]
            for dtype in ("int8", "int4"):
                packed = [quantise(w, None, dtype) for w in dense]
                moved = packed[0].weight.nbytes + packed[0].scale.nbytes
                truth = dequantise(packed[0], torch.float64)
                for rows in (1, 8, 16, 32, 64, 128):
                    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)

                    def ours(x=x, packed=packed):
                        for p in packed:
                            quant_linear(x, p.weight, p.scale, p.group)

                    def theirs(x=x, dense=dense):
                        for w in dense:
                            torch.nn.functional.linear(x, w)

                    p = packed[0]
                    found[f"{dtype} {name} {rows}"] = {
                        "us": on_gpu(ours) / 3 * 1e3,
                        "cublas_bf16_us": on_gpu(theirs) / 3 * 1e3,
                        "floor_us": moved / rate * 1e6,
                        "off": off(quant_linear(x, p.weight, p.scale, p.group), x.double() @ truth.T),
                    }
                found[f"{dtype} {name} dequantise"] = {
                    "us": on_gpu(lambda p=packed[0]: dequantised(p.weight, p.scale, p.group, torch.bfloat16)) * 1e3,
                    "floor_us": (moved + dense[0].nbytes) / rate * 1e6,
                }
                del packed, truth
        return {"copy_bytes_per_s": rate, "products": found}

    def quantised(self) -> None:
        """The whole model by number format, and its logits against the dequantised one's (8 layers)."""
        for dtype in (None, "int8", "int4"):

            def whole(dtype=dtype) -> dict[str, object]:
                weights = random_weights(self.shape, 0, "cuda", dtype=dtype)
                live = self.alone(self.shape, weights)
                read = weight_bytes(weights) - weights.embedding.nbytes
                found = self.times(live, (1, 8, 16, 32, 128))
                return found | {"weight_bytes": weight_bytes(weights), "floor_ms": read / copy_rate() * 1e3}

            def close(dtype=dtype) -> dict[str, float]:
                shape = replace(self.shape, layers=8)
                config = EngineConfig(400, max_num_batched_tokens=512, max_num_seqs=16)
                weights = random_weights(shape, 0, "cuda", dtype=dtype)
                with torch.inference_mode():
                    mine = self.alone(shape, weights, config).executor.half.score(self.prompt)
                    few = self.alone(shape, weights, config).executor.half.score(self.prompt[:40])
                    for layer in weights.layers:
                        for site in ("qkv", "o", "up", "down"):
                            matrix = getattr(layer, site)
                            setattr(layer, site, Linear(dequantise(matrix, torch.bfloat16), matrix.bias))
                    dense = self.alone(shape, weights, config).executor.half.score(self.prompt)
                return {"prefill_off_dequantised": off(mine, dense), "kernel_off_dequantised": off(few, dense[:40])}

            self.section(f"model {dtype or 'bf16'}", whole)
            if dtype is not None:
                self.section(f"model {dtype} against dequantised", close)

    def torchao(self) -> None:
        """The whole model with torchao's products: decode steps, prompts, and logits against our kernels' (8 layers)."""
        for dtype in ("int8", "int4"):

            def whole(dtype=dtype) -> dict[str, object]:
                live = self.alone(self.shape, random_weights(self.shape, 0, "cuda", dtype=dtype), quantised="torchao")
                return self.times(live, (1, 8, 32, 128)) | live.executor.choices

            def close(dtype=dtype) -> dict[str, float]:
                shape, found = replace(self.shape, layers=8), []
                config = EngineConfig(400, max_num_batched_tokens=512, max_num_seqs=16)
                with torch.inference_mode():
                    for backend in ("triton", "torchao"):
                        weights = random_weights(shape, 0, "cuda", dtype=dtype)
                        live = self.alone(shape, weights, config, quantised=backend)
                        found.append(live.executor.half.score(self.prompt[:40]))
                return {"off_our_kernels": off(found[1], found[0])}

            self.section(f"torchao {dtype} against ours", close)
            self.section(f"torchao {dtype}", whole)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--budget", type=float, default=220.0, help="seconds after which no further section begins")
    options = parser.parse_args()
    bench = Bench(model(options.model).with_dtype("bf16"), options.out, options.budget)
    bench.keep(
        "machine",
        {
            "gpus": [torch.cuda.get_device_name(i) for i in range(bench.gpus)],
            "torch": torch.__version__,
            "triton": triton.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "python": sys.version.split()[0],
            "command": sys.argv,
            "nvlink_multicast": os.environ["NCCL_NVLS_ENABLE"],
        },
    )
    for part in options.parts.split(","):
        if part in ("layouts", "exact", "quantised", "torchao"):
            bench.section(f"part {part}", lambda part=part: getattr(bench, part)() or "done")
        else:
            bench.section(part, getattr(bench, part))


if __name__ == "__main__":
    main()
