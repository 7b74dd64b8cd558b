"""Readers of recorded workloads: published traces and users' own files.

Each turns a file into a `Recorded`, whose columns are None where the format has none. Whatever is wrong with a file is
an InputError that names the file with its line, the column, the value and the mend. `READERS` maps the names that
datasets/registry.yaml uses. SpotServe's rate curve and availability traces have readers of their own at the end.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from systems.common.errors import InputError
from systems.common.workloads.lengths import Lengths

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded workload: arrival times (s, rising, from 0), lengths (tokens), adapters; None where not recorded."""

    arrival_s: FloatArray | None = None
    input_tokens: IntArray | None = None
    output_tokens: IntArray | None = None
    adapters: tuple[str | None, ...] | None = None

    def __post_init__(self) -> None:
        for column in (self.arrival_s, self.input_tokens, self.output_tokens):
            if column is not None:
                column.flags.writeable = False  # readers' results are kept and shared between trials

    def lengths(self, name: str) -> Lengths:
        """Both length columns. Raises InputError when the dataset `name` records none."""
        if self.input_tokens is None or self.output_tokens is None:
            raise InputError("workload", "lengths", name, "this dataset has no lengths of requests: choose another")
        return Lengths(self.input_tokens, self.output_tokens)

    def arrivals(self, name: str) -> FloatArray:
        """The arrival times. Raises InputError when the dataset `name` records none."""
        if self.arrival_s is None:
            raise InputError("workload", "trace", name, "this dataset has no arrival times: choose another")
        return self.arrival_s


@dataclass(frozen=True, slots=True)
class _Table:
    """Columns of text with the line number of every row, for error messages."""

    path: Path
    lines: tuple[int, ...]
    columns: Mapping[str, tuple[str, ...]]

    def error(self, row: int, column: str, mend: str) -> InputError:
        return InputError(f"{self.path}, line {self.lines[row]}", column, self.columns[column][row], mend)

    def numbers(self, column: str) -> FloatArray:
        """The column as finite floats."""
        cells = self.columns[column]
        try:
            values = np.array(cells, dtype=np.float64)
        except ValueError:
            values = np.array([_number(cell) for cell in cells])
        for row in np.flatnonzero(~np.isfinite(values))[:1].tolist():
            raise self.error(row, column, "write a finite number")
        return values

    def tokens(self, column: str, least: int = 1) -> IntArray:
        """The column as token counts of at least `least`."""
        values = self.numbers(column)
        for row in np.flatnonzero((values < least) | (values != np.rint(values)) | (values > 2**53))[:1].tolist():
            raise self.error(row, column, f"write a whole number of tokens, at least {least}")
        return values.astype(np.int64)

    def rising(self, column: str, values: FloatArray) -> FloatArray:
        """`values` once it is sure that they start at 0 or later and never fall."""
        for row in np.flatnonzero(np.diff(values, prepend=0.0) < 0)[:1].tolist():
            mend = "sort the rows by arrival" if row else "arrivals are seconds from the start of the run: none is negative"
            raise self.error(row, column, mend)
        return values


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not blank."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            path, "file", getattr(error, "strerror", None) or str(error), "give a readable CSV file in UTF-8"
        ) from error


def _read(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...] = (), rows: slice = slice(None), header: bool = True
) -> _Table:
    """The named columns of a CSV file, those of `optional` only where present; without a header `required` is all of them."""
    content = _rows(path)
    names = next(content, (0, []))[1] if header else list(required)
    if header and not names:
        raise InputError(path, "file", "empty", f"give a CSV file with the columns {', '.join(required)}")
    names = [name.strip() for name in names]
    for name in required:
        if name not in names:
            raise InputError(path, name, f"columns: {', '.join(names)}", "add this column (or correct its name)")
    wanted = [name for name in (*required, *optional) if name in names]
    places = [names.index(name) for name in wanted]
    lines: list[int] = []
    picked: list[list[str]] = []
    for line, cells in islice(content, rows.start, rows.stop):
        if len(cells) != len(names):
            raise InputError(f"{path}, line {line}", "row", ",".join(cells), f"give {len(names)} cells, one per column")
        lines.append(line)
        picked.append([cells[place] for place in places])
    if not lines:
        raise InputError(path, "file", "no rows", "give at least one request")
    return _Table(path, tuple(lines), dict(zip(wanted, zip(*picked, strict=True), strict=True)))


def requests_csv(path: Path) -> Recorded:
    """A user's own workload: columns `arrival_s`, `input_tokens`, `output_tokens` and, if there are any, `adapter`.

    Arrivals are seconds from the start of the run, sorted. An empty adapter cell means the base model.
    """
    table = _read(path, ("arrival_s", "input_tokens", "output_tokens"), ("adapter",))
    adapters = table.columns.get("adapter")
    return Recorded(
        arrival_s=table.rising("arrival_s", table.numbers("arrival_s")),
        input_tokens=table.tokens("input_tokens"),
        output_tokens=table.tokens("output_tokens"),
        adapters=None if adapters is None else tuple(cell.strip() or None for cell in adapters),
    )


def azure_llm(path: Path) -> Recorded:
    """Azure LLM inference traces 2023: TIMESTAMP (to 100 ns), ContextTokens, GeneratedTokens; arrivals count from the first."""
    table = _read(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    stamps = _timestamps(table, "TIMESTAMP")
    seconds = (stamps - stamps[0]) / 1e9
    return Recorded(table.rising("TIMESTAMP", seconds), table.tokens("ContextTokens"), table.tokens("GeneratedTokens"))


def _timestamps(table: _Table, column: str) -> IntArray:
    """Nanoseconds since the epoch."""
    cells = table.columns[column]
    try:
        return np.array(cells, dtype="datetime64[ns]").astype(np.int64)
    except ValueError:
        for row, cell in enumerate(cells):
            try:
                np.datetime64(cell, "ns")
            except ValueError:
                raise table.error(row, column, "write a date and time such as 2023-11-16 18:15:46.68") from None
        raise


def sharegpt_lengths(path: Path) -> Recorded:
    """Processed ShareGPT lengths: num_prefill_tokens and num_decode_tokens; no arrivals."""
    table = _read(path, ("num_prefill_tokens", "num_decode_tokens"))
    return Recorded(input_tokens=table.tokens("num_prefill_tokens"), output_tokens=table.tokens("num_decode_tokens"))


CHARACTERS_PER_TOKEN = 3.9
"""Of ShareGPT in English with Llama's tokenizer, roughly; there is no tokenizer here."""


def sharegpt_turns(path: Path) -> Recorded:
    """ShareGPT's conversations (JSON): the first two turns' characters over `CHARACTERS_PER_TOKEN`; no arrivals.

    As vLLM's and dLoRA's clients take them, whatever the turns' roles are; conversations of fewer turns are left out.
    """
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
        turns = [entry["conversations"] for entry in conversations]
        pairs = [[len(turn["value"]) for turn in turns[:2]] for turns in turns if len(turns) >= 2]
    except (OSError, ValueError, TypeError, KeyError) as error:
        mend = "give a JSON list of {conversations: [{value: text}, ...]}"
        raise InputError(path, "file", type(error).__name__, mend) from error
    if not pairs:
        raise InputError(path, "file", "no conversation of two turns", "give at least one")
    tokens = np.maximum(1, np.rint(np.array(pairs) / CHARACTERS_PER_TOKEN)).astype(np.int64)
    return Recorded(input_tokens=tokens[:, 0].copy(), output_tokens=tokens[:, 1].copy())


BURSTGPT_SKIP = 5200
"""Rows that LLMStation's client passes over (its BurstGPT client, papers' sheet section 4)."""


def burstgpt(path: Path, model: str | None = "ChatGPT", skip: int = BURSTGPT_SKIP, limit: int | None = None) -> Recorded:
    """BurstGPT: the rows of one `model` (None: of all) after the first `skip` rows of the file, `limit` of them at most.

    Columns Timestamp (whole seconds, so requests share arrival times), Model, Request tokens, Response tokens.
    Arrivals count from the first row taken. Rows without an answer are failures in the trace and are left out.
    With the defaults: what LLMStation replays.
    """
    names = ("Timestamp", "Model", "Request tokens", "Response tokens")
    stop = None if limit is None else skip + 4 * limit + 1000  # most rows are ChatGPT's: enough in one go, checked below
    while True:
        table = _read(path, names, rows=slice(skip, stop))
        requests, responses = table.tokens("Request tokens", least=0), table.tokens("Response tokens", least=0)
        chosen = (requests > 0) & (responses > 0)
        if model is not None:
            chosen &= np.array(table.columns["Model"]) == model
        if stop is None or chosen.sum() >= (limit or 0) or len(table.lines) < stop - skip:
            break
        stop = skip + 2 * (stop - skip)
    rows = np.flatnonzero(chosen)[:limit]
    if not len(rows):
        raise InputError(path, "Model", model, f"no row of this model after row {skip}: choose another model or a smaller skip")
    times = table.numbers("Timestamp")
    table.rising("Timestamp", times)
    return Recorded(times[rows] - times[rows[0]], requests[rows], responses[rows])


SPOTSERVE_OUTPUT_TOKENS = 128
"""S_out of every SpotServe experiment; generation never stops early (paper, section 6.1)."""


def spotserve_queries(path: Path) -> Recorded:
    """SpotServe's query traces, without a header: number, arrival (s), prompt length, byte offset. Answers have 128 tokens."""
    table = _read(path, ("number", "arrival_s", "input_tokens", "offset"), header=False)
    inputs = table.tokens("input_tokens")
    arrivals = table.rising("arrival_s", table.numbers("arrival_s"))
    return Recorded(arrivals, inputs, np.full(len(inputs), SPOTSERVE_OUTPUT_TOKENS, dtype=np.int64))


READERS: Mapping[str, Callable[[Path], Recorded]] = {
    "azure_llm": azure_llm,
    "burstgpt": burstgpt,
    "requests_csv": requests_csv,
    "sharegpt_lengths": sharegpt_lengths,
    "sharegpt_turns": sharegpt_turns,
    "spotserve_queries": spotserve_queries,
}


def spotserve_rates(path: Path) -> tuple[float, ...]:
    """SpotServe's arrival-rates.csv: one row of rates (req/s), a minute each.

    Raises InputError for a cell that is not a rate above 0.
    """
    line, cells = next(_rows(path), (0, []))
    rates = [_number(cell) for cell in cells]
    for cell, rate in zip(cells, rates, strict=True):
        if not (math.isfinite(rate) and rate > 0):
            raise InputError(f"{path}, line {line}", "rate", cell, "write a finite rate above 0")
    if not rates:
        raise InputError(path, "file", "empty", "give one row of rates")
    return tuple(rates)


@dataclass(frozen=True, slots=True)
class AvailabilityEvent:
    """One change of a spot pool at `time_s`: `kind` is add, remove, other or DONE. `required_rps` is a change of the demand."""

    time_s: float
    kind: str
    nodes: tuple[str, ...]
    required_rps: float | None = None


_KINDS = ("add", "remove", "other", "DONE")


def spotserve_availability(path: Path) -> tuple[AvailabilityEvent, ...]:
    """A SpotServe availability trace, in order of time: a segment (JSON lines, `.txt`) or the full log (`.csv`).

    Times are when a change takes effect; SpotServe announces each 30 s earlier.
    """
    events = _full_log(path) if path.suffix == ".csv" else _segment(path)
    for line, (before, after) in enumerate(pairwise(events), start=2):
        if after.time_s < before.time_s:
            raise InputError(f"{path}, line {line}", "time", after.time_s, "sort the events by time")
    if not events:
        raise InputError(path, "file", "empty", "give at least one event")
    return tuple(events)


def _full_log(path: Path) -> list[AvailabilityEvent]:
    table = _read(path, ("ms", "kind", "node"), header=False)
    times = table.numbers("ms") / 1000
    for row, kind in enumerate(table.columns["kind"]):
        if kind not in _KINDS:
            raise table.error(row, "kind", f"use one of {', '.join(_KINDS)}")
    rows = zip(times.tolist(), table.columns["kind"], table.columns["node"], strict=True)
    return [AvailabilityEvent(time_s, kind, (node,)) for time_s, kind, node in rows]


def _segment(path: Path) -> list[AvailabilityEvent]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "file", getattr(error, "strerror", None) or str(error), "give a readable text file") from error
    return [_event(f"{path}, line {line}", row) for line, row in enumerate(text.splitlines(), start=1) if row.strip()]


def _event(where: str, row: str) -> AvailabilityEvent:
    shape = 'write [ms, "add"|"remove"|"other"|"DONE", {"nodes": [...]}]'
    try:
        stamp_ms, kind, details = json.loads(row)
        needed = details.get("required_tpt")
        event = AvailabilityEvent(stamp_ms / 1000, kind, tuple(details["nodes"]), None if needed is None else float(needed))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(where, "event", row, shape) from error
    if event.kind not in _KINDS or not (math.isfinite(event.time_s) and event.time_s >= 0):
        raise InputError(where, "event", row, shape)
    return event
