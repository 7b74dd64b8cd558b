"""A socket of this machine that is the Docker Engine's socket of another one, through OpenSSH.

    ssh://[user@]host[:port][/path/of/the/socket]

The host must be known: an unknown or changed host key is refused (`StrictHostKeyChecking=yes`), and no password is ever
asked for. The other end runs `cat` on what it reads from us, so that the connection ends when this process does.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from systems.registry import InputError

SOCKET = "/var/run/docker.sock"
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ExitOnForwardFailure": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "2",
    "ForwardAgent": "no",
}
_GREETING = re.compile(rb"fivefold-ready (\d+:\d+)\n")
_CONNECT_S = 20
SSH_OPTIONS_VARIABLE = "FIVEFOLD_SSH_CONFIG"
"""Names a configuration file for ssh in place of the user's own, for sites (and tests) that keep one per testbed."""


def command(url: str, local: str) -> list[str]:
    """The ssh command that makes `local` the socket that `url` names.

    Raises:
        InputError: `url` is no address of an engine over SSH.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError("engine", "address", url, "write ssh://user@host:port") from error
    names = [name for name in (host, parts.username) if name is not None]
    if not host or parts.password or any(name.startswith("-") or not name.isprintable() or " " in name for name in names):
        raise InputError("engine", "address", url, "write ssh://user@host, and no password: SSH keys only")
    config = os.environ.get(SSH_OPTIONS_VARIABLE)
    words = ["ssh", *(["-F", config] if config else []), *[f"-o{name}={value}" for name, value in OPTIONS.items()]]
    words += ["-L", f"{local}:{parts.path.rstrip('/') or SOCKET}"]
    words += [*(["-l", parts.username] if parts.username else []), *(["-p", str(port)] if port else [])]
    return [*words, "--", host, "echo fivefold-ready $(id -u):$(id -g); exec cat"]


@contextlib.contextmanager
def forwarded(url: str) -> Iterator[tuple[str, str]]:
    """The engine at `url` as `unix://...` as long as the block lasts, and who we are there, as `uid:gid`.

    Raises:
        InputError: the host can't be reached, is not known, or refuses us.
    """
    with tempfile.TemporaryDirectory(prefix="fivefold-") as folder:
        local = str(Path(folder, "engine.sock"))
        with tempfile.TemporaryFile() as said, _started(command(url, local), said) as process:
            user = _ready(process)
            if not user:
                process.kill()
                process.wait()
                said.seek(0)
                last = said.read().decode(errors="replace").strip().splitlines() or [f"no answer in {_CONNECT_S} s"]
                raise InputError(url, "ssh", last[-1], "try the same host with `ssh`; its key must be in known_hosts")
            yield f"unix://{local}", user


@contextlib.contextmanager
def _started(words: list[str], said: object) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # type: ignore[call-overload]
        )
    except FileNotFoundError as error:
        raise InputError("ssh", "command", "not found", "install OpenSSH's client") from error
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _ready(process: subprocess.Popen[bytes]) -> str:
    """Who we are there, once the socket is; nothing if that does not come about. A shell there may say other things first."""
    assert process.stdout
    end, said = time.monotonic() + _CONNECT_S, b""
    while (left := end - time.monotonic()) > 0:
        ready, _, _ = select.select([process.stdout], [], [], left)
        piece = os.read(process.stdout.fileno(), 4096) if ready else b""
        said += piece
        found = _GREETING.search(said)
        if found or not piece:
            return found[1].decode() if found else ""
    return ""
