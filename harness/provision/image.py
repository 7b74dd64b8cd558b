"""The image of a host whose jobs run in containers: there already, or pulled by the host's own engine, over our connection.

Building images, and pushing them to where hosts can pull them from, is `harness.containers`' part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from harness.inventory import Container, Host
from harness.remote import Ran, RemoteError
from harness.remote.errors import one_line

Say = Callable[[str], None]
LOOK_S, PULL_S = 60.0, 3600.0


class Commands(Protocol):
    """What this needs of a connection."""

    def run(self, argv: list[str], *, timeout_s: float | None = None, on_line: Say | None = None, check: bool = True) -> Ran:
        """Run a command on the host."""


def ensure(remote: Commands, host: Host, engine: str, say: Say) -> str:
    """Have the host's image there; its identity, `sha256:...`, which is that of its content.

    Args:
        remote: a connection to the host.
        host: what the inventory says of it.
        engine: the command of its container engine, such as `docker`.
        say: is told what the engine says while it pulls.

    Raises:
        RemoteError: the engine does not answer, or it neither has the image nor can pull it.
    """
    assert isinstance(host.runner, Container)
    name = host.runner.image
    answer = remote.run([engine, "version", "--format", "{{.Client.Version}}"], timeout_s=LOOK_S, check=False)
    if answer.returncode:
        said = one_line(answer.stderr.strip().splitlines()[-1] if answer.stderr.strip() else "it did not say why")
        raise RemoteError(host.name, f"{engine} does not answer ({said})", "is its daemon running, and may this user use it?")
    if found := _identity(remote, engine, name):
        return found
    say(f"pulling {name}")
    pulled = remote.run([engine, "pull", name], timeout_s=PULL_S, on_line=say, check=False)
    found = _identity(remote, engine, name)
    if pulled.returncode or not found:
        said = one_line((pulled.stderr.strip() or "it did not say why").splitlines()[-1])
        mend = "push it to a registry that the host reaches (`snakemake containers` builds ours), or load it there"
        raise RemoteError(host.name, f"image {name} cannot be had ({said})", mend)
    return found


def _identity(remote: Commands, engine: str, name: str) -> str:
    told = remote.run([engine, "image", "inspect", "--format", "{{.Id}}", name], timeout_s=LOOK_S, check=False)
    return told.stdout.strip() if told.returncode == 0 else ""
