"""Runs one command in a container, from its creation to its removal, on every exit path.

    harness.containers.run("fivefold/engine-cpu:1a2b", ["python", "-m", "harness.series", ...],
                           [Mount(checkout), Mount(results, writable=True)], {"OMP_NUM_THREADS": "8"}, Limits(cpus=8))

The container has no network, no capability, a read-only root and only the mounts that it was given; it runs as the
caller, so that what it writes is the caller's. It ends when its command does, and within ten seconds of the controller's
own end, however that comes about (`harness.containers.leash`).
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TextIO

from harness.containers import owner
from harness.containers.engine import Engine, connect, talking
from harness.containers.specification import BEAT_S, GRACE_S, Limits, Mount, Network, Run, check, create_arguments, shown
from systems.registry import InputError

_STDERR = 2
IMAGE_VARIABLE = "FIVEFOLD_IMAGE"
"""Tells what runs in a container which image that is, for its provenance."""


class Sink(Protocol):
    """Takes what a command says: an open binary file, for example."""

    def write(self, data: bytes, /) -> object:
        """Take `data`."""

    def flush(self) -> object:
        """Pass on what was taken."""


class _Text:
    """A Sink in front of a stream of text; a character may come in two pieces."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: bytes, /) -> object:
        return self._stream.write(self._decoder.decode(data))

    def flush(self) -> object:
        return self._stream.flush()


def run(
    image: str,
    argv: Sequence[str],
    mounts: Sequence[Mount] = (),
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    *,
    engine: str | None = None,
    folder: str | None = None,
    network: Network = "none",
    stdout: Sink | None = None,
    stderr: Sink | None = None,
) -> int:
    """Run `argv` in a container of `image`; its exit status, 128 + number where a signal ended it.

    Args:
        image: what the engine knows it as.
        argv: the command; no shell sees it.
        mounts: what it sees of the engine's machine.
        env: variables for it; they travel through the engine's API, never in a command line.
        limits: what it may use.
        engine: which engine, as `connect` takes it.
        folder: the folder in which it runs.
        network: `none`, unless it has to talk to others.
        stdout: gets what it says there, as it says it; this process's own by default.
        stderr: likewise.

    Raises:
        InputError: no engine, no such image, a mount that isn't there, no such GPU, out of memory, out of time, or the
            engine stopped. Nothing is left running.
    """
    wanted = Run(image, tuple(argv), tuple(mounts), dict(env or {}), limits or Limits(), network, folder)
    check(wanted)
    with connect(engine) as found:
        return run_on(found, wanted, stdout or _Text(sys.stdout), stderr or _Text(sys.stderr))


def run_on(engine: Engine, wanted: Run, stdout: Sink, stderr: Sink) -> int:
    """As `run`, on an engine that we are connected to; user and labels of `wanted` are set here."""
    with talking(engine.url, "left-over containers"):
        owner.reap(engine)
    user = "0:0" if engine.rootless else engine.caller
    name = {IMAGE_VARIABLE: digest(engine, wanted.image)}
    labels = {owner.CONTROLLER: owner.this_process()}
    wanted = replace(wanted, user=user, labels=labels, variables={**name, **(wanted.variables or {})})
    with _container(engine, wanted) as container, _attached(engine, container) as stream:
        _start(engine, wanted, container)
        with _kept_alive(engine, container, stream, wanted.limits.wall_s) as late:
            for kind, data in _said(engine, stream):
                out = stderr if kind == _STDERR else stdout
                out.write(data)
                out.flush()
        status = _status(engine, wanted, container)
        if late.is_set():
            mend = "it was ended: give it more time, or less to do"
            raise InputError(f"container {wanted.image}", "wall_s", wanted.limits.wall_s, mend)
        return status


def digest(engine: Engine, image: str) -> str:
    """What `image` is, for provenance: `name@sha256:...` of its registry, else the engine's own identity of it.

    Raises:
        InputError: the engine has no such image.
    """
    told = inspect(engine, image)
    if told is None:
        raise InputError(engine.url, "image", image, "not there: run `snakemake containers`, or pull it (docs/containers.md)")
    digests: list[str] = told.get("RepoDigests") or []
    return digests[0] if digests else f"{image.partition('@')[0]}@{told['Id']}"


def inspect(engine: Engine, image: str) -> dict[str, Any] | None:
    """What the engine says of `image`; None when it has no such image."""
    with talking(engine.url, "image"):
        found = engine.api.images(filters={"reference": image}) if "@" not in image else None
        if found == []:
            return None
        try:
            told: dict[str, Any] = engine.api.inspect_image(image)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 404:
                return None
            raise
    return told


@contextlib.contextmanager
def _container(engine: Engine, wanted: Run) -> Iterator[str]:
    with talking(engine.url, "container"):
        container: str = engine.api.create_container(**create_arguments(engine.api, wanted))["Id"]
    try:
        yield container
    except BaseException:  # an interrupt too: what runs in it may put its things away
        with contextlib.suppress(Exception):
            engine.api.stop(container, timeout=GRACE_S)
        raise
    finally:
        with contextlib.suppress(Exception):  # an engine that is gone: the leash ends it, and a later run removes it
            engine.api.remove_container(container, force=True, v=True)


@contextlib.contextmanager
def _attached(engine: Engine, container: str) -> Iterator[Any]:
    """The one connection that carries our signs of life in and the command's output out."""
    ways = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
    with talking(engine.url, "attach"):
        stream = engine.api.attach_socket(container, params=ways)
    _socket_of(stream).settimeout(None)
    try:
        yield stream
    finally:
        stream.close()


def _socket_of(stream: Any) -> socket.socket:  # noqa: ANN401
    """The SDK gives a read-only file around the socket of a hijacked connection."""
    found: socket.socket = getattr(stream, "_sock", stream)
    return found


def _start(engine: Engine, wanted: Run, container: str) -> None:
    try:
        with talking(engine.url, "start"):
            engine.api.start(container)
    except InputError as error:
        raise _start_error(error, wanted) from error


def _start_error(error: InputError, wanted: Run) -> InputError:
    where, said = f"container {wanted.image}", str(error.value)
    if "python3" in said and "not found" in said:
        return InputError(where, "image", wanted.image, "has no python3, which every image of ours needs: use another one")
    if "device driver" in said or "nvidia" in said.lower():
        return InputError(where, "gpus", said, "install nvidia-container-toolkit on that machine, or ask for no GPUs")
    return error


@contextlib.contextmanager
def _kept_alive(engine: Engine, container: str, stream: Any, wall_s: float | None) -> Iterator[threading.Event]:  # noqa: ANN401
    """Tell the container every two seconds that we are there, and end it when its time is up; then the event is set."""
    done, late = threading.Event(), threading.Event()
    end = time.monotonic() + wall_s if wall_s else float("inf")

    def beat() -> None:
        line = _socket_of(stream)
        while not done.wait(max(0.0, min(BEAT_S, end - time.monotonic()))):
            if time.monotonic() >= end:
                late.set()
                with contextlib.suppress(Exception):
                    engine.api.stop(container, timeout=GRACE_S)
                return
            with contextlib.suppress(OSError):
                line.sendall(b"\n")

    thread = threading.Thread(target=beat, daemon=True, name="container heartbeat")
    thread.start()
    try:
        yield late
    finally:
        done.set()
        thread.join()


def _said(engine: Engine, stream: Any) -> Iterator[tuple[int, bytes]]:  # noqa: ANN401
    """What the command says until it ends, in pieces, each with the stream that it came from."""
    frames = importlib.import_module("docker.utils.socket").frames_iter(stream, tty=False)
    while True:
        with talking(engine.url, "output"):
            frame = next(frames, None)
        if frame is None:
            return
        yield frame


def _status(engine: Engine, wanted: Run, container: str) -> int:
    """Its exit status once it has ended. Raises InputError when it, or a process in it, was out of memory."""
    with talking(engine.url, f"container {wanted.image}"):
        status = int(engine.api.wait(container, timeout=None)["StatusCode"])
        state = engine.api.inspect_container(container)["State"]
    if state.get("OOMKilled"):
        limit = f"limit of {shown(wanted.limits.memory_bytes)}" if wanted.limits.memory_bytes else "the machine's memory"
        mend = "out of memory, so the kernel ended a process in it: raise the limit (--memory), or give it less to do"
        raise InputError(f"container {wanted.image}", "memory", limit, mend)
    return status
