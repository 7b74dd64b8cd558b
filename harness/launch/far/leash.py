"""Runs one command for a controller that may vanish at any moment, and ends it with everything below it when that happens.

The controller holds the other end of stdin and stdout and speaks in frames (`wire`):

    -> plan    where to work; which ports to find, which slot to take, which files to list
    <- here    the ports, the slot, the checksums of the files that are there
    -> want    send me this file               -> drop   remove this file
    -> file    a file to put there             -> run    the command
    <- started, ready, late, out, err, file, beat, exit
    -> beat    I am here                       -> end    end the command
    -> clean   remove the folder               (end of stdin: I am gone)

Nothing secret is on a command line: argv and environment come in the frame `run`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from harness.launch.far import family, files, probes, wire

_TICK_S = 0.1
_BEAT_S = 1.0
_DRAIN_S = 1.0
_HANDSHAKE_S = 60.0
_ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Gone(Exception):  # noqa: N818
    """The controller is gone, or this process is to end."""


class Leash:
    """One command on its leash: `stdin` and `stdout` lead to the controller."""

    def __init__(self, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self._in, self._out = stdin, stdout
        self._folder = Path()
        self._plan: wire.Frame = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._held: list[Any] = []
        self._said: queue.SimpleQueue[wire.Frame | None] = queue.SimpleQueue()
        self._heard = time.monotonic()
        self._over, self._ready = threading.Event(), threading.Event()
        self._streams = selectors.DefaultSelector()
        self._log: probes.LogLine | None = None

    def serve(self) -> int:
        """Do what the controller says until it is done or gone."""
        for number in _ENDINGS:
            signal.signal(number, _leave)
        try:
            run = self._prepare()
            if run is not None:
                self._run(run)
        except (Gone, wire.Broken, BrokenPipeError, ConnectionError):
            return 1
        finally:
            for number in _ENDINGS:
                signal.signal(number, signal.SIG_IGN)
            self._over.set()
            if self._child is not None:
                family.end(self._child, self._plan["grace_s"])
        return 0

    def _send(self, kind: str, data: bytes = b"", **more: Any) -> None:  # noqa: ANN401
        self._write(wire.encode(kind, data, **more))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._out.write(view) :]

    # -- before the command --------------------------------------------------------------------------------------------

    def _prepare(self) -> wire.Frame | None:
        """Answer until the command comes; None when none comes."""
        signal.signal(signal.SIGALRM, _leave)
        while True:
            signal.setitimer(signal.ITIMER_REAL, _HANDSHAKE_S)
            frame = wire.read_frame(self._in)
            if frame is None or frame["k"] == "run":
                signal.setitimer(signal.ITIMER_REAL, 0)
                return frame
            try:
                self._answer(frame)
            except OSError as error:
                if isinstance(error, ConnectionError):
                    raise
                self._send("failed", message=f"{error.filename or self._folder}: {error.strerror or error}")
                return None

    def _answer(self, frame: wire.Frame) -> None:
        if frame["k"] == "plan":
            self._begin(frame)
        elif frame["k"] == "file":
            files.receive(self._folder, self._in, frame)
        elif frame["k"] == "want":
            files.send(self._folder, frame["path"], self._write)
        elif frame["k"] == "drop":
            files.inside(self._folder, frame["path"]).unlink(missing_ok=True)
        elif frame["k"] == "clean":
            self._clean()

    def _begin(self, plan: wire.Frame) -> None:
        self._plan = plan
        self._folder = Path(plan["folder"]).expanduser()
        missing = [path for path in plan["required"] if not Path(path).expanduser().exists()]
        slot = None if missing else self._take_slot(plan["slots"])
        if not missing and slot is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        found = {**dict.fromkeys(files.listed(self._folder, plan["names"]), ""), **files.checksums(self._folder, plan["list"])}
        self._send(
            "here",
            host=socket.gethostname(),
            folder=str(self._folder),
            ports=self._find_ports(plan["ports"]),
            slot=slot,
            missing=missing,
            found=found,
        )

    def _clean(self) -> None:
        """Remove what the plan says, and, with its whole folder, the one above if nothing is left in it."""
        target = self._folder / self._plan["clean"]
        shutil.rmtree(target, ignore_errors=True)
        if target == self._folder:
            with contextlib.suppress(OSError):
                target.parent.rmdir()

    def _take_slot(self, slots: Mapping[str, Any] | None) -> int | None:
        """A slot of this host that nobody else has, held while this process lives; -1 where none is asked for."""
        if not slots:
            return -1
        folder = Path(slots["folder"]).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(slots["count"]):
            file = (folder / f"slot{number}").open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            self._held.append(file)
            return number
        return None

    def _find_ports(self, names: list[str]) -> dict[str, int]:
        """A free port for each name, kept bound until the command starts."""
        ports = {}
        for name in names:
            bound = socket.create_server(("0.0.0.0", 0), reuse_port=False)
            self._held.append(bound)
            ports[name] = bound.getsockname()[1]
        return ports

    def _release_ports(self) -> None:
        for held in self._held:
            if isinstance(held, socket.socket):
                held.close()

    # -- the command ---------------------------------------------------------------------------------------------------

    def _run(self, run: wire.Frame) -> None:
        self._release_ports()
        cwd = self._folder / run["cwd"]
        try:
            cwd.mkdir(parents=True, exist_ok=True)
            self._child = family.start(run["argv"], {**os.environ, **run["env"]}, str(cwd))
        except OSError as error:
            self._send("failed", message=f"{run['argv'][0]}: {error.strerror or error}")
            return
        self._heard = time.monotonic()
        threading.Thread(target=self._listen, daemon=True, name="listen").start()
        threading.Thread(target=self._guard, daemon=True, name="guard").start()
        self._send("started", pid=self._child.pid)
        collector = files.Collector(self._folder, run["collect"])
        collector.know()
        self._attend(run, collector)
        self._over.set()
        family.end(self._child, self._plan["grace_s"])
        while not self._pass_on():  # its last words
            pass
        collector.send_new(self._write)
        self._send("exit", code=self._child.returncode, free=self._free_bytes())
        while (frame := self._said.get()) is not None:  # until the controller hangs up
            if frame["k"] == "clean":
                self._clean()
                self._send("cleaned")

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._folder)
        return disk.f_bavail * disk.f_frsize

    def _listen(self) -> None:
        """What the controller says while the command runs; None when it is gone."""
        try:
            while (frame := wire.read_frame(self._in)) is not None:
                self._heard = time.monotonic()
                if frame["k"] != "beat":
                    self._said.put(frame)
        except (OSError, ValueError, wire.Broken):
            pass
        self._said.put(None)

    def _guard(self) -> None:
        """Kills everything when the controller has been silent for too long, even while this process is stuck in sending."""
        silence_s = self._plan["silence_s"]
        while silence_s:
            time.sleep(_BEAT_S)
            if time.monotonic() - self._heard > silence_s:
                assert self._child is not None
                family.kill(self._child)
                os._exit(1)

    def _attend(self, run: wire.Frame, collector: files.Collector) -> None:
        """Pass on what the command prints and makes until it ends or is to end."""
        assert self._child is not None
        for stream, kind in ((self._child.stdout, "out"), (self._child.stderr, "err")):
            assert stream is not None
            self._streams.register(stream, selectors.EVENT_READ, kind)
        self._start_probe(run["probe"])
        beat = collected = time.monotonic()
        ended: float | None = None
        late = time.monotonic() + run["probe"]["limit_s"] if run["probe"] else None
        while self._streams.get_map() or self._child.poll() is None:
            quiet = self._pass_on()
            now = time.monotonic()
            if not self._heed():
                return
            late = self._judge(late, now)
            if now - beat >= _BEAT_S:
                self._send("beat")
                beat = now
            if run["collect"] and now - collected >= run["collect_s"]:
                collector.send_new(self._write)
                collected = now
            if self._child.poll() is not None:
                ended = ended or now
                if quiet or now - ended > _DRAIN_S:  # descendants that hold the pipes are ended, not waited for
                    return

    def _start_probe(self, probe: Mapping[str, Any] | None) -> None:
        if probe and probe["kind"] == "log":
            self._log = probes.LogLine(probe["pattern"])
        elif probe:
            probes.watch(probe, self._folder, self._over, self._ready.set)

    def _pass_on(self) -> bool:
        """Send what the command has printed; whether it had printed nothing."""
        events = self._streams.select(_TICK_S) if self._streams.get_map() else []
        if not self._streams.get_map() and not self._over.is_set():
            time.sleep(_TICK_S)  # it has closed its output and runs on
        for key, _ in events:
            data = os.read(key.fd, 65536)
            if not data:
                self._streams.unregister(key.fileobj)
                continue
            self._send(key.data, data)
            if self._log and self._log.feed(data):
                self._ready.set()
        return not events

    def _heed(self) -> bool:
        """Whether the command may run on, after all that was said meanwhile. Raises Gone when the controller is."""
        with contextlib.suppress(queue.Empty):
            while True:
                frame = self._said.get_nowait()
                if frame is None:
                    raise Gone
                if frame["k"] == "end":
                    return False
        return True

    def _judge(self, late: float | None, now: float) -> float | None:
        """Say whether the command is ready, or late; gives the time by which it must be ready, None once that is settled."""
        if late is None or not (self._ready.is_set() or now > late):
            return late
        self._send("ready" if self._ready.is_set() else "late")
        return None


def _leave(*_: object) -> NoReturn:
    raise Gone


def main() -> NoReturn:
    """Serve whoever is at the other end of stdin and stdout."""
    stdin, stdout = open(0, "rb", closefd=False), open(1, "wb", 0, closefd=False)  # noqa: SIM115
    status = Leash(stdin, stdout).serve()
    sys.stderr.flush()
    os._exit(status)  # threads that wait on the controller must not keep it


if __name__ == "__main__":
    main()
