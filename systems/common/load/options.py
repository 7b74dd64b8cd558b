"""The command's options, and what they mean together."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from systems.common.errors import InputError
from systems.common.load.api import KINDS, PATHS
from systems.common.load.measurement import Limits
from systems.common.load.plan import SHORT_NAMES, Sources
from systems.common.load.prompts import Ids, Prompts, Texts, Words

PROMPTS = ("ids", "text")
DECLARED: Mapping[str, str] = {
    # flag: key of a declaration (docs/workloads.md)
    "arrivals": "arrivals",
    "cv": "cv",
    "lengths": "lengths",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "mean_input_tokens": "mean_input_tokens",
    "mean_output_tokens": "mean_output_tokens",
    "count": "requests",
    "adapters": "adapters",
}


def parser() -> argparse.ArgumentParser:
    """All options; docs/load.md explains them."""
    made = argparse.ArgumentParser(
        prog="python -m systems.common.load", description="Load an OpenAI-compatible server and measure its latencies."
    )
    server = made.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:8000/v1", help="where it answers (%(default)s)")
    server.add_argument("--model", help="the model's name there (default: the first that it lists)")
    server.add_argument("--kind", choices=sorted(KINDS), default="vllm", help="what it understands (%(default)s)")
    server.add_argument("--route", choices=sorted(PATHS), default="completions", help="%(default)s")
    server.add_argument("--api-key", metavar="REF", help="env:NAME or file:PATH; never the key itself")
    server.add_argument("--adapter-model", default="{adapter}", metavar="NAME", help="an adapter's name there (%(default)s)")
    server.add_argument("--no-check", action="store_true", help="send although the server does not list the model")

    load = made.add_argument_group("requests, by a file, a declaration or flags")
    load.add_argument("--requests", type=Path, metavar="FILE.csv", help="arrival_s, input_tokens, output_tokens, adapter")
    load.add_argument("--workload", type=Path, metavar="FILE.yaml", help="a declaration (docs/workloads.md); flags override it")
    load.add_argument("--arrivals", help="poisson (default), deterministic, gamma, ...")
    load.add_argument("--rate", type=float, metavar="RPS", help="requests per second; inf: all at once")
    load.add_argument("--cv", type=float, help="for --arrivals gamma")
    load.add_argument("--lengths", help=f"fixed (default), a dataset, or {', '.join(SHORT_NAMES)}")
    for name, help_text in (("input-tokens", "prompt"), ("output-tokens", "answer")):
        load.add_argument(f"--{name}", type=int, metavar="N", help=f"length of every {help_text}")
    for name, help_text in (("input-tokens", "prompts"), ("output-tokens", "answers")):
        load.add_argument(f"--mean-{name}", type=float, metavar="N", help=f"stretch a dataset's {help_text} to this mean")
    load.add_argument("--count", type=int, metavar="N", help="how many requests")
    load.add_argument("--duration", type=float, metavar="S", help="seconds of arrivals; a closed loop stops sending then")
    load.add_argument("--adapters", type=int, metavar="N", help="name N adapters in turn")
    load.add_argument("--seed", type=int, default=0, help="%(default)s")
    load.add_argument("--dataset", action="append", default=[], metavar="NAME=FILE", help="a dataset's file (else: a stand-in)")
    load.add_argument("--concurrency", type=int, metavar="N", help="closed loop: so many at once, arrivals don't matter")

    prompts = made.add_argument_group("prompts")
    prompts.add_argument("--prompts", choices=PROMPTS, help="ids (default where the server takes them) or text")
    prompts.add_argument("--vocab", type=int, default=32000, help="random ids are below this (%(default)s)")
    prompts.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json: ids or text of exact length"
    )
    prompts.add_argument("--temperature", type=float, default=0.0, help="%(default)s")
    prompts.add_argument("--extra", default="{}", metavar="JSON", help="further fields of every request's body")

    run = made.add_argument_group("run")
    run.add_argument("--slo", help="a preset, or ttft=0.5,tpot=0.05,e2e=10 (seconds)")
    run.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="a request that takes longer failed (%(default)s)"
    )
    run.add_argument(
        "--grace", type=float, default=math.inf, metavar="S", help="cut off what is under way so long after the last"
    )
    run.add_argument("--warmup", type=int, default=0, metavar="N", help="send so many first, not counted (%(default)s)")
    run.add_argument("--out", type=Path, metavar="DIR", help="folder for requests.csv, requests.parquet, metrics.json")
    run.add_argument("--overwrite", action="store_true", help="replace what DIR holds")
    run.add_argument("--no-progress", action="store_true", help="no progress bar")
    return made


def closed(options: argparse.Namespace) -> bool:
    """Whether arrivals don't matter."""
    return options.concurrency is not None or options.rate == math.inf


def sources(options: argparse.Namespace) -> Sources:
    """Where requests come from. Raises InputError for flags that contradict each other."""
    if options.concurrency is not None and options.rate not in (None, math.inf):
        raise InputError("load", "--rate", options.rate, "an open loop has no --concurrency: leave one of them out")
    flags = {key: value for flag, key in DECLARED.items() if (value := getattr(options, flag)) is not None}
    if options.rate is not None and options.rate != math.inf:
        flags["rate_rps"] = options.rate
    if options.duration is not None and not closed(options):
        flags["seconds"] = options.duration
    if "input_tokens" in flags or "output_tokens" in flags:
        flags.setdefault("lengths", "fixed")
    return Sources(options.requests, options.workload, flags, dict(map(_dataset, options.dataset)), closed(options))


def _dataset(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise InputError("load", "--dataset", text, "write NAME=FILE, a file that exists")
    return name, Path(path)


def limits(options: argparse.Namespace, requests: int) -> Limits:
    """How the run is bounded. Raises InputError for a bound that leaves nothing."""
    for key in ("timeout", "grace", "duration"):
        value = getattr(options, key)
        if value is not None and not (value > 0 or (key == "grace" and value == 0)):
            raise InputError("load", f"--{key}", value, "give seconds above 0")
    if options.concurrency is not None and options.concurrency < 1:
        raise InputError("load", "--concurrency", options.concurrency, "give at least 1")
    if options.warmup < 0:
        raise InputError("load", "--warmup", options.warmup, "give 0 or more requests")
    return Limits(
        concurrency=(options.concurrency or requests) if closed(options) else None,
        stop_sending_s=options.duration if closed(options) and options.duration is not None else math.inf,
        grace_s=options.grace,
        timeout_s=options.timeout,
    )


def prompts(options: argparse.Namespace, seed: int) -> Prompts:
    """What makes prompts. Raises InputError where ids and text are mixed up, or a tokenizer can't be read."""
    takes_ids = options.kind != "openai" and options.route == "completions"
    kind = options.prompts or ("ids" if takes_ids else "text")
    if kind == "ids" and not takes_ids:
        raise InputError("load", "--prompts", kind, "a chat, and a server of kind openai, takes no token ids: use text")
    if kind == "text":
        return Texts(seed, options.tokenizer) if options.tokenizer else Words(seed)
    if options.tokenizer:
        from systems.common.load.prompts import load_tokenizer, usable

        return Ids(seed, *usable(load_tokenizer(options.tokenizer)))
    return Ids(seed, options.vocab)


def api_key(reference: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The key that `reference` (env:NAME or file:PATH) leads to. Raises InputError, which never shows a key."""
    if reference is None:
        return None
    kind, _, name = reference.partition(":")
    if kind not in ("env", "file") or not name:
        raise InputError("load", "--api-key", "(hidden)", "write env:NAME or file:PATH, not the key itself")
    try:
        found = environ[name] if kind == "env" else Path(name).expanduser().read_text(encoding="utf-8").strip()
    except (KeyError, OSError, UnicodeDecodeError):
        raise InputError("load", "--api-key", reference, "there is no such variable or readable file: set it") from None
    if not found or not found.isascii() or not found.isprintable():
        raise InputError("load", "--api-key", reference, "is empty or holds characters that no key has")
    return found


def extra(text: str) -> Mapping[str, object]:
    """The fields that --extra adds. Raises InputError unless it is a JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError("load", "--extra", text, "give a JSON object")
    return found
