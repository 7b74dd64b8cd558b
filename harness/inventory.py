"""The hosts that experiments run on: `hosts/*.yaml`, checked before anything connects anywhere.

    from harness.inventory import load_inventory
    host = load_inventory(Path("hosts/local.yaml")).host("local")

A file may describe many hosts at once (`node[01-12]`), give all of them the same settings (`defaults`), put them in groups
and take in other files (`include`); what `load_inventory` gives has none of that left, only hosts with a name each.

This module only reads: nothing here opens a connection. hosts/README.md explains every key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from harness.host import (
    REMOTE_ONLY,
    Container,
    Gpu,
    Host,
    Name,
    Runner,
    Value,
    Variable,
    Venv,
    is_only_endpoint,
    public_key,
)
from harness.ranges import RangeError, expand
from harness.references import refuse_secrets
from harness.safe_yaml import read_mapping
from harness.validation import Model, Wrong, suggest, validate
from systems.registry import InputError

__all__ = [
    "Container",
    "Gpu",
    "Host",
    "Inventory",
    "Name",
    "Value",
    "Variable",
    "Venv",
    "keys_file",
    "load_inventory",
    "read_keys",
]

KEYS_SUFFIX = ".keys"
"""`hosts/lab.keys` holds the pinned keys of the hosts of `hosts/lab.yaml`, a line `name kind base64` each."""


class Defaults(Model):
    """What every host of a file has, unless it says otherwise."""

    user: str | None = None
    """Who to log in as."""
    port: int | None = None
    """Of the SSH server."""
    key_file: str | None = None
    """The private key to log in with."""
    jump: str | None = None
    """The host that the way leads through; not for that host itself."""
    gpus: tuple[Gpu, ...] | None = None
    """The GPUs of each."""
    work_dir: str | None = None
    """Where the project's files go."""
    runner: Runner | None = None
    """How jobs run."""
    environment: Mapping[str, Any] | None = None
    """Variables for jobs."""
    tags: tuple[str, ...] | None = None
    """Words by which experiments choose hosts."""
    placeholder: bool | None = None
    """Whether these hosts only show what hosts would look like."""


class Inventory(Model):
    """A file under `hosts/`: the machines of one testbed."""

    include: tuple[str, ...] = ()
    """Further files, relative to this one, whose hosts and groups belong to this inventory too."""
    defaults: Defaults = Defaults()
    """What every host of this file has, unless it says otherwise."""
    hosts: tuple[Host, ...] = ()
    """The machines, each with a name of its own."""
    groups: Mapping[Name, tuple[str, ...]] = {}
    """Groups of hosts: names, ranges such as `node[01-04]`, and other groups."""

    @model_validator(mode="after")
    def _something(self) -> Inventory:
        if not self.hosts and not self.include:
            raise Wrong("hosts", "(none)", "describe a host, or include a file that does")
        return self

    @property
    def workers(self) -> tuple[Host, ...]:
        """The hosts on which jobs can run: all but those that are only passed through."""
        return tuple(host for host in self.hosts if host.runner.kind != "none")

    def host(self, name: str) -> Host:
        """The host called `name`. Raises InputError when there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise InputError("hosts", "name", name, f"use one of {', '.join(host.name for host in self.hosts)}")

    def tagged(self, *tags: str) -> tuple[Host, ...]:
        """The hosts that carry every one of `tags`, in the order of the file."""
        return tuple(host for host in self.hosts if set(tags) <= set(host.tags))

    def group(self, name: str) -> tuple[Host, ...]:
        """The hosts of the group `name`, in the order that it lists them. Raises InputError when there is none."""
        if name not in self.groups:
            raise InputError("hosts", "groups", name, "unknown group" + suggest(name, sorted(self.groups)))
        return tuple(self.host(member) for member in self.groups[name])

    def select(self, *words: str) -> tuple[Host, ...]:
        """The hosts that `words` mean, each a host, a range, a group or a tag; all of them without any word.

        Raises:
            InputError: a word means nothing.
        """
        found: dict[str, Host] = {}
        for word in words:
            for host in self._meant(word):
                found[host.name] = host
        return tuple(found.values()) if words else self.hosts

    def _meant(self, word: str) -> Sequence[Host]:
        if word in self.groups:
            return self.group(word)
        known = {host.name: host for host in self.hosts}
        names = _members(word)
        if all(name in known for name in names):
            return [known[name] for name in names]
        if tagged := self.tagged(word):
            return tagged
        near = suggest(word, sorted({*known, *self.groups, *(tag for host in self.hosts for tag in host.tags)}))
        raise InputError("hosts", "name", word, "no host, group or tag of this name" + near)


def _members(text: str) -> list[str]:
    try:
        return expand(text)
    except RangeError:
        return [text]


def load_inventory(path: Path) -> Inventory:
    """The inventory in the file `path` and in those that it includes: ranges expanded, defaults and pinned keys applied.

    Raises:
        InputError: a file cannot be read, holds a secret, an unknown key, or a value that cannot be.
    """
    said = _File.read(path, ())
    hosts = _with_jumps(said.hosts)
    groups = {name: _flat(name, said.groups, {host.name for host in hosts}, ()) for name in said.groups}
    return Inventory(hosts=hosts, groups=groups)


class _File:
    """One file and those that it includes, on the way to an inventory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hosts: list[Host] = []
        self.groups: dict[str, tuple[str, Sequence[str]]] = {}

    @classmethod
    def read(cls, path: Path, within: tuple[Path, ...]) -> _File:
        if path.resolve() in within:
            raise InputError(path, "include", str(path), "includes itself: remove it")
        data = read_mapping(path)
        refuse_secrets(data, path)  # first, so that no other message can show one
        if isinstance(data.get("defaults"), Mapping):
            validate(Inventory, {"hosts": [{"name": "x", "local": True}], "defaults": data["defaults"]}, path)
        told = validate(Inventory, _with_defaults(data), path)
        self = cls(path)
        for name in told.include:
            self._take(cls.read(path.parent / name, (*within, path.resolve())))
        keys = read_keys(keys_file(path))
        self._add([_placed(host, keys, path) for entry in told.hosts for host in entry.each()], _entry_places(told.hosts))
        self._group(told.groups)
        return self

    def _take(self, other: _File) -> None:
        self._add(other.hosts, ["include"] * len(other.hosts))
        for name, (where, members) in other.groups.items():
            self._new_group(name, where, members)

    def _add(self, hosts: Sequence[Host], places: Sequence[str]) -> None:
        taken = {host.name for host in self.hosts}
        for host, place in zip(hosts, places, strict=True):
            if host.name in taken:
                raise InputError(self.path, f"{place}.name", host.name, "another host has this name: give each its own")
            taken.add(host.name)
            self.hosts.append(host)

    def _group(self, groups: Mapping[str, Sequence[str]]) -> None:
        for name, members in groups.items():
            self._new_group(name, str(self.path), members)

    def _new_group(self, name: str, where: str, members: Sequence[str]) -> None:
        if name in self.groups:
            raise InputError(where, f"groups.{name}", list(members), "another file has a group of this name: rename one")
        if name in {host.name for host in self.hosts}:
            raise InputError(where, f"groups.{name}", list(members), "a host has this name: rename one")
        self.groups[name] = (where, members)


def _entry_places(entries: Sequence[Host]) -> list[str]:
    return [f"hosts.{place}" for place, entry in enumerate(entries) for _ in expand(entry.name)]


def _with_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with its defaults written into each of its hosts; a local host takes no part in how others are reached."""
    defaults, hosts = data.get("defaults"), data.get("hosts")
    if not isinstance(defaults, Mapping) or not isinstance(hosts, list):
        return dict(data)
    return {**data, "hosts": [_filled(host, defaults) if isinstance(host, Mapping) else host for host in hosts]}


def _filled(host: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    left_out = {*REMOTE_ONLY, "port"} if host.get("local") is True else set()
    if is_only_endpoint(host):
        left_out = set(defaults) - {"tags", "placeholder"}
    if defaults.get("jump") == host.get("name"):
        left_out.add("jump")
    return {**{key: value for key, value in defaults.items() if key not in left_out}, **host}


def _placed(host: Host, keys: Mapping[str, str], path: Path) -> Host:
    key = host.host_key or (None if host.local else keys.get(host.name))
    placed = host.model_copy(update={"host_key": key})
    placed._where = str(path)
    return placed


def _with_jumps(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """`hosts`, each knowing the host that the way to it leads through."""
    known = {host.name: host for host in hosts}
    return tuple(_reached(host, known, ()) for host in hosts)


def _reached(host: Host, known: Mapping[str, Host], before: tuple[str, ...]) -> Host:
    if host.jump is None:
        return host
    if host.jump in (*before, host.name):
        raise InputError(host.where, f"{host.name}.jump", host.jump, "the way leads in a circle: name another host")
    if host.jump not in known or known[host.jump].local:
        remote = sorted(name for name, other in known.items() if not other.local and name != host.name)
        raise InputError(host.where, f"{host.name}.jump", host.jump, "no such host" + suggest(host.jump, remote))
    reached = host.model_copy()
    reached._where = host.where
    reached._via = _reached(known[host.jump], known, (*before, host.name))
    return reached


def _flat(
    name: str, groups: Mapping[str, tuple[str, Sequence[str]]], known: set[str], within: tuple[str, ...]
) -> tuple[str, ...]:
    """The hosts of the group `name`, groups in it and ranges expanded."""
    where, members = groups[name]
    if name in within:
        raise InputError(where, f"groups.{name}", list(members), "contains itself: remove it")
    found: dict[str, None] = {}
    for member in members:
        if member in groups:
            found |= dict.fromkeys(_flat(member, groups, known, (*within, name)))
            continue
        for host in _members(member):
            if host not in known:
                near = suggest(host, sorted(known | groups.keys()))
                raise InputError(where, f"groups.{name}", member, "no host or group of this name" + near)
            found[host] = None
    return tuple(found)


def keys_file(inventory: Path) -> Path:
    """The file beside `inventory` in which `trust` records the keys of its hosts."""
    return inventory.with_suffix(KEYS_SUFFIX)


def read_keys(path: Path) -> dict[str, str]:
    """The pinned keys in the file `path`, by host; none when there is no such file.

    Raises:
        InputError: a line of it is no `name kind base64`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "file", str(error), "make it a readable text file (UTF-8)") from error
    keys = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            name, _, key = line.strip().partition(" ")
            try:
                keys[name] = public_key(key)
            except ValueError as error:
                raise InputError(path, f"line {number}", name, str(error)) from None
    return keys
