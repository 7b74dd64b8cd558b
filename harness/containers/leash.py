"""What runs as process 1 in every container of ours: it ends all of it when the controller is gone.

    python3 -I -c <this file> SILENCE_S -- argv...      started by harness.containers.runner, never by hand

The controller holds the container's standard input and writes to it every two seconds. When it ends, however it ends, the
input ends; when its machine or the link to it is gone, the input falls silent. In both cases the command is killed, and
with process 1 the kernel ends everything else in the container. Runs in any image with Python 3.8, hence no imports of ours.
"""

import contextlib
import os
import select
import signal
import sys
import time
from typing import List, Optional  # noqa: UP035 (Python 3.8)

LOST = 125
"""The exit status when the controller is gone: nobody is left to see it but `docker ps -a`."""
NOT_FOUND = 127
NOT_EXECUTABLE = 126
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(silence_s: float, argv: List[str]) -> int:  # noqa: UP006
    """Run `argv` until it ends or the controller does; its exit status, 128 + number where a signal ended it."""
    wake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # one that comes before there is a handler waits for it
    child = _start(argv)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # it only has to wake the loop below
    for number in PASSED_ON:
        signal.signal(number, lambda number, _frame: _send(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    heard = time.monotonic()
    while True:
        status = _reap(child)
        if status is not None:
            return status
        left = heard + silence_s - time.monotonic()
        ready, _, _ = select.select([0, wake], [], [], max(left, 0))
        if wake in ready:
            os.read(wake, 4096)
        beat = b"." if 0 not in ready else os.read(0, 4096)
        if not beat or (not ready and left <= 0):
            _send(child, signal.SIGKILL)
            return LOST
        heard = time.monotonic() if 0 in ready else heard


def _start(argv: List[str]) -> int:  # noqa: UP006
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what is ignored is inherited
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)


def _send(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
        os.killpg(child, number)


def _reap(child: int) -> Optional[int]:  # noqa: UP045
    """Take in every process that has ended (orphans come to process 1); the exit status of `child` if it was among them."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
            if not pid:
                break
    return None


if __name__ == "__main__":
    os._exit(main(float(sys.argv[1]), sys.argv[3:]))  # the interpreter's own end would only take time
