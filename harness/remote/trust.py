"""Pins the key of a host, deliberately: shows what the host shows, and records it only when told exactly that again.

    python -m harness.remote.trust hosts/lab.yaml                  # every host: pinned, not pinned, or another key
    python -m harness.remote.trust hosts/lab.yaml gpu1             # its fingerprint: compare it with what its owner says
    python -m harness.remote.trust hosts/lab.yaml gpu1 --accept SHA256:...

The key goes into `hosts/lab.keys`. Nothing is logged in to: the key is shown before any login, and the connection ends there.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko

from harness import cli
from harness.atomic import write_atomically
from harness.inventory import Host, Inventory, keys_file, load_inventory, read_keys
from harness.remote.connect import connect
from harness.remote.errors import UnreachableError, one_line
from harness.remote.fan_out import fan_out
from harness.remote.timing import Timing
from systems.registry import InputError

_TIMING = Timing(connect_s=5.0, attempts=1)


@dataclass(frozen=True, slots=True)
class Shown:
    """A host and the key that it shows now."""

    host: Host
    key: str

    @property
    def state(self) -> str:
        """How it stands to what is pinned."""
        if self.host.host_key is None:
            return "not pinned"
        return "pinned" if self.host.host_key == self.key else "ANOTHER KEY THAN THE PINNED ONE"


def fingerprint(key: str) -> str:
    """The fingerprint of a public key, as `ssh-keygen -lf` prints it."""
    digest = hashlib.sha256(base64.b64decode(key.partition(" ")[2])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def look(host: Host, timing: Timing = _TIMING) -> Shown:
    """The key that `host` shows now, of the kind that is pinned or else the best that it has.

    Raises:
        UnreachableError: nobody there, or no SSH server.
        RemoteError: a jump host on the way cannot be passed.
    """
    with _stream(host, timing) as stream, contextlib.closing(paramiko.Transport(stream)) as transport:
        transport.banner_timeout = timing.connect_s
        if host.host_key:
            kind = host.host_key.partition(" ")[0].replace("ssh-rsa", "rsa-sha2-512")  # how RSA keys sign today
            options = transport.get_security_options()
            options.key_types = (kind, *(other for other in options.key_types if other != kind))
        try:
            transport.start_client(timeout=timing.connect_s)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise _nobody(host, error) from error
        key = transport.get_remote_server_key()
        return Shown(host, f"{key.get_name()} {key.get_base64()}")


@contextlib.contextmanager
def _stream(host: Host, timing: Timing) -> Iterator[Any]:
    """Bytes to and from the host's SSH server; through the jump host, which must be trusted itself."""
    assert host.address
    if host.via is None:
        try:
            yield socket.create_connection((host.address, host.port), timeout=timing.connect_s)
        except OSError as error:
            raise _nobody(host, error) from error
        return
    with connect(host.via, timing=timing) as jump:
        yield jump.tunnel(host.address, host.port)


def _nobody(host: Host, error: BaseException) -> UnreachableError:
    said = getattr(error, "strerror", None) or one_line(str(error)) or "the connection ended"
    return UnreachableError(host.name, f"{host.address}:{host.port}: {said}", "is it on, and is its address right?")


def pin(shown: Shown) -> Path:
    """Record the key that was shown, in place of another where there is one; gives the file.

    Raises:
        InputError: the inventory itself holds another key, or the file cannot be written.
    """
    path = keys_file(Path(shown.host.where))
    keys = read_keys(path)
    if shown.host.host_key not in (None, shown.key) and keys.get(shown.host.name) != shown.host.host_key:
        mend = f"the file itself pins another key: remove it there, then run this again (now {fingerprint(shown.key)})"
        raise InputError(shown.host.where, f"{shown.host.name}.host_key", shown.host.host_key, mend)
    lines = [f"{name} {key}\n" for name, key in sorted({**keys, shown.host.name: shown.key}.items())]
    write_atomically(path, "# Pinned by `python -m harness.remote.trust`: name, kind and key of each host.\n" + "".join(lines))
    return path


def report(shown: Mapping[str, Shown], failed: Mapping[str, InputError]) -> str:
    """One line for each host."""
    lines = [f"{name}: {one.key.partition(' ')[0]} {fingerprint(one.key)}: {one.state}" for name, one in shown.items()]
    return "\n".join([*lines, *(str(error) for error in failed.values())])


def _remote(inventory: Inventory, names: Sequence[str]) -> list[Host]:
    chosen = [host for host in inventory.select(*names) if not (host.local or host.only_endpoint)]
    return [host for host in chosen if names or not host.placeholder]


def _accept(host: Host, accepted: str) -> int:
    shown = look(host)
    now = fingerprint(shown.key)
    if accepted != now:
        raise InputError(host.name, "--accept", accepted, f"the host shows {now}: nothing was recorded")
    if shown.state == "pinned":
        print(f"{host.name}: {now}: pinned already")
        return 0
    print(f"{host.name}: {now}: recorded in {pin(shown)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Show fingerprints, or record one; 1 when a host is not pinned, shows another key or cannot be looked at."""
    parser = argparse.ArgumentParser(prog="python -m harness.remote.trust", description=__doc__)
    parser.add_argument("inventory", type=Path, metavar="INVENTORY")
    parser.add_argument("hosts", nargs="*", metavar="HOST", help="host, range, group or tag (all without any)")
    parser.add_argument("--accept", metavar="FINGERPRINT", help="record the key of the one HOST, if it still has this one")
    given = parser.parse_args(argv)
    hosts = _remote(load_inventory(given.inventory), given.hosts)
    if given.accept is not None:
        if len(given.hosts) != 1 or len(hosts) != 1:
            raise InputError("--accept", "HOST", " ".join(given.hosts), "name one host: every key is accepted by itself")
        return _accept(hosts[0], given.accept)
    if not hosts:
        print(f"{given.inventory}: no host in it is connected to")
        return 0
    found = fan_out(hosts, look)
    print(report(found.done, found.failed))
    strange = [one for one in found.done.values() if one.state != "pinned"]
    for one in strange:
        print(f"compare it with the owner's; to pin it: python -m harness.remote.trust {given.inventory} {one.host.name}"
              f" --accept {fingerprint(one.key)}")  # fmt: skip
    return int(bool(strange or found.failed))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
