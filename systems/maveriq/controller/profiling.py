"""`register MODEL` without a file: runs the profiler, as the artifact's does, and gives back the file that it wrote.

The profiler is a process group of its own; it ends with the controller, with whoever waits for it, and with the kernel's help
when the controller is killed. Its own workers end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from systems.common.errors import InputError
from systems.maveriq.controller.engines import end_with_parent

PROFILER = (sys.executable, "-m", "systems.maveriq.profile")


@dataclass
class Profiler:
    """What runs the profiler: `command`, with `--model MODEL --out FOLDER/MODEL.csv` behind it."""

    folder: Path
    command: Sequence[str] = PROFILER
    _running: set[asyncio.subprocess.Process] = field(default_factory=set)

    async def run(self, model: str) -> Path:
        """Measure the fingerprints of `model`; the file that holds them.

        Raises InputError with the profiler's last line where it fails, wholly or at some points.
        """
        file = self.folder / f"{model}.csv"
        if Path(model).name != model:
            raise InputError("controller", "register", model, "is no name of a model")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            process = await asyncio.create_subprocess_exec(
                *self.command, "--model", model, "--out", str(file), stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip
        except OSError as error:
            raise InputError("controller", "register", model, f"the profiler can't be started: {error}") from error
        self._running.add(process)
        try:
            _, said = await process.communicate()
        finally:
            await _ended(process)
            self._running.discard(process)
        if process.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            mend = f"the profiler ended with {process.returncode}: {lines[-1] if lines else 'no word'}"
            if process.returncode == 1 and file.is_file():
                mend += f"; `register {model} {file}` takes what it has measured"
            raise InputError("controller", "register", model, mend)
        return file

    async def close(self) -> None:
        """End what runs; returns when it has ended."""
        await asyncio.gather(*(_ended(process) for process in list(self._running)))


async def _ended(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
