"""The hosts that experiments run on: `hosts/*.yaml`, checked before anything connects anywhere.

    from harness.inventory import load_inventory
    host = load_inventory(Path("hosts/local.yaml")).host("local")

This module only reads: nothing here opens a connection. hosts/README.md explains every key.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from harness.references import refuse_secrets, resolve
from harness.safe_yaml import read_mapping
from harness.validation import Model, Wrong, validate
from systems.registry import InputError

REMOTE_ONLY = ("address", "user", "key_file", "host_key")
_KEY_KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def _address(text: str) -> str:
    labels = text.removesuffix(".").split(".")
    if len(text) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit():
        return text
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("use a host name or an IP address, without user and port") from None


def _host_key(text: str) -> str:
    """`text` as `kind base64`, without the comment that may follow; refuses anything whose two halves disagree."""
    kind, _, rest = text.strip().partition(" ")
    if kind not in _KEY_KINDS:
        raise ValueError(f"use the host's public key, which begins with one of {', '.join(_KEY_KINDS)}")
    encoded = rest.strip().partition(" ")[0]
    try:
        blob = base64.b64decode(encoded, validate=True)
        inside = blob[4 : 4 + struct.unpack(">I", blob[:4])[0]]
    except (binascii.Error, struct.error, ValueError):
        raise ValueError("is cut short or mistyped: copy the whole line that ssh-keyscan prints") from None
    if inside != kind.encode() or len(blob) < 4 + len(kind) + 4 + 32:
        raise ValueError("is cut short or mistyped: copy the whole line that ssh-keyscan prints")
    return f"{kind} {encoded}"


def _as_text(value: object) -> object:
    """A whole number as it was written; what YAML may have changed must be quoted to be sure what is meant."""
    if isinstance(value, bool | float):
        raise ValueError("write it in quotes, as jobs shall see it")
    return str(value) if isinstance(value, int) else value


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=63)]
HostPath = Annotated[str, Field(pattern=r"^(?:/|~/)[^\x00-\x1f\x7f]*$")]
Value = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Gpu(Model):
    """GPUs of one kind in a host."""

    model: Name
    """As figures name it, such as `rtx3090`."""
    count: int = Field(default=1, ge=1, le=64)
    """How many."""
    memory_gib: float | None = Field(default=None, gt=0, le=4096)
    """Memory of each, in GiB."""


class Venv(Model):
    """Jobs run in a virtual environment on the host."""

    kind: Literal["venv"] = "venv"
    """`venv`."""


class Container(Model):
    """Jobs run in a container on the host."""

    kind: Literal["container"]
    """`container`."""
    image: str = Field(pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]*$", max_length=255)
    """The image, best with its digest: `name@sha256:...`."""


Runner = Annotated[Venv | Container, Field(discriminator="kind")]


class Host(Model):
    """One machine. `local: true` is the machine that Snakemake runs on and needs nothing else."""

    name: Name
    """What the rest of the project calls it."""
    local: bool = False
    """Whether it is this machine."""
    address: Annotated[str, AfterValidator(_address)] | None = None
    """Host name or IP address."""
    user: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=64)
    """Who to log in as."""
    port: int = Field(default=22, ge=1, le=65535)
    """Of its SSH server."""
    key_file: HostPath | None = None
    """The private key to log in with: a path on this machine, absolute or below `~/`; without it, the SSH agent's."""
    host_key: Annotated[str, AfterValidator(_host_key)] | None = None
    """The host's own public key: a host that shows another is refused."""
    gpus: tuple[Gpu, ...] = ()
    """Its GPUs; none for a host that only sends requests."""
    work_dir: HostPath = "~/fivefold"
    """Where the project's files go on that host, absolute or below `~/`."""
    runner: Runner = Venv()
    """How jobs run there."""
    environment: Mapping[Variable, Value] = {}
    """Variables for jobs on that host; a secret as `env:NAME` (of this machine) or `file:PATH` (on this machine)."""
    tags: tuple[Name, ...] = ()
    """Words by which experiments choose hosts."""

    @model_validator(mode="after")
    def _local_or_remote(self) -> Host:
        for key in REMOTE_ONLY:
            if self.local and getattr(self, key) is not None:
                raise Wrong(key, getattr(self, key), "a local host is not connected to: remove this key, or `local`")
        if self.local and "port" in self.model_fields_set:
            raise Wrong("port", self.port, "a local host is not connected to: remove this key, or `local`")
        for key in ("address", "user", "host_key"):
            if not self.local and getattr(self, key) is None:
                raise Wrong(key, "(absent)", "add this key, or `local: true` for this machine")
        return self

    @property
    def gpu_count(self) -> int:
        """How many GPUs it has, of all kinds."""
        return sum(gpu.count for gpu in self.gpus)

    def resolved_environment(self, where: str | Path = "hosts", environ: Mapping[str, str] | None = None) -> dict[str, str]:
        """Its environment with every reference replaced by what it stands for: for the job alone, never for a log.

        Raises:
            InputError: a reference leads nowhere.
        """
        key = f"{self.name}.environment"
        return {name: resolve(text, where, f"{key}.{name}", environ) for name, text in self.environment.items()}


class Inventory(Model):
    """A file under `hosts/`: the machines of one testbed."""

    hosts: tuple[Host, ...] = Field(min_length=1)
    """The machines, each with a name of its own."""

    @model_validator(mode="after")
    def _names_differ(self) -> Inventory:
        seen: set[str] = set()
        for place, host in enumerate(self.hosts):
            if host.name in seen:
                raise Wrong(f"hosts.{place}.name", host.name, "another host has this name: give each its own")
            seen.add(host.name)
        return self

    def host(self, name: str) -> Host:
        """The host called `name`. Raises InputError when there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise InputError("hosts", "name", name, f"use one of {', '.join(host.name for host in self.hosts)}")

    def tagged(self, *tags: str) -> tuple[Host, ...]:
        """The hosts that carry every one of `tags`, in the order of the file."""
        return tuple(host for host in self.hosts if set(tags) <= set(host.tags))


def load_inventory(path: Path) -> Inventory:
    """The inventory in the file `path`.

    Raises:
        InputError: the file cannot be read, holds a secret, an unknown key, or a value that cannot be.
    """
    data = read_mapping(path)
    refuse_secrets(data, path)  # first, so that no other message can show one
    return validate(Inventory, data, path)
