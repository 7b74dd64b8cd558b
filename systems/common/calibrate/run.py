# mypy: disable-error-code="no-untyped-call"
"""One calibration from start to end: the thin grid, then what the full one adds while time is left."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from systems.common.calibrate import grid as grids
from systems.common.calibrate.adapters import adapters_s
from systems.common.calibrate.attention import attention_s, several_s
from systems.common.calibrate.bench import Bench
from systems.common.calibrate.budget import Budget
from systems.common.calibrate.clock import Clock
from systems.common.calibrate.dense import embedding_s, head_s, layer_s
from systems.common.calibrate.facts import engine_facts, meta_facts
from systems.common.calibrate.grid import AttentionPoint, Grid, PromptsPoint
from systems.common.calibrate.links import copies_s
from systems.common.calibrate.steps import Batch, Step, decode_steps, mixed_steps, sustained
from systems.common.calibrate.write import Folder
from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.lora import ATTENTION_SITES

Point = TypeVar("Point")
SERVED_ROWS, SERVED_CONTEXT = (1, 8, 32, 64), 256
STEP_RUNS = 3
"""Whole steps with prompts are timed so often: with the decode steps before it each takes three times as long to measure."""
SUSTAINED: Batch = (32, 512, 1024, 0, 1)


@dataclass(slots=True)
class Found:
    """What has been measured, seconds by point."""

    layer: dict[int, float] = field(default_factory=dict)
    embedding: dict[int, float] = field(default_factory=dict)
    head: dict[int, float] = field(default_factory=dict)
    attention: dict[AttentionPoint, float] = field(default_factory=dict)
    several: dict[PromptsPoint, float] = field(default_factory=dict)
    steps: dict[Batch, float] = field(default_factory=dict)
    check: dict[Batch, float] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    def into(self, folder: Folder) -> None:
        """The tables, in order of their points."""
        folder.table("layer.csv", ("tokens", "time_us"), _us(self.layer))
        folder.table("embedding.csv", ("tokens", "time_us"), _us(self.embedding))
        folder.table("head.csv", ("sequences", "time_us"), _us(self.head))
        axes = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
        folder.table("attention.csv", axes, _us(self.attention))
        folder.table("prompts.csv", ("prompts", "tokens", "n_decode", "kv_decode", "time_us"), _us(self.several))
        columns = ("rows", "context", "chunk", "past", "prompts", "time_us")
        folder.table("steps.csv", columns, _us(self.steps))
        folder.table("check.csv", columns, _us(self.check))
        folder.mapping("engine.yaml", self.engine)


def _us(times: dict[Any, float]) -> list[tuple[object, ...]]:
    """Rows of a table: the point's numbers, then microseconds."""
    return [(*(point if isinstance(point, tuple) else (point,)), times[point] * 1e6) for point in sorted(times)]


class Calibrating:
    """A calibration under way; `save` is called whenever the folder is complete again."""

    def __init__(self, bench: Bench, clock: Clock, budget: Budget, save: Callable[[], None]) -> None:
        self.bench, self.clock, self.budget, self.save = bench, clock, budget, save
        self.small = bench.device.type != "cuda"
        self.prompts_clock = Clock(bench.device, min(clock.runs, STEP_RUNS))
        self.found = Found()

    def thin(self, grid: Grid) -> None:
        """Everything that the simulator needs, whatever time it takes."""
        bench, found = self.bench, self.found
        bench.live.executor.warm()
        self._dense(grid)
        groups = chain.from_iterable(grid.attention())
        found.attention.update(attention_s(bench, self.clock, self._todo("attention", groups, found.attention)))
        self._attempt("prompts together", lambda: self._several(grid, None))
        sizes = (1, 3) if self.small else tuple(bench.live.executor.steps.sizes)
        for step in decode_steps(bench, self.clock, _shown("decode steps", sizes), (grid.step_context,)):
            found.steps[_batch(step)] = step.took_s
        self._mixed(self._todo("steps with prompts", grid.steps(), found.steps), found.steps)
        served, context = ((2,), 16) if self.small else (SERVED_ROWS, SERVED_CONTEXT)
        found.engine = engine_facts(bench, self.clock, served, context)
        self._attempt("checks", lambda: self._check(self._todo("checks", grid.checks(), found.check)))
        self.save()

    def fill(self, grid: Grid) -> None:
        """What `grid` has more, most telling first, as far as the time goes."""
        bench, found, budget = self.bench, self.found, self.budget
        self._mixed(self._todo("steps with prompts", grid.steps(), found.steps, budget), found.steps)
        self.save()
        self._attempt("checks", lambda: self._check(self._todo("checks", grid.checks(), found.check, budget)))
        self.save()
        self._attempt("prompts together", lambda: self._several(grid, budget))
        groups = [left for group in grid.attention() if (left := [p for p in group if p not in found.attention])]
        wanted = chain.from_iterable(_shown("attention", groups, budget))
        found.attention.update(attention_s(bench, self.clock, wanted))
        self.save()
        self._dense(grid, budget)
        self.save()

    def _dense(self, grid: Grid, budget: Budget | None = None) -> None:
        bench, clock, found = self.bench, self.clock, self.found
        found.layer.update(layer_s(bench, clock, self._todo("layer", grid.tokens, found.layer, budget)))
        tokens = [count for count in grid.tokens if count in found.layer and count not in found.embedding]
        found.embedding.update(embedding_s(bench, clock, tokens))
        found.head.update(head_s(bench, clock, [count for count in grid.sequences if count not in found.head]))

    def _several(self, grid: Grid, budget: Budget | None) -> None:
        todo = self._todo("prompts together", grid.several(), self.found.several, budget)
        for point, took_s in several_s(self.bench, self.clock, todo):
            self.found.several[point] = took_s

    def _attempt(self, what: str, work: Callable[[], None]) -> None:
        """Do what the simulator can do without; where that fails, say so and go on."""
        try:
            work()
        except RuntimeError as error:
            traceback.print_exc()
            self.budget.left_out[what] = f"{type(error).__name__}: {str(error)[:200]}"

    def sustained(self, batch: Batch) -> None:
        """How much slower steps with prompts are back to back."""
        self._attempt("sustained", lambda: self.found.engine.update(sustained=sustained(self.bench, self.prompts_clock, batch)))

    def _mixed(self, batches: Iterable[Batch], into: dict[Batch, float]) -> None:
        for step in mixed_steps(self.bench, self.prompts_clock, batches):
            into[_batch(step)] = step.took_s

    def _check(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            rows, context, chunk, _, _ = batch
            if chunk:
                self._mixed([batch], self.found.check)
            else:
                for step in decode_steps(self.bench, self.clock, (rows,), (context,)):
                    self.found.check[_batch(step)] = step.took_s

    @staticmethod
    def _todo(what: str, points: Iterable[Point], known: dict[Any, float], budget: Budget | None = None) -> Iterator[Point]:
        return _shown(what, [point for point in points if point not in known], budget)


def _batch(step: Step) -> Batch:
    return step.rows, step.context, step.chunk, step.past, step.prompts if step.chunk else 0


def calibrate(
    shape: ModelShape,
    gpu: str,
    device: str,
    runs: int,
    commit: str,
    quick: bool = False,
    budget: Budget | None = None,
    save: Callable[[Folder], None] = lambda _: None,
) -> Folder:
    """Measure everything; the files to write. `save` is given them whenever they are complete again.

    Raises InputError where there is no such device or not enough memory.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("calibrate", "--device", device, "PyTorch sees no GPU here: run it on the machine that has one")
    budget, small = budget or Budget(), device == "cpu"
    torch.manual_seed(0)
    bench = Bench.build(shape, torch.device(device), max_num_seqs=16 if small else 512, blocks=64 if small else None)
    clock, folder = Clock(bench.device, runs), Folder()

    def write() -> None:
        run.found.into(folder)
        counts = (runs, run.prompts_clock.runs)
        folder.mapping("meta.yaml", meta_facts(shape, "cpu" if small else gpu, bench, counts, commit, budget))
        save(folder)

    run = Calibrating(bench, clock, budget, write)
    run.thin((grids.small if small else grids.quick)(bench.cached_tokens))
    run.sustained((2, 16, 8, 0, 1) if small else SUSTAINED)
    if quick:
        budget.left_out["full grid"] = "all but the thin grid: --quick"
    else:
        run.fill((grids.small if small else grids.full)(bench.cached_tokens))
        _extras(bench, clock, small, folder, budget)
    if not small:
        torch.cuda.synchronize()
    write()
    return folder


def _extras(bench: Bench, clock: Clock, small: bool, folder: Folder, budget: Budget) -> None:
    """Tables that single systems read."""
    ranks = (8,) if small else (8, 16, 64)
    distinct, rows, prompts = ((1, 2), (4,), (8,)) if small else ((1, 4, 16, 32), (1, 8, 32, 128), (128, 512, 2048))
    points = [
        point
        for rank in _shown("adapters", ranks, budget)
        for point in adapters_s(bench, clock, rank, distinct, rows, prompts, ATTENTION_SITES)
    ]
    columns = ("kind", "tokens", "adapters", "rank", "time_us")
    folder.table("adapters.csv", columns, [(p.kind, p.tokens, p.adapters, p.rank, p.took_s * 1e6) for p in points])
    sizes = (2**16,) if small else tuple(2**k for k in range(12, 31, 3))
    copies = [copy for size in _shown("copies", sizes, budget) for copy in copies_s(clock, (size,))]
    folder.table(
        "copies.csv",
        ("direction", "pinned", "size_bytes", "time_us"),
        [(c.direction, "yes" if c.pinned else "no", c.size_bytes, c.took_s * 1e6) for c in copies],
    )


def _shown(what: str, points: Iterable[Point], budget: Budget | None = None) -> Iterator[Point]:
    """The points, as far as `budget` reaches, with a progress bar where somebody watches and a line where nobody does."""
    listed = list(points)
    if not sys.stderr.isatty() and listed:
        print(f"{what}: {len(listed)} points", file=sys.stderr, flush=True)
    within = iter(listed) if budget is None else budget.within(what, listed)
    yield from tqdm(within, total=len(listed), desc=what, unit="point", disable=None, leave=False)
