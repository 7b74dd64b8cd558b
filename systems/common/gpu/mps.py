"""An MPS daemon of our own: private pipe and log folders, ended on every exit path, a killed owner included.

NVIDIA's daemon detaches itself (`nvidia-cuda-mps-control -d`), so somebody has to outlive us to end it: a guard, a small
process of ours (`python -m systems.common.gpu.mps`) that starts the daemon, waits until its standard input closes (we
are done, or dead), says `quit` through the daemon's pipe, and kills what is still there.

    with MpsDaemon() as daemon:
        Popen(serving, env={**os.environ, **daemon.environment()})
        Popen(tuning, env={**os.environ, **daemon.environment(thread_percentage=40)})
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from systems.common.errors import InputError

BINARY = "nvidia-cuda-mps-control"
# where NVIDIA's tools look when nothing else is said
DEFAULT_PIPES = Path("/tmp/nvidia-mps")
PID_FILE = "nvidia-cuda-mps-control.pid"
PIPES, LOG, THREADS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
START_S, QUIT_S, WATCH_S = 30.0, 10.0, 0.2


class MpsDaemon:
    """See the module. `pid` is the daemon's."""

    def __init__(self, binary: str = BINARY) -> None:
        """Start the daemon.

        Raises:
            InputError: no such program, another daemon runs already, or it does not start.
        """
        if shutil.which(binary) is None:
            raise InputError("MPS", "program", binary, "not found: install NVIDIA's driver utilities on this host")
        if (other := running(Path(os.environ.get(PIPES, DEFAULT_PIPES)))) is not None:
            mend = f"a daemon that is not ours is running: end it first (`echo quit | {BINARY}`)"
            raise InputError("MPS", "pid", other, mend)
        self.folder = Path(tempfile.mkdtemp(prefix="mps-"))  # short: a socket's path has room for about 100 bytes
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "systems.common.gpu.mps", str(self.folder), binary],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd=Path(__file__).resolve().parents[3],
        )
        told = self._told(START_S)
        if "pid" not in told:
            self.close()
            raise InputError("MPS", "daemon", told.get("failed", "no answer"), "see nvidia-smi for what holds the GPU")
        self.pid = int(told["pid"])

    def environment(self, thread_percentage: float | None = None) -> dict[str, str]:
        """Variables that make a process a client, with at most this percentage of the GPU's threads."""
        limit = {} if thread_percentage is None else {THREADS: f"{thread_percentage:g}"}
        return {**_folders(self.folder), **limit}

    def check(self) -> None:
        """Raises InputError when the daemon has died."""
        if self._guard.poll() is not None or not alive(self.pid):
            raise InputError("MPS", "daemon", self.pid, "died during the run: its log and `dmesg` say why; run again")

    def close(self) -> None:
        """End the daemon; when this returns it is gone."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        try:
            self._guard.wait(3 * QUIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
            if (pid := running(self.folder / "pipe")) is not None:
                os.kill(pid, signal.SIGKILL)
        if self._guard.stdout is not None:
            self._guard.stdout.close()

    def __enter__(self) -> MpsDaemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _told(self, timeout_s: float) -> dict[str, str]:
        """The guard's first line."""
        out = self._guard.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], timeout_s)
        line = out.readline() if ready else b""
        return dict(json.loads(line)) if line else {}


def running(pipes: Path) -> int | None:
    """Process id of the daemon that uses the folder `pipes`, if one runs there."""
    try:
        pid = int((pipes / PID_FILE).read_text())
    except (OSError, ValueError):
        return None
    return pid if alive(pid) else None


def alive(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _folders(folder: Path) -> dict[str, str]:
    return {PIPES: str(folder / "pipe"), LOG: str(folder / "log")}


def _guard(folder: Path, binary: str) -> int:
    """Start the daemon, wait for the end of standard input, end the daemon."""
    environment = {**os.environ, **_folders(folder)}
    environment.pop(THREADS, None)
    for path in _folders(folder).values():
        Path(path).mkdir(parents=True, exist_ok=True)
    pid = None
    try:
        # not captured through pipes: the daemon would inherit them, and their end would never be seen
        with (folder / "start.log").open("w+b") as log:
            started = subprocess.run(
                [binary, "-d"], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=START_S, check=False
            )
            log.seek(0)
            said = log.read().decode(errors="replace").strip()
        pid = _wait_for_pid(folder / "pipe") if started.returncode == 0 else None
        print(json.dumps({"pid": pid} if pid else {"failed": said or f"exit code {started.returncode}"}), flush=True)
        while pid is not None and alive(pid):
            ready, _, _ = select.select([sys.stdin], [], [], WATCH_S)
            if ready and not sys.stdin.readline():
                break
    finally:
        if pid is not None:
            _quit(binary, environment, pid)
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _wait_for_pid(pipes: Path) -> int | None:
    until_s = time.monotonic() + START_S / 3
    while (pid := running(pipes)) is None and time.monotonic() < until_s:
        time.sleep(0.02)
    return pid


def _quit(binary: str, environment: dict[str, str], pid: int) -> None:
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([binary], env=environment, input=b"quit -t 2\n", capture_output=True, timeout=QUIT_S, check=False)
    until_s = time.monotonic() + QUIT_S / 5
    while alive(pid) and time.monotonic() < until_s:
        time.sleep(0.02)
    if alive(pid):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through `finally`
    raise SystemExit(_guard(Path(sys.argv[1]), sys.argv[2]))
