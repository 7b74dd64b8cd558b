"""The controller as a program.

    python -m systems.maveriq.controller --fingerprints FILE.csv --gpu-total-gib 47.99 --gpus 8 [--http PORT]

reads commands from the terminal or a pipe (`help` lists them), or serves HTTP with `--http`. GPUs are real, seen through
`nvidia-smi`, unless `--gpu-total-gib` makes them virtual: budgets as bookkeeping. Engines are `python -m systems.common.serve`
processes over as many GPUs as decided, with random weights of the shape `--engine-shape`, those under `--engine-weights`, or
whatever `--engine-command` starts.

Exit status: 0; 1 when a command from a pipe failed or was refused; 2 for bad input, one line on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.maveriq.controller.core import Core, Deployment
from systems.maveriq.controller.driver import Controller
from systems.maveriq.controller.engines import REQUEST_S, check_argv
from systems.maveriq.controller.launch import Launch, Launcher, serving
from systems.maveriq.controller.library import Library
from systems.maveriq.controller.memory import Budgets, Memory, Nvml
from systems.maveriq.controller.profiling import PROFILER, Profiler
from systems.maveriq.controller.queues import QUEUES

UNUSABLE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The program; its exit status."""
    try:
        args = _arguments().parse_args(argv)
        library = Library.read(args.fingerprints, args.mode, args.models)
        core = Core(library.search(), QUEUES[args.queue]())
        profiler = Profiler(args.profiles, (*PROFILER, *shlex.split(args.profile_options)))
        controller = Controller(core, _memory(args), _engine(args), library, args.timeout_s, profiler)
        return asyncio.run(_run(controller, args))
    except InputError as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return 130


async def _run(controller: Controller, args: argparse.Namespace) -> int:
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    if args.http is None:
        return await _shell(controller, ending)
    from systems.maveriq.controller.http import listen

    with listen(args.host, args.http) as listening:
        async with controller:
            return await _serve(controller, listening, ending)


async def _shell(controller: Controller, ending: asyncio.Event) -> int:
    from systems.maveriq.controller.shell import converse

    async with controller:
        talk, stop = asyncio.create_task(converse(controller)), asyncio.create_task(ending.wait())
        await asyncio.wait((talk, stop), return_when=asyncio.FIRST_COMPLETED)
        if talk.done():
            stop.cancel()
            return 0 if talk.result() else 1
    os._exit(130)  # the thread that reads the terminal can't be interrupted; every engine has ended


async def _serve(controller: Controller, listening: socket.socket, ending: asyncio.Event) -> int:
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise InputError("controller", "http", error.name, "not installed: run `make torch`") from error
    from systems.maveriq.controller.http import App

    config = uvicorn.Config(
        App(controller), lifespan="off", ws="none", log_level="warning", access_log=False, server_header=False
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not task.done():
        await asyncio.sleep(0.005)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn has put its own in place
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    host, port = listening.getsockname()[:2]
    print(json.dumps({"host": host, "port": port, "pid": os.getpid()}), flush=True)
    await ending.wait()
    await controller.close()
    server.should_exit = True
    await task
    return 0


def _memory(args: argparse.Namespace) -> Memory:
    if args.gpu_total_gib is None:
        return Nvml()
    if not (args.gpu_total_gib > 0 and 0 <= args.gpu_used_gib <= args.gpu_total_gib and 1 <= args.gpus <= 1024):
        value = f"{args.gpus} x {args.gpu_total_gib:g} GiB, {args.gpu_used_gib:g} used"
        raise InputError("controller", "gpus", value, "use 1 to 1024 GPUs that use between 0 and all of their memory")
    devices = tuple(args.devices[gpu % len(args.devices)] for gpu in range(args.gpus)) if args.devices else ()
    return Budgets((args.gpu_total_gib,) * args.gpus, (args.gpu_used_gib,) * args.gpus, devices)


def _engine(args: argparse.Namespace) -> Launcher:
    if args.engine_command is None:
        return serving(args.engine_shape, shlex.split(args.engine_options), args.engine_weights, args.one_rank)
    command = check_argv(shlex.split(args.engine_command))

    def launch(deployment: Deployment, devices: Sequence[int]) -> Launch:
        return Launch((*command, deployment.decision.wish.model), tuple(dict.fromkeys(devices)))

    return launch


class _OneLine(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, as every other error here."""

    def error(self, message: str) -> Any:  # noqa: ANN401
        raise InputError("command line", "options", message, "see --help")


def _arguments() -> argparse.ArgumentParser:
    parser = _OneLine(prog="python -m systems.maveriq.controller", description="Deploy and serve models by intent.")
    add = parser.add_argument
    add("--fingerprints", type=Path, required=True, help="CSV file of fingerprints")
    add("--models", type=Path, help="YAML file with further models")
    add("--mode", choices=("paper", "improved"), default="paper", help="the estimator (default: paper)")
    add("--queue", choices=tuple(QUEUES), default="global", help="one queue for all (the paper's) or one per model")
    add("--gpus", type=int, default=8, help="how many virtual GPUs (default: 8)")
    add("--gpu-total-gib", type=float, help="memory of a virtual GPU; without it GPUs are real")
    add("--gpu-used-gib", type=float, default=0.0, help="what a virtual GPU holds at start (default: 0)")
    add(
        "--devices",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[],
        help="real devices behind virtual GPUs",
    )
    add("--engine-shape", default="tiny", help="shape that engines run; `model` for the deployment's own (default: tiny)")
    add("--engine-weights", type=Path, help="folder with a folder of safetensors for each model, instead of random weights")
    add("--one-rank", action="store_true", help="run every engine in one process, whatever layout was decided")
    add("--engine-options", default="", help="further options of `python -m systems.common.serve`, quoted as one")
    add("--engine-command", help="another command for engines; the model's name is put behind it")
    add("--profiles", type=Path, default=Path("maveriq_profiles"), help="folder for what `register` measures (%(default)s)")
    add("--profile-options", default="", help="options of `python -m systems.maveriq.profile` for `register`, quoted as one")
    add("--timeout-s", type=float, default=REQUEST_S, help=f"limit of a request (default: {REQUEST_S:g})")
    add("--http", type=int, metavar="PORT", help="serve HTTP instead of reading commands; 0: a free port, printed")
    add("--host", default="127.0.0.1", help="address for --http")
    return parser


if __name__ == "__main__":
    sys.exit(main())
