"""The command line that every lab has: up, down, status, env, exec, and its faults by name."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.labs import register
from tests.labs.errors import LabError
from tests.labs.lab import Lab

Options = Callable[[argparse.ArgumentParser], object]
_COMMANDS = {
    "down": "end everything in it, whatever is left of it",
    "status": "what is there, as JSON",
    "env": "the variables under which commands of this machine mean this lab, to be evaluated by a shell",
}


def main(
    kinds: Sequence[type[Lab]],
    argv: Sequence[str] | None,
    faults: Sequence[str] = (),
    options: Options = lambda parser: None,
    *,
    on_machine: bool = True,
) -> int:
    """Do what the command line says. Gives the exit status; errors are one line on stderr.

    Args:
        kinds: the kind of lab, then its variants (which `up` chooses by an option that sets `kind`).
        argv: the arguments, else those of this process.
        faults: methods that become commands (`fill_disk` as `fill-disk`).
        options: adds the options of `up`, named as the constructor's parameters.
        on_machine: whether faults take a machine.
    """
    arguments = vars(_parser(kinds[0], faults, options, on_machine).parse_args(argv))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _do(kinds, arguments.pop("command"), arguments.pop("folder"), arguments)
    except LabError as error:
        print(f"{kinds[0].kind} lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser(lab: type[Lab], faults: Sequence[str], options: Options, on_machine: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m tests.labs.{lab.kind}_lab")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, words: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=words)
        made.add_argument("folder", type=Path, metavar="DIR", help="where the lab's files are")
        return made

    options(command("up", "start it; it stays until `down`"))
    for name, words in _COMMANDS.items():
        command(name, words)
    command("exec", "run a command in it").add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    for name in faults:
        fault = command(name.replace("_", "-"), (getattr(lab, name).__doc__ or "").splitlines()[0])
        if on_machine:
            fault.add_argument("machine", metavar="MACHINE", help="its name, or its place counted from 0")
    return parser


def _do(kinds: Sequence[type[Lab]], command: str, folder: Path, arguments: dict[str, Any]) -> int:
    if command == "up":
        return _up(_variant(kinds, arguments.pop("kind", None)), folder, arguments)
    state = register.read(folder)
    lab = _variant(kinds, state.kind if state else None)
    if command == "down":
        lab.take_down(folder)
        return 0
    here = lab.attach(folder)
    if command == "status":
        print(json.dumps(here.status(), indent=2))
    elif command == "env":
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in here.environment.items()))
    elif command == "exec":
        argv = arguments["argv"]
        _become(here, argv[1:] if argv[:1] == ["--"] else argv)
    else:
        said = getattr(here, command.replace("-", "_"))(*arguments.values())
        if said is not None:
            print(said)
    return 0


def _variant(kinds: Sequence[type[Lab]], kind: str | None) -> type[Lab]:
    return next((lab for lab in kinds if lab.kind == kind), kinds[0])


def _up(lab: type[Lab], folder: Path, settings: dict[str, Any]) -> int:
    began = time.monotonic()
    made = lab(folder, **settings).up()
    print(f"{made.kind} lab up in {time.monotonic() - began:.2f} s: {made.folder}")
    return 0


def _become(lab: Lab, argv: Sequence[str]) -> None:
    """Replace this process by `argv`, run as a client of the lab."""
    if not argv:
        raise LabError("exec: say what to run, after `--`")
    line = lab.command(argv)
    os.execvpe(line[0], line, {**os.environ, **lab.environment})
