"""Tilings of products with quantised weights, searched on one GPU.

    python benchmarks/tilings.py --out DIR [--limit-s 60] [--rows 32,128,64,16] [--model llama-2-7b]

For each number format and number of rows: the four products of a layer, three layers in turn so that no weight stays in the
cache, by CUDA graph; all candidates of both kernels, against bf16 by cuBLAS, against making the matrices dense first, and
against the table in use. The fastest one's numbers are checked against float64. Writes DIR/tilings.json after each, and
DIR/quant_tilings.json, which can take the place of `systems/common/torch_engine/kernels/quant_tilings.json`: formats and rows
that there was no time for keep their entries. Kernels are compiled by several processes first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from systems.common.models import ModelShape, model
from systems.common.torch_engine.kernels.quant_linear import dequantised, quant_linear
from systems.common.torch_engine.kernels.quant_tilings import FILE, Tiling, chosen
from systems.common.torch_engine.quantised import Quantised, dequantise, quantise

LAYERS, REPEATS, RUNS = 3, 4, 12
KINDS = ("int4", "int8")
LAST_S = 3.0
"""What the last group may take beyond its beginning."""


def candidates(rows: int) -> list[Tiling]:
    """Tilings to try for `rows` rows; the sizes of the steps leave room for two or more programs on a multiprocessor."""
    found = [Tiling(bn, 128, warps, stages, 0, rows, True) for bn, warps, stages in ((64, 4, 4), (128, 8, 3), (128, 4, 3))]
    found += [Tiling(64, 128, 4, 6 if rows < 128 else 3, 0, rows, True), Tiling(64, 128, 4, 3, 0, rows)]
    if rows <= 32:
        found += [Tiling(32, 128, 4, 4, 0, rows)]
    return found


def wider(tiling: Tiling) -> Iterator[Tiling]:
    """The same with fewer and more programs, which needs no other kernel."""
    for programs in (132, 256, 528):
        yield replace(tiling, programs=programs)


def matrices(shape: ModelShape) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's products."""
    return [
        (shape.q_width + 2 * shape.kv_width, shape.hidden),
        (shape.hidden, shape.q_width),
        (shape.up_width, shape.hidden),
        (shape.hidden, shape.mlp),
    ]


def graphed_us(work: Callable[[], object]) -> float:
    """Median microseconds of `work` as a CUDA graph of `REPEATS`, per layer."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            work()
    times = []
    for _ in range(RUNS):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:]) / REPEATS / LAYERS * 1e3


class Search:
    """The run: weights in all formats, and what was found."""

    def __init__(self, shape: ModelShape, out: Path, ends: float) -> None:
        self.shape, self.out, self.ends = shape, out, ends
        self.result: dict[str, Any] = {}
        self.best: dict[str, dict[int, tuple[float, Tiling]]] = {kind: {} for kind in KINDS}
        self.dense = [[torch.randn(size, device="cuda").bfloat16() for size in matrices(shape)] for _ in range(LAYERS)]
        self.packed = {kind: [[quantise(w, None, kind) for w in layer] for layer in self.dense] for kind in KINDS}

    def keep(self, name: str, value: object) -> None:
        """Note a finding and write all of them."""
        self.result[name] = value
        table = overlaid(json.loads(FILE.read_text()), self.best)
        table["source"] = f"benchmarks/tilings.py: {self.shape.name}'s matrices on one {torch.cuda.get_device_name()}"
        for file, values in (("tilings.json", self.result), ("quant_tilings.json", table)):
            new = self.out / f"{file}.new"
            new.write_text(json.dumps(values, indent=1) + "\n")
            new.replace(self.out / file)
        print(f"== {name} ({self.ends - time.monotonic():.0f} s left): {json.dumps(value)}", flush=True)

    def inputs(self, rows: int) -> list[Tensor]:
        """Activations for the four products."""
        return [torch.randn(rows, inner, device="cuda").bfloat16() for _, inner in matrices(self.shape)]

    def timed(self, kind: str, xs: list[Tensor], product: Callable[[Tensor, Quantised], Tensor]) -> float:
        """Microseconds of a layer's products; infinite for what cannot run."""
        try:
            return graphed_us(lambda: [product(x, w) for layer in self.packed[kind] for x, w in zip(xs, layer, strict=True)])
        except Exception as error:  # too much shared memory, say
            print(f"   {type(error).__name__}: {str(error)[:120]}", flush=True)
            torch.cuda.synchronize()
            return float("inf")

    def group(self, kind: str, rows: int) -> None:
        """All candidates of one number format and number of rows."""
        xs = self.inputs(rows)

        def dense(x: Tensor, w: Quantised) -> Tensor:
            return functional.linear(x, dequantised(w.weight, w.scale, w.group, x.dtype))

        def by(tiling: Tiling) -> Callable[[Tensor, Quantised], Tensor]:
            return lambda x, w: quant_linear(x, w.weight, w.scale, w.group, tiling=tiling)

        layer = self.packed[kind][0]
        now = chosen(rows, layer[0].group)
        found: dict[str, Any] = {
            "bf16_us": graphed_us(
                lambda: [functional.linear(x, w) for layer in self.dense for x, w in zip(xs, layer, strict=True)]
            ),
            "dense_us": self.timed(kind, xs, dense),
            "table_us": self.timed(kind, xs, by(now)) if now is not None else None,
        }
        tried = [(self.timed(kind, xs, by(one)), one) for tiling in candidates(rows) for one in wider(tiling)]
        tried.sort(key=lambda pair: pair[0])
        us, best = tried[0]
        found["off"] = max(
            _off(by(best)(x, w), x.double() @ dequantise(w, torch.float64).T) for x, w in zip(xs, layer, strict=True)
        )
        found["tried"] = [(round(us, 2), _entry(one)) for us, one in tried if us < float("inf")]
        if us < found["dense_us"] and found["off"] < 0.01:
            self.best[kind][rows] = us, best
        self.keep(f"{kind} {rows}", found)


def overlaid(table: dict[str, Any], best: dict[str, dict[int, tuple[float, Tiling]]]) -> dict[str, Any]:
    """`table` with what was found in the place of its entries; none for rows that more rows' tiling serves as fast."""
    found = dict(table)
    for kind, tilings in best.items():
        kept = [one for one in table[kind] if one["rows"] not in tilings]
        for rows, (us, tiling) in tilings.items():
            if all(us < other for more, (other, _) in tilings.items() if more > rows):
                kept.append(_entry(tiling))
        found[kind] = sorted(kept, key=lambda one: int(one["rows"]))
    return found


def _entry(tiling: Tiling) -> dict[str, Any]:
    return {name: value for name, value in asdict(tiling).items() if name != "splits"}


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def compile_some(shape: ModelShape, rows: list[int], share: int, shares: int) -> None:
    """Run every so-manyth candidate once on small matrices: Triton keeps what it compiles for other processes."""
    inners = sorted({inner for _, inner in matrices(shape)})
    work = [(kind, n, tiling, inner, splits) for n in rows for kind in KINDS for tiling in candidates(n) for inner in inners
            for splits in ((1, 2) if inner == shape.hidden else (2,))]  # fmt: skip
    for kind, n, tiling, inner, splits in work[share::shares]:
        w = quantise(torch.randn(256, inner, device="cuda").bfloat16(), None, kind)
        x = torch.randn(n, inner, device="cuda").bfloat16()
        try:
            quant_linear(x, w.weight, w.scale, w.group, tiling=replace(tiling, splits=splits))
        except Exception as error:
            print(f"   {kind} {tiling}: {type(error).__name__}", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, default=60.0)
    parser.add_argument("--rows", default="32,128,64,16")
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("SHARE", "SHARES"), help="only compile a share of the kernels")
    options = parser.parse_args()
    began = time.monotonic()
    shape, rows = model(options.model).with_dtype("bf16"), [int(n) for n in options.rows.split(",")]
    with torch.inference_mode():
        if options.compile:
            compile_some(shape, rows, *options.compile)
            return
        options.out.mkdir(parents=True, exist_ok=True)
        shares = max(2, min(14, (os.cpu_count() or 2) - 2))
        command = [sys.executable, *sys.argv, "--compile"]
        workers = [subprocess.Popen([*command, str(i), str(shares)], stdin=subprocess.DEVNULL) for i in range(shares)]
        try:
            search = Search(shape, options.out, began + options.limit_s)
            for worker in workers:
                with suppress(subprocess.TimeoutExpired):  # what is not compiled by then is compiled when it is tried
                    worker.wait(max(0.1, search.ends - time.monotonic() - options.limit_s / 3))
            search.keep("compiled_s", time.monotonic() - began)
            for kind, n in [(kind, n) for n in rows for kind in KINDS]:
                if time.monotonic() > search.ends - LAST_S:
                    search.keep(f"{kind} {n}", {"skipped": "out of time"})
                else:
                    search.group(kind, n)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


if __name__ == "__main__":
    main()
