"""Several models on one or two GPUs for real: the controller, its queues, loads and removals under traffic, deaths, memory.

    python -m systems.maveriq.controller.trial --fingerprints FILE.csv ... --out FILE.json [--gpus 2] [--limit-s 100]

The same engines serve all sections; `trial_node` says which models come, `trial_sections` what is done with them. FILE.json is
written after each section. A section that fails leaves its error there and the others go on; what the limit leaves out is
named. On a CPU (`--device cpu`, with `--engine-shape tiny`) it is the procedure, not a measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.maveriq.configuration import known_models
from systems.maveriq.controller.core import Core
from systems.maveriq.controller.driver import Controller
from systems.maveriq.controller.launch import PROMPT_TOKENS, Launcher, serving
from systems.maveriq.controller.library import Library
from systems.maveriq.controller.queues import QUEUES
from systems.maveriq.controller.trial_node import NODES
from systems.maveriq.controller.trial_sections import SECTION_S, Trial
from systems.maveriq.files import write
from systems.maveriq.models import load_support
from systems.maveriq.profile import tables
from systems.maveriq.profile.judge import together


def main(argv: Sequence[str] | None = None) -> int:
    """Run all sections; 0 when none failed or was left out, 1 otherwise, 2 for bad input."""
    args = _arguments().parse_args(argv)
    try:
        unknown = sorted(set(args.sections.split(",")) - set(SECTION_S))
        if unknown:
            raise InputError("command line", "--sections", ",".join(unknown), f"use some of {', '.join(SECTION_S)}")
        facts = {**known_models(), **(known_models(args.models_file) if args.models_file else {})}
        library = Library(together(args.fingerprints), args.mode, facts, load_support(args.models_file))
        options = ("--device", args.device, *args.engine_options.split())
        launcher = serving(args.engine_shape, options, one_rank=args.one_rank)
        told = asyncio.run(_run(args, library, launcher))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return int(bool(told["left_out"]) or any("error" in told[name] for name in SECTION_S if name in told))


async def _run(args: argparse.Namespace, library: Library, launcher: Launcher) -> dict[str, Any]:
    began = time.monotonic()
    node = NODES[args.gpus](args.models.split(","), args.tokens)
    if args.device == "cpu":
        node = replace(node, devices=())
    told, budgets = _about(args), node.budgets()
    async with Controller(Core(library.search(), QUEUES["per_model"]()), budgets, launcher, library) as controller:
        trial = Trial(node, budgets, controller, args.prompt_tokens, args.traffic_s, args.rate_rps)
        for name in args.sections.split(","):
            left_s = args.limit_s - (time.monotonic() - began)
            if left_s <= SECTION_S[name]:
                told["left_out"].append(name)
                continue
            print(f"[{time.monotonic() - began:.0f} s] {name}", flush=True)
            told[name] = await _tried(getattr(trial, name), left_s)
            told["seconds"] = time.monotonic() - began
            write(args.out, json.dumps(told, indent=1) + "\n")  # what there is, also when the next one never ends
    told["seconds"] = time.monotonic() - began
    write(args.out, json.dumps(told, indent=1) + "\n")
    print(f"{told['seconds']:.0f} s; left out: {', '.join(told['left_out']) or 'nothing'}", flush=True)
    return told


def _about(args: argparse.Namespace) -> dict[str, Any]:
    told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "fingerprints"}
    provenance = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or tables.head_commit(),
        "gpus": tables.gpus() if args.device == "cuda" else [],
        "command": [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]],
    }
    return {"gpus": args.gpus, "left_out": [], "setting": told, "provenance": provenance}


async def _tried(section: Callable[[], Awaitable[dict[str, Any]]], limit_s: float) -> dict[str, Any]:
    try:
        return await asyncio.wait_for(section(), limit_s)
    except TimeoutError:
        return {"error": f"not done after the {limit_s:.0f} s that were left"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m systems.maveriq.controller.trial", description=__doc__)
    add = parser.add_argument
    add(
        "--fingerprints",
        type=Path,
        nargs="+",
        required=True,
        help="CSV files of fingerprints; the first that has a point counts",
    )
    add("--out", type=Path, required=True)
    add("--gpus", type=int, choices=tuple(NODES), default=1)
    add("--models", default="llama-2-7b,llama-2-13b", help="two models (default: %(default)s)")
    add("--models-file", type=Path, help="YAML file with further models")
    add("--mode", choices=("paper", "improved"), default="improved", help="the estimator (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--engine-shape", default="model", help="shape that engines run (default: the model's own)")
    add("--engine-options", default="", help="further options of `python -m systems.common.serve`, quoted as one")
    add("--one-rank", action="store_true", help="run every engine in one process")
    add("--tokens", type=int, default=20, help="tokens of an answer (default: %(default)s)")
    add("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="tokens of a prompt, at most %(default)s (default)")
    add("--traffic-s", type=float, default=8.0, help="length of each stretch of traffic (default: %(default)s)")
    add("--rate-rps", type=float, help="requests per second (default: what keeps the busiest GPU at work 70 %% of the time)")
    add("--limit-s", type=float, default=100.0, help="begin nothing after so long (default: %(default)s)")
    add("--sections", default=",".join(SECTION_S), help="default: %(default)s")
    add("--commit", default="", help="of this code, where there is no git to ask")
    return parser


if __name__ == "__main__":
    sys.exit(main())
