"""Estimate a model's latency and memory from its fingerprints.

    python -m systems.maveriq.estimate --fingerprints FILE.csv --model M --tp 8 --pp 1 --dtype int4 --output-length 100
    python -m systems.maveriq.estimate --fingerprints FILE.csv --grid GRID.csv --out ESTIMATES.csv

FILE.csv has the columns of MaverIQ's authors (docs/maveriq.md). GRID.csv has the columns model, tp, pp, dtype, int8_kv, batch
and output_length; ESTIMATES.csv repeats them and adds what was estimated. Mode `improved` is the default: it is more exact
and gives intervals. Mode `paper` is the published method, number for number.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from systems.common.errors import InputError
from systems.maveriq.configuration import (
    LEVEL,
    MOST,
    Configuration,
    Estimate,
    ModelFacts,
    Question,
    known_models,
    whole_number,
)
from systems.maveriq.estimator import MODES, load_estimator
from systems.maveriq.files import write
from systems.maveriq.options import OneLineParser, run_command

GRID_COLUMNS = ("model", "tp", "pp", "dtype", "int8_kv", "batch", "output_length")
OUT_COLUMNS = (
    "latency_s", "latency_low_s", "latency_high_s", "memory_gib", "memory_low_gib", "memory_high_gib", "level", "mode", "notes",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = OneLineParser(
        prog="python -m systems.maveriq.estimate", description="Latency and memory of a deployment, from fingerprints."
    )
    made.add_argument("--fingerprints", type=Path, required=True, help="CSV file of fingerprints, with the authors' columns")
    made.add_argument("--mode", choices=MODES, default="improved", help="method (default: %(default)s)")
    made.add_argument("--model", help="model, as the file calls it")
    made.add_argument("--tp", type=int, help="tensor-parallel degree")
    made.add_argument("--pp", type=int, help="pipeline stages")
    made.add_argument("--dtype", help="weight precision: float16, int8, int4 or int4_gptq")
    made.add_argument("--int8-kv", action="store_true", help="int8 KV cache")
    made.add_argument("--batch", type=int, default=1, help="requests at once (default: %(default)s)")
    made.add_argument("--output-length", type=int, default=100, help="output tokens (default: %(default)s)")
    made.add_argument("--grid", type=Path, help=f"many questions: CSV file with {','.join(GRID_COLUMNS)}")
    made.add_argument("--out", type=Path, help="CSV file for the answers to --grid (default: standard output)")
    made.add_argument("--models", type=Path, help="YAML file with facts of more models (see data/models.yaml)")
    made.add_argument("--layers", type=int, help="depth of --model, where no file knows it")
    made.add_argument("--level", type=float, default=LEVEL, help="share of truths that intervals should hold (%(default)s)")
    made.add_argument("--prompt-tokens", type=int, help="prompt length of the fingerprints (default: found from them)")
    made.add_argument("--use-all", action="store_true", help="improved mode: learn from every row, not only from our grid's")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code: 0, or 2 for bad input."""

    def told() -> int:
        print(run(parser().parse_args(arguments)), end="", flush=True)
        return 0

    return run_command(told)


def run(options: argparse.Namespace) -> str:
    """What the command prints. Raises InputError."""
    if options.out is not None and options.grid is None:
        raise InputError("estimate", "--out", str(options.out), "it goes with --grid; a single answer is printed")
    questions = [_question(options)] if options.grid is None else read_grid(options.grid)
    for key in ("layers", "prompt_tokens"):
        value = getattr(options, key)
        if value is not None:
            _check_whole(key, value)
    if options.layers is not None and options.model is None:
        raise InputError(
            "estimate", "--layers", options.layers, "it goes with --model: give depths of many in a file for --models"
        )
    estimator = load_estimator(
        options.fingerprints,
        options.mode,
        _models(options),
        level=options.level,
        prompt_tokens=options.prompt_tokens,
        use_all=options.use_all,
    )
    found = estimator.estimate_many(questions)
    answers = [found[place] for place in range(len(questions))]
    if options.grid is None:
        return _json([(questions[0], answers[0])], options.mode)[0] + "\n" if options.json else _shown(questions[0], answers[0])
    text = (
        "\n".join(_json(list(zip(questions, answers, strict=True)), options.mode)) + "\n"
        if options.json
        else _table(questions, answers, options.mode)
    )
    if options.out is None:
        return text
    write(options.out, text)
    return ""


def _question(options: argparse.Namespace) -> Question:
    for key in ("model", "tp", "pp", "dtype"):
        if getattr(options, key) is None:
            raise InputError("estimate", f"--{key}", None, "say which configuration is meant, or give many with --grid")
    for key in ("tp", "pp", "batch", "output_length"):
        _check_whole(key, getattr(options, key))
    configuration = Configuration(options.tp, options.pp, options.dtype, options.int8_kv)
    return Question(options.model, configuration, options.batch, options.output_length)


def _check_whole(key: str, value: int) -> None:
    if not 1 <= value <= MOST:
        raise InputError("estimate", f"--{key.replace('_', '-')}", value, f"use a whole number from 1 to {MOST}")


def _models(options: argparse.Namespace) -> Mapping[str, ModelFacts]:
    models = dict(known_models())
    if options.models is not None:
        models |= known_models(options.models)
    if options.layers is not None and options.model is not None:
        models[options.model] = replace(models.get(options.model, ModelFacts(options.model, 1)), layers=options.layers)
    return models


def read_grid(file: Path) -> list[Question]:
    """The questions of a grid file. Raises InputError for a missing column or a cell that can't be used."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            header = [name.strip() for name in next(csv.reader(stream), [])]
            for name in GRID_COLUMNS:
                if header.count(name) != 1:
                    what = "comes twice" if name in header else "is missing"
                    raise InputError(file, "columns", name, f"this column {what}: needed are {', '.join(GRID_COLUMNS)}")
            rows = csv.DictReader(stream, header)
            return [_row(f"{file} line {rows.line_num + 1}", row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(file, "--grid", str(error), f"give a CSV file with the columns {','.join(GRID_COLUMNS)}") from error


def _row(where: str, row: Mapping[str, str | None]) -> Question:
    cells = {name: (row[name] or "").strip() for name in GRID_COLUMNS}
    for name in ("model", "dtype"):
        if not cells[name]:
            raise InputError(where, name, cells[name], "the cell is empty: fill it in")
    numbers = {}
    for name in ("tp", "pp", "batch", "output_length"):
        number = whole_number(cells[name])
        if number is None:
            raise InputError(where, name, cells[name], f"needs a whole number from 1 to {MOST}")
        numbers[name] = number
    if cells["int8_kv"].lower() not in ("true", "false", "0", "1"):
        raise InputError(where, "int8_kv", cells["int8_kv"], "write True or False")
    int8_kv = cells["int8_kv"].lower() in ("true", "1")
    configuration = Configuration(numbers["tp"], numbers["pp"], cells["dtype"], int8_kv)
    return Question(cells["model"], configuration, numbers["batch"], numbers["output_length"])


def _columns(question: Question, answer: Estimate, mode: str) -> dict[str, object]:
    c = question.configuration
    asked = (question.model, c.tp, c.pp, c.dtype, c.int8_kv, question.batch, question.output_length)
    given = {**asdict(answer), "mode": mode, "notes": "; ".join(answer.notes)}
    return {**dict(zip(GRID_COLUMNS, asked, strict=True)), **{name: given[name] for name in OUT_COLUMNS}}


def _json(pairs: Sequence[tuple[Question, Estimate]], mode: str) -> list[str]:
    """One line each; what is not known is null."""

    def plain(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [json.dumps({name: plain(value) for name, value in _columns(*pair, mode).items()}) for pair in pairs]


def _table(questions: Sequence[Question], answers: Sequence[Estimate], mode: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, (*GRID_COLUMNS, *OUT_COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_columns(question, answer, mode) for question, answer in zip(questions, answers, strict=True))
    return text.getvalue()


def _shown(question: Question, answer: Estimate) -> str:
    c = question.configuration
    lines = [f"{question.model} on TP {c.tp} x PP {c.pp}, {c.dtype}{', int8 KV cache' if c.int8_kv else ''}"]
    lines[0] += f": batch {question.batch}, {question.output_length} output tokens"
    lines.append("latency  " + _range(answer.latency_s, answer.latency_low_s, answer.latency_high_s, "s", answer.level))
    lines.append("memory   " + _range(answer.memory_gib, answer.memory_low_gib, answer.memory_high_gib, "GiB", answer.level))
    return "\n".join([*lines, *(f"note: {note}" for note in answer.notes)]) + "\n"


def _range(value: float, low: float, high: float, unit: str, level: float) -> str:
    bounds = "" if math.isnan(low) else f"   {low:.4g} to {high:.4g} {unit} ({100 * level:g} %)"
    return f"{value:.4g} {unit}{bounds}"


if __name__ == "__main__":
    sys.exit(main())
