"""One machine of an inventory: what may be said of it, and what follows from that. `harness.inventory` reads the files."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from harness.ranges import RangeError, expand
from harness.references import REFERENCE, resolve
from harness.validation import Model, Wrong

REMOTE_ONLY = ("address", "user", "key_file", "host_key", "jump")
_KEY_KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


def _address(text: str) -> str:
    """`text` as it is, if every address that it stands for can be one."""
    found = [_one_address(address) for address in _expanded(text)]
    return found[0] if len(found) == 1 else text


def _one_address(text: str) -> str:
    labels = text.removesuffix(".").split(".")
    if len(text) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit():
        return text
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("use a host name or an IP address, without user and port") from None


def _expanded(text: str) -> list[str]:
    try:
        return expand(text)
    except RangeError as error:
        raise ValueError(str(error)) from None


def _name(text: str) -> str:
    for name in _expanded(text):
        if not _NAME.fullmatch(name):
            raise ValueError("use lower-case letters, digits and _ . - only, 63 at most; many at once as node[01-12]")
    return text


def public_key(text: str) -> str:
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


HostNames = Annotated[str, Field(max_length=200), AfterValidator(_name)]
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


class NoRunner(Model):
    """No job runs on the host: it is only passed through, as a jump host."""

    kind: Literal["none"]
    """`none`."""


class Endpoint(Model):
    """A server that is there already, reached over HTTP: vLLM, SGLang, ours, or whatever speaks OpenAI's API."""

    url: str = Field(max_length=500)
    """Where it answers: `http://host:port/v1`."""
    model: str | None = Field(default=None, pattern=r"^[^\x00-\x1f\x7f]+$", max_length=255)
    """The model's name there; without it, the first that the server lists."""
    kind: Literal["fivefold", "openai", "sglang", "vllm"] = "vllm"
    """What it understands beyond OpenAI's API: all but `openai` take token ids and force an answer's length."""
    api_key: str | None = Field(default=None, pattern=r"^(?:env:[A-Za-z_][A-Za-z0-9_]*|file:[^\x00-\x1f]+)$")
    """A reference to the key that it asks for: `env:NAME` or `file:PATH` (of this machine)."""

    @field_validator("url")
    @classmethod
    def _plain(cls, text: str) -> str:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and text.isprintable()
        if not usable or parts.query or parts.fragment:
            raise ValueError("use http://host:port/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("no user and password in an address: use api_key")
        return text


Runner = Annotated[Venv | Container | NoRunner, Field(discriminator="kind")]


def is_only_endpoint(data: Mapping[str, object]) -> bool:
    """`Host.only_endpoint`, of a host as the file says it."""
    return data.get("endpoint") is not None and data.get("local") is not True and data.get("address") is None


class Host(Model):
    """One machine. `local: true` is the machine that Snakemake runs on and needs nothing else."""

    name: HostNames
    """What the rest of the project calls it; in a file, `node[01-12]` means twelve hosts."""
    local: bool = False
    """Whether it is this machine."""
    address: Annotated[str, AfterValidator(_address)] | None = None
    """Host name or IP address; with a range in the name, one in here as long: `10.0.0.[1-12]`."""
    user: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=64)
    """Who to log in as."""
    port: int = Field(default=22, ge=1, le=65535)
    """Of its SSH server."""
    key_file: HostPath | None = None
    """The private key to log in with: a path on this machine, absolute or below `~/`; without it, the SSH agent's."""
    host_key: Annotated[str, AfterValidator(public_key)] | None = None
    """The host's own public key: a host that shows another is refused. Without it, the one that `trust` recorded."""
    jump: Name | None = None
    """The host of this inventory that the way there leads through."""
    gpus: tuple[Gpu, ...] = ()
    """Its GPUs; none for a host that only sends requests."""
    work_dir: HostPath = "~/fivefold"
    """Where the project's files go on that host, absolute or below `~/`."""
    runner: Runner = Venv()
    """How jobs run there."""
    environment: Mapping[Variable, Value] = {}
    """Variables for jobs on that host; a secret as `env:NAME` (of this machine) or `file:PATH` (on this machine)."""
    endpoint: Endpoint | None = None
    """A server to send load to (`python -m harness.load`); with neither address nor `local`, the host is nothing else."""
    tags: tuple[Name, ...] = ()
    """Words by which experiments choose hosts, such as the roles that they may take."""
    slots: int | None = Field(default=None, ge=1, le=256)
    """How many jobs run on it at once; absent: one."""
    placeholder: bool = False
    """Whether this only shows what a host would look like: nothing ever connects to it."""

    _via: Host | None = PrivateAttr(default=None)
    _where: str = PrivateAttr(default="hosts")

    @model_validator(mode="after")
    def _local_or_remote(self) -> Host:
        for key in REMOTE_ONLY:
            if self.local and getattr(self, key) is not None:
                raise Wrong(key, getattr(self, key), "a local host is not connected to: remove this key, or `local`")
        if self.local and "port" in self.model_fields_set:
            raise Wrong("port", self.port, "a local host is not connected to: remove this key, or `local`")
        if self.only_endpoint:
            return self._nothing_but_endpoint()
        for key in ("address", "user"):
            if not self.local and getattr(self, key) is None:
                raise Wrong(key, "(absent)", "add this key, or `local: true` for this machine")
        names, addresses = len(expand(self.name)), len(expand(self.address or ""))
        if not self.local and names != addresses:
            raise Wrong("address", self.address, f"stands for {addresses} and the name for {names}: make them as many")
        if names > 1 and self.host_key is not None:
            raise Wrong("host_key", self.host_key, "every host has a key of its own: let `trust` record them")
        return self

    def _nothing_but_endpoint(self) -> Host:
        for key in (*REMOTE_ONLY, "port", "gpus", "work_dir", "environment", "slots"):
            if key in self.model_fields_set and getattr(self, key) is not None:
                raise Wrong(key, getattr(self, key), "nobody logs in to an endpoint: remove this key, or add `address`")
        if self.runner.kind != "none":
            raise Wrong("runner", self.runner.kind, "no job runs at an endpoint: remove this key, or add `address`")
        if len(expand(self.name)) > 1:
            raise Wrong("name", self.name, "stands for many and the endpoint is one: describe them one by one")
        return self

    @model_validator(mode="before")
    @classmethod
    def _no_jobs_at_an_endpoint(cls, data: object) -> object:
        if isinstance(data, Mapping) and is_only_endpoint(data) and "runner" not in data:
            return {**data, "runner": {"kind": "none"}}
        return data

    def each(self) -> Iterator[Host]:
        """The hosts that this entry of a file stands for."""
        names = expand(self.name)
        addresses = expand(self.address) if self.address else [None] * len(names)
        for name, address in zip(names, addresses, strict=True):
            yield self.model_copy(update={"name": name, "address": address})

    @property
    def only_endpoint(self) -> bool:
        """Whether it is nothing but a server that load can be sent to: no machine to log in to, no job runs there."""
        return self.endpoint is not None and not self.local and self.address is None

    @property
    def via(self) -> Host | None:
        """The jump host, where there is one."""
        return self._via

    @property
    def where(self) -> str:
        """The file that describes it."""
        return self._where

    @property
    def secrets(self) -> frozenset[str]:
        """The names of those variables of its environment that are references."""
        return frozenset(name for name, text in self.environment.items() if REFERENCE.match(text))

    @property
    def gpu_count(self) -> int:
        """How many GPUs it has, of all kinds."""
        return sum(gpu.count for gpu in self.gpus)

    def resolved_environment(self, where: str | Path | None = None, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        """Its environment with every reference replaced by what it stands for: for the job alone, never for a log.

        Raises:
            InputError: a reference leads nowhere.
        """
        key = f"{self.name}.environment"
        return {name: resolve(text, where or self.where, f"{key}.{name}", environ) for name, text in self.environment.items()}
