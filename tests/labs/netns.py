"""Being in a room's network from this process, where a command of its own (`Room.run`) will not do.

`os.setns` came with Python 3.12, hence ctypes. Only the calling thread moves, and the threads that it starts meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator

from tests.labs.errors import LabError

_CLONE_NEWNET = 0x40000000


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise LabError(f"setns: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def network_of(pid: int) -> Iterator[None]:
    """While the block runs, this thread has the network of the process `pid`."""
    try:
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    except FileNotFoundError as error:
        raise LabError(f"process {pid} has ended") from error
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _enter(there)
        try:
            yield
        finally:
            _enter(here)
    finally:
        os.close(there)
        os.close(here)


def answers(pid: int, address: str, port: int, greeting: bytes = b"") -> bool:
    """Whether a server at `address` takes connections, and begins with `greeting`, seen from the network of process `pid`."""
    try:
        with connect(pid, address, port, 0.2) as connection:
            return not greeting or connection.recv(len(greeting)) == greeting
    except OSError:
        return False


def connect(pid: int, address: str, port: int, timeout_s: float = 3) -> socket.socket:
    """A TCP connection to `address` made in the network of process `pid`; usable from anywhere afterwards."""
    with network_of(pid):
        return socket.create_connection((address, port), timeout=timeout_s)
