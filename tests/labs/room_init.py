"""PID 1 of a room: prepares it, reaps what ends in it, and ends with it.

Started by `rooms.open_room` as `python -I room_init.py PLAN` inside fresh namespaces; imports nothing of ours, because a room
may not see the checkout. PLAN is a JSON object: `lab` (whose room it is), `steps` (argv lists: mounts, host name), `report`
(descriptor to write the room's PID to, as seen from outside, when it is ready) and `leash` (descriptor that reaches its end
when the owner dies, or null).

A room with its own PID namespace goes with its PID 1: the kernel kills everything in it and drops its mounts and links. One
without (a controller, whose clients shall be children of whoever starts them) kills its members itself.
"""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Prepare the room, say so, and stay until the leash or SIGTERM ends it."""
    plan = json.loads(sys.argv[1])
    outside = str(Path("/proc/self").readlink())  # before a step may mount the room's own /proc
    for step in plan["steps"]:
        subprocess.run(step, check=True, stdin=subprocess.DEVNULL)
    wake = _signals()
    os.write(plan["report"], outside.encode())
    os.close(plan["report"])
    _stay(wake, plan["leash"])


def _signals() -> int:
    """A descriptor that becomes readable when a signal came; SIGTERM ends this process, SIGCHLD only wakes it."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: _end())
    return read


def _stay(wake: int, leash: int | None) -> None:
    poll = select.poll()
    for descriptor in (wake, leash):
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
    while True:
        _reap()
        for descriptor, _ in poll.poll():
            if descriptor == leash:
                _end()
            os.read(wake, 4096)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _end() -> None:
    """End this process; where it is no PID 1, whose end the kernel makes the end of all, those that entered its mounts too."""
    mine = Path("/proc/self/ns/mnt").readlink()
    for entry in Path("/proc").iterdir() if os.getpid() != 1 else ():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and (entry / "ns/mnt").readlink() == mine:
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:  # it has just ended
            pass
    os._exit(0)


if __name__ == "__main__":
    main()
