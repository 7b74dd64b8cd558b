"""Starts the server and tells the rules of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.warm.__main__ import SOCKET

COLD = "FIVEFOLD_COLD"
PREFIX, DISPATCH = "FIVEFOLD_HERE", "FIVEFOLD_DISPATCH"
"""What rules put before their commands: those that run on this machine, and those that a host may run instead."""
CLIENT = "python -m harness.warm"


def keep(workflow: Any, backend: str) -> None:  # noqa: ANN401
    """Make `workflow`, Snakemake's, have a server while it executes jobs on this machine.

    Called from the Snakefile, for the same reason as `runlock.guard`: only when it executes it is known what and how.
    """
    os.environ[PREFIX] = ""
    execute = workflow.execute

    def executing(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        plugin = kwargs.get("executor_plugin") or next(iter(args), None)
        dry = bool(plugin and plugin.common_settings.dryrun_exec)
        elsewhere = bool(workflow.deployment_settings.deployment_method)  # conda: another Python than this
        if dry or elsewhere or not workflow.is_main_process or not possible(backend, os.environ):
            return execute(*args, **kwargs)
        with server():
            return execute(*args, **kwargs)

    workflow.execute = executing


def possible(backend: str, environment: Mapping[str, str]) -> bool:
    """Whether jobs of this backend can be forked here. A GPU's driver does not survive a fork, and such jobs are long."""
    return backend != "measured" and sys.platform == "linux" and not environment.get(COLD)


@contextlib.contextmanager
def server() -> Iterator[None]:
    """A server, and the variables by which rules find it, while the block runs."""
    before = {name: os.environ.get(name, "") for name in (SOCKET, PREFIX, DISPATCH)}
    folder = Path(tempfile.mkdtemp(prefix="fivefold-warm-"))  # ours alone, and short enough for the name of a socket
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)  # the server does, unless it was killed
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        try:
            listening.bind(str(folder / "s"))
        except OSError:  # no such sockets here, or a name that is too long: without, then
            yield
            return
        listening.listen(128)
        command = [sys.executable, "-m", "harness.warm.server", str(listening.fileno())]
        alone = {"OPENBLAS_NUM_THREADS": "1"}  # whoever forks should have one thread
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listening.fileno()], env={**os.environ, **alone})
        stack.enter_context(process)  # closes its stdin, upon which it ends, and waits for it
        listening.close()
        os.environ.update({SOCKET: str(folder / "s"), PREFIX: CLIENT, DISPATCH: before[DISPATCH] or CLIENT})
        stack.callback(os.environ.update, before)
        yield
