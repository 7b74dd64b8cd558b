"""Fingerprints: a model cut to its first layers, what is measured of it, and the file that holds the measurements.

Contents:

* `cut`: the shape of the fingerprint with k layers, for every shape of the engine.
* `Grid`, `PAPER_GRID`, `points`: what a profiler measures and how often, as data (sheet 2.3).
* `Point`, `Fingerprints`: the measurements, by what was measured.
* `read_fingerprints`: from a CSV file with the authors' columns.

A fingerprint keeps embedding, final norm and LM head, so that only the depth differs from the whole model (2.2).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.maveriq.configuration import DTYPES, MOST, Precision, whole_number

Layout = tuple[int, int]
"""(TP, PP)."""


def cut(shape: ModelShape, layers: int) -> ModelShape:
    """The fingerprint of `shape` with `layers` decoder layers; embedding, final norm and head stay (2.2).

    Raises InputError when the model has fewer layers than that.
    """
    if not 1 <= layers <= shape.layers:
        raise InputError(f"fingerprint of {shape.name}", "layers", layers, f"use 1 to {shape.layers}")
    return replace(shape, name=f"{shape.name}-{layers}layer", layers=layers)


@dataclass(frozen=True, slots=True)
class Grid:
    """What a profiler measures of a model, and how often.

    Depths are `PP + extra` layers for each of `extra_layers`, so that every stage has one. Each point is `warmups` untimed
    and `repeats` timed whole requests (prefill and o tokens, greedy, end of text ignored) whose mean is the latency;
    memory is read on every GPU before the engine starts, after it has loaded and after one request.
    """

    layouts: tuple[Layout, ...]
    batches: tuple[int, ...]
    output_lengths: tuple[int, ...]
    extra_layers: tuple[int, ...] = (0, 1)
    warmups: int = 2
    repeats: int = 3


PAPER_GRID = Grid(layouts=((1, 1), (1, 2), (2, 1)), batches=(1, 2), output_lengths=(10, 20))
"""The authors' grid (2.3): 24 points per precision, 16 for a model that can't be split."""


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """What was measured: everything that tells one point of a file from another."""

    model: str
    tp: int
    pp: int
    dtype: str
    int8_kv: bool
    layers: int
    output_length: int
    batch: int

    @property
    def layout(self) -> Layout:
        """(TP, PP)."""
        return self.tp, self.pp

    @property
    def precision(self) -> Precision:
        """(dtype, int8_kv)."""
        return self.dtype, self.int8_kv


def points(grid: Grid, model: str, precisions: Sequence[Precision], tensor_parallel: bool = True) -> tuple[Setting, ...]:
    """The points of `grid` for one model, in a fixed order; without TP layouts where the model can't be split."""
    return tuple(
        Setting(model, tp, pp, dtype, int8_kv, pp + extra, output_length, batch)
        for tp, pp in grid.layouts
        if tp == 1 or tensor_parallel
        for dtype, int8_kv in precisions
        for batch in grid.batches
        for extra in grid.extra_layers
        for output_length in grid.output_lengths
    )


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: the mean of a few whole requests, and memory summed over all GPUs beyond what was used at start.

    `profiling_s` is the wall time of process launch, load and runs; NaN where the file does not say.
    """

    latency_s: float
    loaded_gib: float
    memory_gib: float
    profiling_s: float = math.nan


@dataclass(frozen=True)
class Fingerprints:
    """All measurements of a file. `source` is named in errors. One file holds one regime of prompts: they are never mixed."""

    source: str
    points: Mapping[Setting, Point]

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The models measured, sorted."""
        return tuple(sorted({setting.model for setting in self.points}))

    @cached_property
    def _precisions(self) -> Mapping[str, tuple[Precision, ...]]:
        found: dict[str, set[Precision]] = {}
        for setting in self.points:
            found.setdefault(setting.model, set()).add(setting.precision)
        return {model: tuple(sorted(has, key=_rank)) for model, has in found.items()}

    @cached_property
    def most_ranks(self) -> Mapping[str, int]:
        """The largest TP degree measured, by model."""
        found: dict[str, int] = {}
        for setting in self.points:
            found[setting.model] = max(setting.tp, found.get(setting.model, 1))
        return found

    def precisions(self, model: str) -> tuple[Precision, ...]:
        """The precisions that `model` was measured at, in the order of `DTYPES`. Raises InputError for an unknown model."""
        if model not in self._precisions:
            raise InputError(self.source, "Model", model, f"fingerprinted are {', '.join(self.models) or 'no models'}")
        return self._precisions[model]

    def layouts(self, model: str, precision: Precision, batch: int = 1) -> tuple[Layout, ...]:
        """The layouts measured for one model and precision at `batch`, sorted."""
        return tuple(sorted({s.layout for s in self.points if (s.model, s.precision, s.batch) == (model, precision, batch)}))

    def select(self, keep: Iterable[Setting]) -> Fingerprints:
        """Only the settings in `keep`."""
        wanted = set(keep)
        return Fingerprints(self.source, {setting: point for setting, point in self.points.items() if setting in wanted})

    def gpu_seconds(self) -> float:
        """What taking these measurements cost: profiling time x GPUs, summed (the authors' `Time-Prof`)."""
        return sum(point.profiling_s * s.tp * s.pp for s, point in self.points.items() if math.isfinite(point.profiling_s))


def _rank(precision: Precision) -> tuple[int, str, bool]:
    dtype, int8_kv = precision
    return (DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES)), dtype, int8_kv


COLUMNS: Mapping[str, tuple[str, ...]] = {
    # ours -> the authors' name (sic), then spellings that are accepted too
    "model": ("Model",),
    "tp": ("TP",),
    "pp": ("PP",),
    "pp_map": ("PP_Map",),
    "dtype": ("DTYPE",),
    "int8_kv": ("INT8_KV_Cache",),
    "output_length": ("Output_Lenght", "Output_Length"),
    "batch": ("Batch_Size",),
    "latency_s": ("Latency",),
    "loaded_gib": ("Memory-Pre-Run",),
    "memory_gib": ("Memory-After-Run",),
}
_TIME = "Time-Prof"
_SAME = 1e-9


def read_fingerprints(file: Path, *, even_only: bool = False) -> Fingerprints:
    """Read a CSV file with the authors' columns; others are ignored.

    The number of layers is the sum of `PP_Map`; with `even_only`, rows with uneven stages are passed over.
    A file speaks of one regime of prompts. The authors' two files measure the same points with long (923 tokens) and short
    prompts, so a point that comes twice with two latencies or two memories is refused.

    Raises:
        InputError: the file can't be read, a column is missing, a cell is no usable number, or a point contradicts another.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream)
            places = _places(file, next(rows, []))
            measured: dict[Setting, Point] = {}
            for setting, point, line in _rows(file, rows, places, even_only):
                if setting in measured:
                    _check_same(f"{file} line {line}", setting, measured[setting], point)
                measured[setting] = point
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(file, "file", str(error), "give a CSV file of fingerprints with the authors' columns") from error
    if not measured:
        raise InputError(file, "rows", 0, "the file holds no measurement: give one row per fingerprint")
    return Fingerprints(str(file), measured)


def _check_same(where: str, setting: Setting, before: Point, now: Point) -> None:
    """Raise InputError where one point was measured twice and differs."""
    shown = f"{setting.model} ({setting.tp},{setting.pp}) {setting.dtype} {setting.layers} layers"
    if abs(before.latency_s - now.latency_s) > _SAME:
        mend = "the same point came before with another latency: never join files of long and short prompts"
        raise InputError(where, "Latency", shown, mend)
    if abs(before.memory_gib - now.memory_gib) > _SAME:
        raise InputError(where, "Memory-After-Run", shown, "the same point came before with another memory: keep one of them")


def _places(file: Path, header: Sequence[str]) -> dict[str, int]:
    names = [name.strip() for name in header]
    twice = next((name for theirs in COLUMNS.values() for name in theirs if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(file, "columns", twice, "this column comes twice: keep one")
    places = {}
    for ours, theirs in COLUMNS.items():
        found = [names.index(name) for name in theirs if name in names]
        if not found:
            raise InputError(file, "columns", theirs[0], f"this column is missing: needed are {_needed()}")
        places[ours] = found[0]
    if _TIME in names:
        places["profiling_s"] = names.index(_TIME)
    return places


def _needed() -> str:
    return ", ".join(theirs[0] for theirs in COLUMNS.values())


def _rows(
    file: Path, rows: Iterable[list[str]], places: Mapping[str, int], even_only: bool
) -> Iterator[tuple[Setting, Point, int]]:
    for line, row in enumerate(rows, start=2):
        if not any(cell.strip() for cell in row):
            continue
        read = _Row(f"{file} line {line}", row, places)
        stages = read.stages()
        if even_only and max(stages) - min(stages) > 1:
            continue
        setting = Setting(
            read.text("model"), read.whole("tp"), read.whole("pp"), read.text("dtype"), read.flag("int8_kv"), sum(stages),
            read.whole("output_length"), read.whole("batch"),
        )  # fmt: skip
        if setting.layers < setting.pp:
            raise read.bad("pp_map", "has fewer layers than stages: every stage needs one")
        memory = read.number("memory_gib")
        yield setting, Point(read.number("latency_s"), read.number("loaded_gib"), memory, read.time()), line


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the file; every reader raises an InputError that names it."""

    where: str
    cells: Sequence[str]
    places: Mapping[str, int]

    def bad(self, key: str, mend: str) -> InputError:
        """An error about this row's cell `key`."""
        return InputError(self.where, COLUMNS[key][0], self._cell(key), mend)

    def _cell(self, key: str) -> str | None:
        place = self.places[key]
        return self.cells[place].strip() if place < len(self.cells) else None

    def text(self, key: str) -> str:
        """A cell that must not be empty."""
        cell = self._cell(key)
        if not cell:
            raise self.bad(key, "the cell is empty: fill it in, or take the row out")
        return cell

    def number(self, key: str) -> float:
        """A finite number above 0."""
        cell = self.text(key)
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not 0 < value <= MOST:
            raise self.bad(key, "needs a finite number above 0: measure the point again, or take the row out")
        return value

    def whole(self, key: str) -> int:
        """A whole number of at least 1."""
        value = self.number(key)
        if value != int(value):
            raise self.bad(key, "needs a whole number above 0")
        return int(value)

    def flag(self, key: str) -> bool:
        """True or False."""
        cell = self.text(key).lower()
        if cell not in ("true", "false", "0", "1"):
            raise self.bad(key, "write True or False")
        return cell in ("true", "1")

    def stages(self) -> list[int]:
        """Layers of each stage."""
        parts = self.text("pp_map").split()
        layers = [whole_number(part) for part in parts]
        if None in layers:
            raise self.bad("pp_map", "write the layers of each stage, separated by spaces")
        return [one for one in layers if one is not None]

    def time(self) -> float:
        """The profiling time, NaN where the file has none: only costs need it."""
        place = self.places.get("profiling_s")
        try:
            return float(self.cells[place]) if place is not None and place < len(self.cells) else math.nan
        except ValueError:
            return math.nan


def improved_points(fingerprints: Fingerprints, model: str) -> tuple[Setting, ...]:
    """The points that improved mode measures of `model`, at no more GPU time than the paper's grid (docs/maveriq.md).

    All precisions on one GPU at two depths and two lengths, as in the paper. Every other layout only for what it adds, because
    TP and PP overheads hardly depend on the precision: (2,1) at the widest and the narrowest precision, (1,2) at one precision
    and one length, (4,1) and (8,1) at one precision, one depth and one length. Of what the file holds: its two smallest
    output lengths, depths PP and PP + 1.
    """
    here = [s for s in fingerprints.points if s.model == model and s.batch == 1]
    lengths = sorted({s.output_length for s in here})[:2]
    precisions = fingerprints.precisions(model)
    if not lengths:
        return ()
    ends = {precisions[0], next((p for p in precisions if p[0] == "int4"), precisions[-1])}

    def wanted(s: Setting) -> bool:
        if s.output_length not in lengths or s.layers > s.pp + 1:
            return False
        if s.layout == (1, 1):
            return True
        if s.layout == (2, 1):
            return s.precision in ends
        if s.precision != precisions[0] or s.output_length != lengths[0]:
            return False
        return s.layout == (1, 2) or (s.layout in ((4, 1), (8, 1)) and s.layers == s.pp)

    return tuple(sorted(s for s in here if wanted(s)))
