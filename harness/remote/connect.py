"""The one place in which a connection to another host is made.

Only the key that is pinned for a host is accepted from it, whatever the user's own files of known hosts say; nobody's
agent is forwarded, no password is asked for. An attempt that found nobody is repeated a bounded number of times; a host
that shows another key or refuses the login is final.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import paramiko
from fabric import Config, Connection
from paramiko.pkey import UnknownKeyType

from harness.inventory import Host
from harness.remote.errors import HostKeyError, LoginError, PlaceholderError, RemoteError, UnreachableError, one_line
from harness.remote.session import Remote
from harness.remote.timing import Timing

# it writes tracebacks of its threads to stderr where nobody listens; what went wrong is raised where it is waited for
logging.getLogger("paramiko").addHandler(logging.NullHandler())
_FINAL = frozenset({errno.EACCES, errno.EPERM, errno.EAFNOSUPPORT})
_LOCKED = re.compile(r"passphrase|password|encrypted", re.IGNORECASE)
_MACHINE_OFF = "is it on, is its address right, does a firewall let you through?"


def connect(host: Host, *, timing: Timing | None = None) -> Remote:
    """A connection to `host`, through its jump host where it has one; use it as a context manager.

    Raises:
        PlaceholderError: the inventory only shows what the host would look like.
        HostKeyError: no key is pinned for it, or it shows another one.
        LoginError: it refuses the user or the key, or the key file cannot be used.
        UnreachableError: nobody answered in any of the attempts.
    """
    assert not host.local, "this machine is not connected to"
    timing = timing or Timing()
    way = [(each, _checked(each)) for each in _way(host)]
    for attempt in range(timing.attempts):
        try:
            return _attempt(way, timing)
        except UnreachableError:
            if attempt + 1 == timing.attempts:
                raise
            threading.Event().wait(timing.pause_s(attempt))
    raise AssertionError("no attempt")


def _way(host: Host) -> list[Host]:
    """The hosts on the way to `host`, the nearest first and itself last."""
    return [*(_way(host.via) if host.via else []), host]


def _checked(host: Host) -> paramiko.PKey | None:
    """What can be said of a connection before it is made; its private key, where it names one."""
    if host.placeholder:
        raise PlaceholderError(host.name, "placeholder", f"describe a real host in {host.where}, without `placeholder`")
    if host.host_key is None:
        raise HostKeyError(
            host.name, "no key is pinned", f"look at it: python -m harness.remote.trust {host.where} {host.name}"
        )
    return _key(host)


def _key(host: Host) -> paramiko.PKey | None:
    """The private key to log in with; None for those of the SSH agent.

    Raises:
        LoginError: there is no such file, it holds no private key, or the key has a passphrase.
    """
    if host.key_file is None:
        return None
    path, what = Path(host.key_file).expanduser(), f"key_file {host.key_file}"
    try:
        return paramiko.PKey.from_path(path)
    except OSError as error:
        raise LoginError(host.name, f"{what}: {error.strerror}", "name a private key that you may read") from error
    except (paramiko.SSHException, UnknownKeyType, ValueError, TypeError) as error:
        if _LOCKED.search(str(error)):
            mend = "load it into the SSH agent (ssh-add) and leave `key_file` out"
            raise LoginError(host.name, f"{what}: it has a passphrase", mend) from error
        raise LoginError(host.name, f"{what}: is no private key ({one_line(str(error))})", "name one") from error


def _attempt(way: Sequence[tuple[Host, paramiko.PKey | None]], timing: Timing) -> Remote:
    """One try: every hop of the way in turn. What was opened is closed when a later hop fails."""
    with contextlib.ExitStack() as opened:
        gateway: Connection | None = None
        for each, key in way:
            connection = _connection(each, key, gateway, timing)
            opened.callback(_close, connection)
            _open(each, connection, timing)
            gateway = connection
        assert gateway is not None
        remote = Remote(way[-1][0], gateway.client.get_transport(), timing, opened.pop_all().close)
        remote.watch()
        return remote


def _connection(host: Host, key: paramiko.PKey | None, gateway: Connection | None, timing: Timing) -> Connection:
    login = {
        "pkey": key,
        "allow_agent": key is None,
        "look_for_keys": False,
        "timeout": timing.connect_s,  # Fabric's own parameter takes whole seconds only
        "banner_timeout": timing.connect_s,
        "auth_timeout": timing.connect_s,
        "channel_timeout": timing.connect_s,
    }
    # an empty SSH configuration: the user's own may lead through other hosts, which the inventory does not name
    connection = Connection(
        host.address,
        user=host.user,
        port=host.port,
        gateway=gateway,
        forward_agent=False,
        connect_kwargs=login,
        config=Config(lazy=True, ssh_config=paramiko.SSHConfig()),
    )
    # Fabric's own choice accepts every key
    connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    _pin(connection.client, host)
    return connection


def _pin(client: paramiko.SSHClient, host: Host) -> None:
    assert host.host_key and host.address
    kind, _, encoded = host.host_key.partition(" ")
    name = host.address if host.port == paramiko.config.SSH_PORT else f"[{host.address}]:{host.port}"
    client.get_host_keys().add(name, kind, paramiko.PKey.from_type_string(kind, base64.b64decode(encoded)))


def _open(host: Host, connection: Connection, timing: Timing) -> None:
    began = time.monotonic()
    try:
        connection.open()
    except (paramiko.SSHException, OSError, EOFError, ValueError) as error:
        raise _explained(host, error, time.monotonic() - began) from error
    _notice_silence(connection.client.get_transport(), timing)


def _close(connection: Connection) -> None:
    with contextlib.suppress(Exception):
        connection.client.close()


def _notice_silence(transport: paramiko.Transport, timing: Timing) -> None:
    """Let the kernel end a connection whose other end has vanished; a connection through another host has no socket here."""
    if isinstance(sock := transport.sock, socket.socket):
        with contextlib.suppress(OSError, AttributeError):  # macOS has no such timeout: there the watch notices
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timing.silence_s * 1000))


def _explained(host: Host, error: BaseException, took_s: float) -> RemoteError:
    """`error` in the words of the one who wrote the inventory."""
    at = f"{host.user}@{host.address}:{host.port}"
    for kinds, explain in _EXPLANATIONS:
        if isinstance(error, kinds):
            return explain(host, at, error)
    if isinstance(error, OSError) and error.errno in _FINAL:
        return UnreachableError(host.name, f"{at}: {error.strerror}", "this machine does not let you connect there")
    said = getattr(error, "strerror", None) or one_line(str(error)) or "the connection ended"
    return UnreachableError(host.name, f"{at}: {said}, after {took_s:.1f} s", _MACHINE_OFF)


def _other_key(host: Host, at: str, _error: BaseException) -> RemoteError:
    mend = f"somebody may be in between; if the host was set up anew: python -m harness.remote.trust {host.where} {host.name}"
    return HostKeyError(host.name, f"{at} shows another key than the pinned one", mend)


def _refused(host: Host, at: str, _error: BaseException) -> RemoteError:
    key = host.key_file or "of the SSH agent"
    mend = "is `user` right, and is the public key among that user's authorized_keys there?"
    return LoginError(host.name, f"{at}: the login was refused (key {key})", mend)


def _no_such_name(host: Host, at: str, _error: BaseException) -> RemoteError:
    return UnreachableError(host.name, f"{at}: no machine of this name is known", "mend `address`, or use an IP address")


def _not_from_jump(host: Host, at: str, error: BaseException) -> RemoteError:
    way = host.via.name if host.via else "the jump host"
    return UnreachableError(host.name, f"{at}: {way} cannot connect to it ({one_line(str(error))})", _MACHINE_OFF)


def _ssh_trouble(host: Host, at: str, error: BaseException) -> RemoteError:
    said = one_line(str(error))
    if "not found in known_hosts" in said:
        return _other_key(host, at, error)
    if "no authentication methods" in said.lower():
        return LoginError(host.name, f"{at}: the SSH agent has no key", "name a private key as `key_file`, or ssh-add one")
    return UnreachableError(host.name, f"{at}: no SSH server answered ({said})", _MACHINE_OFF)


_EXPLANATIONS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], Callable[..., RemoteError]], ...] = (
    (paramiko.BadHostKeyException, _other_key),
    (paramiko.AuthenticationException, _refused),
    (paramiko.ChannelException, _not_from_jump),
    (paramiko.SSHException, _ssh_trouble),
    (socket.gaierror, _no_such_name),
)
