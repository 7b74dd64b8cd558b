"""Fixtures for tests against the hosts of an SSH lab, which name this module as a plugin.

PYTEST_DONT_REWRITE: no assert here.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.inventory import Host, load_inventory
from harness.remote import Remote, Timing, connect
from tests.labs.fixtures import running
from tests.labs.ssh_lab import SshLab

QUICK = Timing(connect_s=3.0, attempts=2, backoff_s=0.1, probe_s=0.3, silence_s=1.5)
ONCE = Timing(connect_s=1.0, attempts=1, probe_s=0.3, silence_s=1.5)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[SshLab]:
    own = SshLab(tmp_path_factory.mktemp("ssh"), hosts=2, hide=[str(root)], keep=[sys.prefix])
    with running(own) as lab, lab.inside():
        yield lab


@pytest.fixture(scope="module")
def hosts(lab: SshLab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Host, ...]:
    return load_inventory(lab.inventory(tmp_path_factory.mktemp("hosts") / "hosts.yaml")).hosts


@pytest.fixture
def remote(hosts: tuple[Host, ...]) -> Iterator[Remote]:
    with connect(hosts[0], timing=QUICK) as remote:
        yield remote


class Traps:
    """File names that only a shell which interprets what it should not could make, and the search for such files."""

    def __init__(self, lab: SshLab) -> None:
        self.name = f"PWNED-{uuid.uuid4().hex[:8]}"
        self._lab = lab

    @property
    def texts(self) -> list[str]:
        name = self.name
        return [
            f"'; touch {name} #",
            f"$(touch {name})",
            f"a\ntouch {name}\n",
            f"`touch {name}`é漢",
            f'"; touch {name} #',
            "../é漢 x",
        ]

    def sprung(self) -> list[Path]:
        """The files that were made; on a host, its disk, the root and the home are looked at, and here the current folder."""
        homes = [self._lab.rooms[host.name].see(Path.home()) for host in self._lab.hosts]
        places = [Path.home(), Path("/"), Path("/tmp"), Path.cwd(), *homes, *(host.root for host in self._lab.hosts)]
        found = [place / self.name for place in places if (place / self.name).exists()]
        return found + [path for host in self._lab.hosts for path in host.root.rglob(f"{self.name}*")]


@pytest.fixture
def traps(lab: SshLab) -> Traps:
    return Traps(lab)
