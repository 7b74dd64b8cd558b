"""Other hosts over SSH: connections that trust nobody by default, commands that run once, files that arrive whole.

    from harness.remote import connect
    with connect(inventory.host("gpu1")) as remote:
        print(remote.run(["nvidia-smi", "-L"], timeout_s=10).stdout)
        remote.put_tree(Path("harness"), "~/fivefold/harness", exclude=["__pycache__"])

Every error is a `RemoteError`, one line that names the host, what happened and the mend. `connect` is the only function of
the code base that opens a connection; `python -m harness.remote.trust` is the only way to pin a key.
"""

from harness.remote.connect import connect
from harness.remote.errors import (
    CommandFailedError,
    CommandTimeoutError,
    HostKeyError,
    LoginError,
    LostError,
    PlaceholderError,
    RemoteError,
    TransferError,
    UnreachableError,
)
from harness.remote.fan_out import Console, fan_out
from harness.remote.session import Ran, Remote
from harness.remote.timing import Timing

__all__ = [
    "CommandFailedError",
    "CommandTimeoutError",
    "Console",
    "HostKeyError",
    "LoginError",
    "LostError",
    "PlaceholderError",
    "Ran",
    "Remote",
    "RemoteError",
    "Timing",
    "TransferError",
    "UnreachableError",
    "connect",
    "fan_out",
]
