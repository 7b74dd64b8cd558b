"""An inventory (the shape of `hosts/local.yaml`) of the hosts of an SSH lab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from tests.labs.ssh_lab import SshHost


def entry(host: SshHost, **more: Any) -> dict[str, Any]:
    """What an inventory says of `host`; `more` goes over it."""
    return {
        "name": host.name,
        "address": host.address,
        "port": host.port,
        "user": host.user,
        "key_file": str(host.key_file),
        "host_key": host.host_key,
        "work_dir": str(host.work_dir),
        **more,
    }


def write(path: Path, hosts: Sequence[SshHost], more: Mapping[str, Any]) -> Path:
    """Write the inventory of `hosts`, each with the keys in `more`, to `path`."""
    path.write_text(yaml.safe_dump({"hosts": [entry(host, **more) for host in hosts]}, sort_keys=False))
    return path
