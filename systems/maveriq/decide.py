"""How to deploy a model on the GPUs that there are: the configuration search as a command.

    python -m systems.maveriq.decide --fingerprints FILE.csv --model M --intent min_cost --gpu-total-gib 47.98828
        --gpu-used-gib 0.46527,0.46527,... [--slo S] [--accuracy A] [--fp16-only] [--batch B] [--output-length O]
        [--strategy llf] [--gpu-busy 0.1,0.9,...] [--mode paper] [--models FILE.yaml]
    python -m systems.maveriq.decide --fingerprints FILE.csv --cases FILE.jsonl [any of the above as defaults]

One decision is one JSON object on stdout: configuration, `pp_map`, `gpus` and `gib_per_gpu` (entry i x TP + r is rank r of
stage i), estimates, `best_effort`, and `refusal`, which is null or the reason why nothing can be deployed. A case is a JSON
object whose keys are the long options with `_` for `-` (`gpu_used_gib` may be a list); there is a line out for every line
in, with its number under `line`; a bad one gives `error`, and the rest go on.

Exit status: 0 decided; 1 refused (with `--cases`: refusals are answers, 0); 2 bad input, one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.maveriq.configuration import MOST, ModelFacts, known_models
from systems.maveriq.estimator import load_estimator
from systems.maveriq.intents import INTENTS
from systems.maveriq.models import load_support
from systems.maveriq.options import UNUSABLE, OneLineParser, run_command
from systems.maveriq.placement import GpuState
from systems.maveriq.search import OUTPUT_LENGTH, Decision, Refusal, Search, Wish
from systems.maveriq.strategies import STRATEGIES, THRESHOLD

REFUSED = 1
MOST_GPUS = 1024


@dataclass(frozen=True, slots=True)
class Case:
    """A wish and the GPUs it is asked for."""

    wish: Wish
    gpus: tuple[GpuState, ...]


def searcher(fingerprints: Path, mode: str = "paper", models: Path | None = None) -> Search:
    """The search over the fingerprints in a CSV file; `models` adds models to the built-in ones.

    Raises InputError for files that can't be used.
    """
    facts: Mapping[str, ModelFacts] = {**known_models(), **(known_models(models) if models else {})}
    return Search(load_estimator(fingerprints, mode, facts), facts, load_support(models))


def answer(search: Search, case: Case) -> dict[str, Any]:
    """The decision for `case` as plain data. Raises InputError as `Search.decide` does."""
    found = search.deploy(case.wish, case.gpus)
    told: dict[str, Any] = {"model": case.wish.model, "intent": case.wish.intent, "strategy": case.wish.strategy}
    if isinstance(found, Refusal):
        return {**told, "configuration": None, "refusal": found.reason, "best_effort": False, "candidates": found.candidates}
    return {**told, **_told(found), "refusal": None}


def _told(found: Decision) -> dict[str, Any]:
    one, estimate = found.configuration, found.estimate
    return {
        "configuration": {"tp": one.tp, "pp": one.pp, "dtype": one.dtype, "int8_kv": one.int8_kv},
        "pp_map": list(found.placement.pp_map),
        "gpus": list(found.placement.gpus),
        "gib_per_gpu": [_finite(gib) for gib in found.placement.gib],
        "estimates": {
            "latency_s": _finite(estimate.latency_s),
            "latency_interval_s": _interval(estimate.latency_low_s, estimate.latency_high_s),
            "memory_gib": _finite(estimate.memory_gib),
            "memory_interval_gib": _interval(estimate.memory_low_gib, estimate.memory_high_gib),
            "level": estimate.level,
        },
        "cost": _finite(found.cost),
        "best_effort": found.best_effort,
        "candidates": found.candidates,
        "placeable": found.placeable,
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval(low: float, high: float) -> list[float] | None:
    return [float(low), float(high)] if math.isfinite(low) and math.isfinite(high) else None


_KEYS: Mapping[str, tuple[type, ...]] = {
    "model": (str,), "intent": (str,), "gpu_total_gib": (int, float, list, str), "gpu_used_gib": (list, str, int, float),
    "gpu_busy": (list, str, int, float), "slo": (int, float), "accuracy": (int, float), "fp16_only": (bool,), "batch": (int,),
    "output_length": (int,), "strategy": (str,), "packing_threshold": (int, float),
}  # fmt: skip

_NAMES = {str: "string", int: "whole number", float: "number", list: "list", bool: "true or false"}


def case_of(given: Mapping[str, Any], where: str) -> Case:
    """A case from plain data with the keys of `_KEYS`. Raises InputError that names `where` and the key."""
    has: dict[str, Any] = {key: _value(where, key, value) for key, value in given.items() if value is not None}
    for key in ("model", "gpu_total_gib", "gpu_used_gib"):
        if key not in has:
            raise InputError(where, key, None, "is missing: a decision needs model, gpu_total_gib and gpu_used_gib")
    wish = Wish(
        has["model"], has.get("intent", "min_cost"), float(has.get("slo", 0.0)), float(has.get("accuracy", 0.0)),
        bool(has.get("fp16_only", False)), has.get("batch", 1), has.get("output_length", OUTPUT_LENGTH),
        has.get("strategy", "llf"), float(has.get("packing_threshold", THRESHOLD)),
    )  # fmt: skip
    try:
        return Case(wish.check(), _gpus(has, where))
    except InputError as error:
        raise InputError(where, error.key, error.value, error.mend) from error


def _value(where: str, key: str, value: object) -> object:
    """`value` if it is of a kind that `key` may have; a whole number may come as 2.0."""
    if key not in _KEYS:
        raise InputError(where, key, value, f"no such key: use {', '.join(_KEYS)}")
    kinds = _KEYS[key]
    if isinstance(value, float) and float not in kinds and int in kinds and value.is_integer():
        value = int(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise InputError(where, key, value, f"write a {' or '.join(_NAMES[kind] for kind in kinds)}")
    if isinstance(value, int) and abs(value) > MOST:
        raise InputError(where, key, value, f"use a number of at most {MOST}")
    return value


def _gpus(has: Mapping[str, Any], where: str) -> tuple[GpuState, ...]:
    used = _numbers(where, "gpu_used_gib", has["gpu_used_gib"])
    total = _numbers(where, "gpu_total_gib", has["gpu_total_gib"])
    busy = _numbers(where, "gpu_busy", has.get("gpu_busy", [0.0] * len(used)))
    if not 1 <= len(used) <= MOST_GPUS:
        raise InputError(where, "gpu_used_gib", len(used), f"give one number per GPU, for 1 to {MOST_GPUS} GPUs")
    total = total * len(used) if len(total) == 1 else total
    for key, numbers in (("gpu_total_gib", total), ("gpu_busy", busy)):
        if len(numbers) != len(used):
            raise InputError(where, key, numbers, f"give {len(used)} numbers, one per GPU of gpu_used_gib")
    for place, (most, now, share) in enumerate(zip(total, used, busy, strict=True)):
        if most <= 0:
            raise InputError(where, "gpu_total_gib", most, "must be above 0")
        if not 0 <= now <= most:
            raise InputError(where, "gpu_used_gib", now, f"GPU {place} must use between 0 and its {most:g} GiB")
        if not 0 <= share <= 1:
            raise InputError(where, "gpu_busy", share, "a busy share lies between 0 and 1")
    return tuple(GpuState(place, *numbers) for place, numbers in enumerate(zip(total, used, busy, strict=True)))


def _numbers(where: str, key: str, given: object) -> list[float]:
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    try:
        numbers = [math.nan if isinstance(part, bool) else float(str(part)) for part in parts]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise InputError(where, key, given, "write finite numbers, separated by commas")
    return numbers


def read_cases(file: Path, defaults: Mapping[str, Any]) -> Iterator[tuple[int, Case | InputError]]:
    """The cases of a JSONL file with their line numbers; a bad line is an InputError in its place, blank lines are skipped.

    Raises InputError when the file itself can't be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut strings at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("command line", "--cases", str(file), f"can't be read ({error}): give a file of JSON lines") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, case_of({**defaults, **_object(line, f"{file}, line {number}")}, f"{file}, line {number}")
            except InputError as error:
                yield number, error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(where, "JSON", line, f"is no JSON ({error}): write one object per line") from error
    if not isinstance(found, dict):
        raise InputError(where, "JSON", found, "write an object, such as {\"model\": \"llama-2-7b\"}")  # fmt: skip
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""

    def told() -> int:
        args = _arguments().parse_args(argv)
        search = searcher(args.fingerprints, args.mode, args.models)
        given = {key: value for key in _KEYS if (value := getattr(args, key)) is not None}
        return _many(search, args.cases, given) if args.cases else _one(search, given)

    return run_command(told)


def _one(search: Search, given: Mapping[str, Any]) -> int:
    found = answer(search, case_of(given, "command line"))
    print(json.dumps(found, allow_nan=False), flush=True)
    return REFUSED if found["refusal"] else 0


def _many(search: Search, file: Path, defaults: Mapping[str, Any]) -> int:
    bad = 0
    for number, case in read_cases(file, defaults):
        try:
            if isinstance(case, InputError):
                raise case
            told = answer(search, case)
        except InputError as error:
            bad += 1
            told = {"error": str(error)}
        print(json.dumps({"line": number, **told}, allow_nan=False))
    sys.stdout.flush()
    if bad:
        print(f"{file}: lines: {bad}: could not be answered; each says why under `error`", file=sys.stderr)
    return UNUSABLE if bad else 0


def _arguments() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m systems.maveriq.decide", description="Choose a configuration, a layer map and GPUs.")
    add = parser.add_argument
    add("--fingerprints", type=Path, required=True, help="CSV file of fingerprints, with the authors' columns")
    add("--model", help="a model of that file")
    add("--intent", choices=tuple(INTENTS), help="what to minimise (default: min_cost)")
    add("--gpu-total-gib", help="memory of each GPU, or one number per GPU")
    add("--gpu-used-gib", help="what is used now, one number per GPU, separated by commas")
    add("--gpu-busy", help="busy share of each GPU, 0 to 1 (default: 0), for the load strategy")
    add("--slo", type=float, help="latency limit of a whole request, seconds (default: none)")
    add("--accuracy", type=float, help="least accuracy, percent of fp16's (default: none)")
    add("--fp16-only", action="store_true", default=None, help="only float16 weights")
    add("--batch", type=int, help="requests at once (default: 1)")
    add("--output-length", type=int, help=f"output tokens (default: {OUTPUT_LENGTH})")
    add("--strategy", choices=STRATEGIES, help="which GPUs to prefer (default: llf)")
    add("--packing-threshold", type=float, help=f"busy share below which hybrid packs (default: {THRESHOLD})")
    add("--cases", type=Path, help="JSONL file: one decision per line")
    add("--mode", choices=("paper", "improved"), default="paper", help="the estimator (default: paper)")
    add("--models", type=Path, help="YAML file with further models, unsupported configurations and accuracies")
    return parser


if __name__ == "__main__":
    sys.exit(main())
