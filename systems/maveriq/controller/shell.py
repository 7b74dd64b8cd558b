"""The controller on a terminal: commands with help, history and completion, or the same commands from a pipe.

Answers are printed when they come; `wait` waits for all of them, and so does the end of a pipe. Ctrl+C, Ctrl+D or `exit` ends.
"""

from __future__ import annotations

import asyncio
import cmd
import contextlib
import os
import sys
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import IO, Any, TypeVar

from systems.common.errors import InputError
from systems.maveriq.controller.commands import ABOUT, USAGE, Deploy, Inference, Register, Remove, parse
from systems.maveriq.controller.driver import Answer, Controller
from systems.maveriq.intents import INTENTS
from systems.maveriq.search import Refusal
from systems.maveriq.strategies import STRATEGIES

T = TypeVar("T")
HISTORY = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fivefold" / "maveriq_history"


class Shell(cmd.Cmd):
    """Reads commands in its own thread; the controller lives in `loop`."""

    prompt = "maveriq> "

    def __init__(self, controller: Controller, loop: asyncio.AbstractEventLoop, stdin: IO[str], stdout: IO[str]) -> None:
        super().__init__(stdin=stdin, stdout=stdout)
        self._controller, self._loop = controller, loop
        self._open = set[Future[Answer]]()
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self.failed = False
        self.use_rawinput = stdin.isatty()
        if not self.use_rawinput:
            self.prompt = ""

    def do_help(self, arg: str) -> None:
        """Help [COMMAND]: what there is."""
        known = {**USAGE, **ABOUT}
        if arg and arg not in known:
            self._say(str(InputError("controller", "help", arg, f"use one of {', '.join(known)}")))
            return
        for text in [known[arg]] if arg else known.values():
            self._say(text)

    def default(self, line: str) -> None:
        """Everything that is no other command: the words of `commands`."""
        if line == "EOF":
            return
        try:
            self._carry_out(line)
        except InputError as error:
            self.failed = True
            self._say(str(error))

    def onecmd(self, line: str) -> bool:
        """Run one line; True ends the loop."""
        words = line.split()
        if not words:
            return False
        if words[0] in ("exit", "EOF"):
            return True
        self._lines.append(line)
        if words[0] in ("help", "?"):
            self.do_help(" ".join(words[1:]))
        elif words == ["status"]:
            self.do_status("")
        elif words == ["wait"]:
            self.do_wait("")
        elif words == ["history"]:
            self.do_history("")
        else:
            self.default(line)
        return False

    def do_status(self, _arg: str) -> None:
        """status: every deployment in a line."""
        for one in self._ask(self._status()):
            c = one["configuration"]
            kv = ", int8 KV" if c["int8_kv"] else ""
            layout = f"TP {c['tp']} PP {c['pp']} {c['dtype']}{kv}, layers {one['pp_map']}, GPUs {one['gpus']}"
            line = f"{one['id']}: {one['model']} {one['state']}, {layout}, {one['waiting']} waiting"
            self._say("; ".join([line, *one["differs"]]))

    async def _status(self) -> list[dict[str, Any]]:
        return self._controller.status()

    def do_wait(self, _arg: str) -> None:
        """wait: until every request has been answered."""
        while pending := list(self._open):
            for future in pending:
                with contextlib.suppress(CancelledError):
                    future.result()
                self._open.discard(future)

    def do_history(self, _arg: str) -> None:
        """history: every command of this session, numbered; those of earlier ones come back with the arrow keys."""
        for number, line in enumerate(self._lines, 1):
            self._say(f"{number:4}  {line}")

    def completenames(self, text: str, *_ignored: Any) -> list[str]:  # noqa: ANN401 - cmd's own signature
        """Commands that begin with `text`."""
        return [name for name in (*USAGE, *ABOUT) if name.startswith(text)]

    def completedefault(self, text: str, *_ignored: Any) -> list[str]:  # noqa: ANN401 - cmd's own signature
        """Commands (`a deploy ...`), deployed names, models, intents and strategies that begin with `text`."""
        words = (*USAGE, *self._controller.core.deployments, *self._controller.core.search.facts, *INTENTS, *STRATEGIES)
        return [word for word in words if word.startswith(text)]

    def emptyline(self) -> bool:
        """Nothing."""
        return False

    def _carry_out(self, line: str) -> None:
        command = parse(line)
        if isinstance(command, Register):
            count = self._ask(self._controller.register(command.model, command.file))
            self._say(f"{command.model}: {count} fingerprints")
        elif isinstance(command, Deploy):
            self._deploy(command)
        elif isinstance(command, Inference):
            self._infer(command)
        elif isinstance(command, Remove):
            lost = self._ask(self._controller.remove(command.name))
            self._say(f"{command.name}: removed, {lost} requests failed" if lost else f"{command.name}: removed")

    def _deploy(self, command: Deploy) -> None:
        found = self._ask(self._controller.deploy(command.name, command.wish))
        if isinstance(found, Refusal):
            self.failed = True
            self._say(f"{command.name}: refused: {found.reason}")
            return
        one, placed = found.decision.configuration, found.decision.placement
        kv = ", int8 KV" if one.int8_kv else ""
        effort = "; nothing meets the SLO: best effort" if found.decision.best_effort else ""
        self._say(
            f"{command.name}: TP {one.tp} PP {one.pp} {one.dtype}{kv}, layers {list(placed.pp_map)}, GPUs {list(placed.gpus)}, "
            f"{placed.total_gib:.2f} GiB{effort}"
        )

    def _infer(self, command: Inference) -> None:
        future = self._ask(self._submit(command))
        self._open.add(future)
        future.add_done_callback(self._answered)

    async def _submit(self, command: Inference) -> Future[Answer]:
        _, future = self._controller.submit(command.name, command.text, command.front)
        outside: Future[Answer] = Future()
        future.add_done_callback(lambda done: outside.set_result(done.result()) if not done.cancelled() else outside.cancel())
        return outside

    def _answered(self, future: Future[Answer]) -> None:
        if future.cancelled():
            return
        answer = future.result()
        self.failed |= bool(answer.error)
        what = f"failed: {answer.error}" if answer.error else repr(answer.text)
        self._say(
            f"{answer.deployment} request {answer.number} ({answer.e2e_s:.3f} s, {answer.service_s:.3f} s of service): {what}"
        )

    def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _say(self, text: str) -> None:
        with self._lock:
            print(text, file=self.stdout, flush=True)


def _edit_lines(file: Path = HISTORY) -> None:
    """Keep the lines of a terminal between sessions, and complete whole names, where Python has readline."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    readline.set_completer_delims(" \t")  # names have hyphens, at which readline would begin a word

    def keep() -> None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)

    atexit.register(keep)


async def converse(controller: Controller, stdin: IO[str] = sys.stdin, stdout: IO[str] = sys.stdout) -> bool:
    """Serve a terminal or a pipe until it ends; whether everything went well."""
    shell = Shell(controller, asyncio.get_running_loop(), stdin, stdout)
    if stdin.isatty():
        _edit_lines()

    def session() -> None:
        shell.cmdloop()
        shell.do_wait("")

    await asyncio.to_thread(session)
    return not shell.failed
