"""The one way to a Docker Engine: of this machine, of a socket, or of another machine over SSH.

    with connect("ssh://me@gpu1") as engine:
        engine.api.containers()

Podman's API service answers in the same way. What the engine refuses, and an engine that isn't there, become one line.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.containers.forward import forwarded
from systems.registry import InputError

DEFAULT = "unix:///var/run/docker.sock"
_TIMEOUT_S = 60
_ALLOW = "not allowed: join the group `docker` and log in again, or use rootless Docker or Podman (docs/containers.md)"
_START = "no engine answers there: start it, or name another one (DOCKER_HOST, or `engine` in containers/site.yaml)"
_MENDS = {
    errno.ENOENT: _START,
    errno.ECONNREFUSED: _START,
    errno.EACCES: _ALLOW,
}
_GONE = "the engine stopped answering: start it, then run the same command again"


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that has answered.

    `url` is what the user calls it, `api` the SDK's low-level client, `caller` who we are on its machine, as `uid:gid`.
    """

    url: str
    api: Any
    caller: str

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        try:
            return bool(self.api.ping())
        except Exception:
            return False

    @property
    def rootless(self) -> bool:
        """Whether user 0 in its containers is the user that runs it."""
        with talking(self.url, "info"):
            return "name=rootless" in (self.api.info().get("SecurityOptions") or ())


@contextlib.contextmanager
def connect(engine: str | None = None) -> Iterator[Engine]:
    """The engine at `engine`; without it that of DOCKER_HOST, else this machine's.

    Raises:
        InputError: nothing answers there, or we may not talk to it.
    """
    url = engine or os.environ.get("DOCKER_HOST") or DEFAULT
    with contextlib.ExitStack() as stack:
        ours = f"{os.getuid()}:{os.getgid()}"
        base_url, caller = stack.enter_context(forwarded(url)) if url.startswith("ssh://") else (url, ours)
        with talking(url, "engine"):
            api = importlib.import_module("docker").APIClient(base_url=base_url, version="auto", timeout=_TIMEOUT_S)
        stack.callback(api.close)
        yield Engine(url, api, caller)


@contextlib.contextmanager
def talking(url: str, doing: str) -> Iterator[None]:
    """Turns what goes wrong while the engine at `url` is asked into an InputError that says what we were `doing`."""
    errors = importlib.import_module("docker.errors")
    requests = importlib.import_module("requests.exceptions")
    urllib3 = importlib.import_module("urllib3.exceptions")
    try:
        yield
    except errors.APIError as error:
        raise InputError(url, doing, explanation(error), "mend that, then run the same command again") from error
    except (errors.DockerException, requests.RequestException, urllib3.HTTPError, OSError) as error:
        found = _os_error(error)
        shown = os.strerror(found.errno) if found and found.errno else str(error)
        raise InputError(url, doing, shown, _MENDS.get((found and found.errno) or 0, _GONE)) from error


def explanation(error: Any) -> str:  # noqa: ANN401
    """What the engine itself says of an APIError, in one line."""
    return " ".join(str(error.explanation or error).split())


def _os_error(error: BaseException) -> OSError | None:
    """The system's error at the bottom of the SDK's, requests' and urllib3's wrappings of it."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        found = waiting.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and isinstance(found.errno, int):
            return found
        waiting += [*found.args, found.__cause__, found.__context__]
    return None
