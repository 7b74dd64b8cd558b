"""Where roles run: here, over SSH, in a container in one of these, or as a step of the Slurm job that this process is in."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from harness.launch import bootstrap
from harness.launch.lines import CarriedLine, Line, ProcessLine

if TYPE_CHECKING:
    from harness.inventory import Host
    from harness.remote import Timing

_IMAGE = "FIVEFOLD_IMAGE"
# the digest that a registry knows the image by, else the engine's own
_IDENTITY = "{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}@{{.Id}}{{end}}"
FAR_SILENCE_S = 10.0
"""How long a host that is reached over a network goes on without a word from the controller before it ends its roles."""


class Place(Protocol):
    """Somewhere a role can run."""

    @property
    def name(self) -> str:
        """As messages call it."""

    @property
    def address(self) -> str:
        """Where other roles reach the ports of roles there."""

    @property
    def python(self) -> str:
        """A Python there, 3.9 or newer, for the leash."""

    @property
    def folder(self) -> str:
        """Below which roles get their folders there, absolute or below `~/`; empty for the launch's own folder."""

    @property
    def silence_s(self) -> float:
        """How long roles there go on without a word from here; 0 where the end of this process cannot go unnoticed."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for every role there."""

    def carry(self, argv: Sequence[str]) -> Line:
        """Start `argv` there with a line to it. Raises InputError or OSError."""


def open_line(place: Place) -> Line:
    """A line to a leash at `place`."""
    line = place.carry(bootstrap.command(place.python))
    with contextlib.suppress(OSError):  # whoever reads gets the end, and `trouble` says why
        line.write(bootstrap.program())
    return line


@dataclass(frozen=True, slots=True)
class Here:
    """This machine."""

    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    name: str = "this machine"
    address: str = "127.0.0.1"
    python: str = sys.executable
    silence_s: float = 0.0

    def carry(self, argv: Sequence[str]) -> Line:
        """A child process."""
        return ProcessLine(argv)


@dataclass(frozen=True, slots=True)
class Over:
    """A host of an inventory, over SSH; each role has a connection of its own, and so ends when that does."""

    host: Host
    python: str = "python3"
    timing: Timing | None = None

    @property
    def name(self) -> str:
        """The host's."""
        return self.host.name

    @property
    def address(self) -> str:
        """The host's."""
        return self.host.address or self.host.name

    @property
    def folder(self) -> str:
        """In the host's work folder."""
        return f"{self.host.work_dir}/launch"

    @property
    def silence_s(self) -> float:
        """A cut network says nothing."""
        return FAR_SILENCE_S

    @property
    def environment(self) -> Mapping[str, str]:
        """The host's, secrets included: it goes over the line and never onto a command line."""
        return self.host.resolved_environment()

    def carry(self, argv: Sequence[str]) -> Line:
        """A command on a new connection."""
        from harness.remote import connect  # not at import: the packages for SSH are large, and most runs are local

        remote = connect(self.host, timing=self.timing)
        return CarriedLine(lambda sink, stdin: remote.stream(argv, sink, stdin=stdin), remote.close)


@dataclass(frozen=True, slots=True)
class Contained:
    """A container of `image` at another place, whose engine's command line (`docker`, `podman`) is there.

    The container's input is the line: the engine closes it when whoever started the container is gone, so the leash, its
    first process, ends and the container is removed. `mounts`: paths there to paths inside.
    """

    image: str
    outside: Place
    engine: str = "docker"
    mounts: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    cpus: float | None = None
    gpus: str | None = None
    network: str = "host"
    folder: str = "/tmp/fivefold"  # inside
    python: str = "python3"

    @property
    def name(self) -> str:
        """The image and where it runs."""
        return f"{self.image} on {self.outside.name}"

    @property
    def address(self) -> str:
        """That of the outside: the network is the host's."""
        return self.outside.address

    @property
    def silence_s(self) -> float:
        """As outside."""
        return self.outside.silence_s

    @property
    def environment(self) -> Mapping[str, str]:
        """As outside."""
        return self.outside.environment

    def command(self, argv: Sequence[str]) -> list[str]:
        """The engine's command line for `argv`; the environment is not on it."""
        options = ["--rm", "--interactive", "--label=fivefold=launch", f"--network={self.network}", "--entrypoint="]
        options += [f"--name=fivefold-{secrets.token_hex(6)}", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
        options += [f"--memory={self.memory_bytes}"] if self.memory_bytes else []
        options += [f"--cpus={self.cpus:g}"] if self.cpus else []
        options += [f"--gpus={self.gpus}"] if self.gpus else []
        options += [f"--mount=type=bind,source={source},target={target}" for source, target in self.mounts.items()]
        options += [f"--env={_IMAGE}"]
        words = " ".join(map(shlex.quote, [self.engine, "run", *options]))
        # what only that machine knows: its user, so that files are that user's, and the home that `~/` stands for
        words = words.replace("source=~/", "source='\"$HOME\"'/")
        made = "".join(f"[ -e {path} ] || mkdir -p {path}; " for path in map(_word, self.mounts))
        made += self._identify()
        return ["sh", "-c", f'{made}exec {words} --user="$(id -u):$(id -g)" {shlex.join([self.image, *argv])}']

    def _identify(self) -> str:
        """For a shell: pull the image where it is not there, and tell what runs inside which one it is, for provenance."""
        inspect = shlex.join([self.engine, "image", "inspect", "--format", _IDENTITY, self.image])
        pull = shlex.join([self.engine, "pull", "--quiet", self.image])
        found = f"{_IMAGE}=$({inspect} 2>/dev/null)"
        name = shlex.quote(self.image.partition("@")[0])
        # the engine's last words are why the image cannot be had
        return (
            f"{found} || {{ {pull} >/dev/null && {found}; }} || exit 125; "
            f"case ${_IMAGE} in @*) {_IMAGE}={name}${_IMAGE};; esac; export {_IMAGE}; "
        )

    def carry(self, argv: Sequence[str]) -> Line:
        """A container whose process 1 is `argv`."""
        return self.outside.carry(self.command(argv))


@dataclass(frozen=True, slots=True)
class Step:
    """A node of the Slurm allocation that this process runs in, by `srun`. Files are on a file system that all nodes share."""

    node: str
    gpus: int = 0
    cpus: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    python: str = sys.executable
    silence_s: float = FAR_SILENCE_S

    @property
    def name(self) -> str:
        """The node's."""
        return self.node

    @property
    def address(self) -> str:
        """The node's name, which resolves within a cluster."""
        return self.node

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line of `srun`: steps share the allocation, and none waits for another."""
        gpus = [f"--gres=gpu:{self.gpus}"] if self.gpus else ["--gres=none"]
        options = ["--nodes=1", "--ntasks=1", f"--nodelist={self.node}", f"--cpus-per-task={self.cpus}", *gpus]
        return ["srun", *options, "--overlap", "--unbuffered", "--input=0", "--mpi=none", "--kill-on-bad-exit=0", *argv]

    def carry(self, argv: Sequence[str]) -> Line:
        """A step of the job."""
        return ProcessLine(self.command(argv))


def _word(path: str) -> str:
    """`path`, which may begin with `~/`, as a word of a shell's line."""
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)


def allocated_nodes(environ: Mapping[str, str] | None = None) -> list[str]:
    """The nodes of the Slurm job that this process runs in; none outside of one."""
    told = (os.environ if environ is None else environ).get("SLURM_JOB_NODELIST", "")
    return expand(told) if told else []


def expand(nodes: str) -> list[str]:
    """The names in Slurm's short form: `node[01-03,07],login` is node01, node02, node03, node07, login."""
    names: list[str] = []
    while nodes:
        head, bracket, rest = nodes.partition("[")
        if "," in head or not bracket:
            name, _, nodes = nodes.partition(",")
            names += [name]
            continue
        inside, _, tail = rest.partition("]")
        suffix, _, nodes = tail.partition(",")
        names += [head + number + suffix for part in inside.split(",") for number in _numbers(part)]
    return names


def _numbers(part: str) -> list[str]:
    first, dash, last = part.partition("-")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)] if dash else [first]
