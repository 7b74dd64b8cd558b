"""What an experiment consists of: roles, each a command at a place, with a way to see that it is ready.

In `argv` and in the values of `env` stand, between braces, the ports that are chosen when the roles start: `{port.http}` is
the role's own port called `http`, `{replica0.http}` is where others reach the one of the role `replica0` (`10.0.0.7:40001`),
`{replica0.address}` and `{replica0.http.port}` are its parts. Braces around anything else stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.launch.places import Here, Place
from systems.registry import InputError

READY_S = 120.0
"""How long a role may take to become ready: large models load, graphs are captured."""
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_WORD = re.compile(r"\{(?P<role>[a-z][a-z0-9_-]*)\.(?P<port>[a-z][a-z0-9_]*)(?P<part>\.port)?\}")


@dataclass(frozen=True, slots=True)
class Tcp:
    """Ready when its port of this name accepts a connection."""

    port: str
    limit_s: float = READY_S
    every_s: float = 0.1

    def told(self, ports: Mapping[str, int]) -> dict[str, Any]:
        """As the leash takes it."""
        return {"kind": "tcp", "address": "127.0.0.1", "port": ports[self.port], **_times(self)}


@dataclass(frozen=True, slots=True)
class Http:
    """Ready when it answers a GET of `path` on its port of this name with a status below 400."""

    port: str
    path: str = "/health"
    limit_s: float = READY_S
    every_s: float = 0.1

    def told(self, ports: Mapping[str, int]) -> dict[str, Any]:
        """As the leash takes it."""
        return {"kind": "http", "url": f"http://127.0.0.1:{ports[self.port]}{self.path}", **_times(self)}


@dataclass(frozen=True, slots=True)
class File:
    """Ready when the file `path` of its folder is there."""

    path: str
    limit_s: float = READY_S
    every_s: float = 0.1

    def told(self, ports: Mapping[str, int]) -> dict[str, Any]:
        """As the leash takes it."""
        return {"kind": "file", "path": self.path, **_times(self)}


@dataclass(frozen=True, slots=True)
class LogLine:
    """Ready when it prints a line in which the regular expression `pattern` is found."""

    pattern: str
    limit_s: float = READY_S
    every_s: float = 0.1

    def told(self, ports: Mapping[str, int]) -> dict[str, Any]:
        """As the leash takes it."""
        return {"kind": "log", "pattern": self.pattern, **_times(self)}


Probe = Tcp | Http | File | LogLine


def _times(probe: Probe) -> dict[str, float]:
    return {"limit_s": probe.limit_s, "every_s": probe.every_s}


@dataclass(frozen=True, slots=True)
class Role:
    """One process of an experiment.

    Args:
        name: as others call it, such as `replica0`.
        argv: the command, one word each.
        host: the place where it runs.
        env: variables on top of the place's.
        ports: names of ports that are found free for it.
        ready: how to see that it is ready; without it, as soon as it has started.
        needs: roles that must be ready before it starts.
        collect: patterns of files in its folder that are results.
        cwd: the folder that it runs in, else its own.
        lasts: whether it has to run until the launch ends; a role that does not may end with status 0.
    """

    name: str
    argv: tuple[str, ...]
    host: Place = field(default_factory=Here)
    env: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[str, ...] = ()
    ready: Probe | None = None
    needs: tuple[str, ...] = ()
    collect: tuple[str, ...] = ()
    cwd: str = "."
    lasts: bool = True


def waves(roles: Sequence[Role]) -> list[list[Role]]:
    """The roles in the order in which they start: those of one wave side by side, after all earlier ones are ready.

    Raises:
        InputError: two roles have one name, one needs something that is no role, or they need each other in a circle.
    """
    _check(roles)
    found: list[list[Role]] = []
    started: set[str] = set()
    while left := [role for role in roles if role.name not in started]:
        wave = [role for role in left if set(role.needs) <= started]
        if not wave:
            names = ", ".join(role.name for role in left)
            raise InputError("roles", "needs", names, "they need each other in a circle: take one need away")
        found.append(wave)
        started.update(role.name for role in wave)
    return found


def _check(roles: Sequence[Role]) -> None:
    names = [role.name for role in roles]
    for role in roles:
        if not _NAME.fullmatch(role.name) or role.name == "port" or names.count(role.name) > 1:
            raise InputError("roles", "name", role.name, "give each role a name of its own, such as replica0")
        if not role.argv:
            raise InputError(f"role {role.name}", "argv", "(empty)", "say what to run")
        for need in role.needs:
            if need not in names:
                raise InputError(f"role {role.name}", "needs", need, f"use one of {', '.join(names)}")
        if isinstance(role.ready, Tcp | Http) and role.ready.port not in role.ports:
            raise InputError(f"role {role.name}", "ready.port", role.ready.port, "add it to `ports`")


Ports = Mapping[str, tuple[str, Mapping[str, int]]]
"""For every role its address and its ports."""


def filled(text: str, role: Role, known: Ports) -> str:
    """`text` of `role` with what stands between braces replaced. Raises InputError for a port that there is not."""

    def replaced(found: re.Match[str]) -> str:
        whose = role.name if found["role"] == "port" else found["role"]
        if whose not in known:
            return found[0]  # not ours
        address, ports = known[whose]
        if found["port"] == "address" and not found["part"]:
            return address
        if found["port"] not in ports:
            has = ", ".join(sorted(ports)) or "none"
            raise InputError(f"role {role.name}", "argv", found[0], f"{whose} has no such port (it has: {has})")
        port = ports[found["port"]]
        return str(port) if found["part"] or found["role"] == "port" else f"{address}:{port}"

    return _WORD.sub(replaced, text)
