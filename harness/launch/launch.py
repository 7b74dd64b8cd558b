"""Starts the roles of an experiment, keeps them on their leashes, and ends them all, however this process ends."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.launch.errors import LAST_LINES, LaunchError, RoleDiedError, RoleLateError
from harness.launch.leashed import Command, Leashed, Plan
from harness.launch.roles import Ports, Role, filled, waves
from harness.launch.staging import Log, Staging, into
from systems.registry import InputError

_TICK_S = 0.1


class _Running:
    """A role with its leash and its log."""

    def __init__(self, role: Role, folder: Path) -> None:
        self.role = role
        self.log = Log(folder / f"{role.name}.log", LAST_LINES)
        self.leash: Leashed | None = None
        self.started = False

    def died(self) -> LaunchError | None:
        """What went wrong with it, as far as is known; a role that does not last may end with status 0."""
        leash = self.leash
        if leash is None or not self.started or not leash.ended.is_set():
            return None
        if leash.failure is not None:
            return leash.failure
        if leash.code == 0 and not self.role.lasts:
            return None
        how = f"signal {-leash.code}" if leash.code is not None and leash.code < 0 else f"exit status {leash.code}"
        return RoleDiedError(leash.name, f"ended too early ({how})", "see its log", self.log.lines())


class Launch:
    """The roles of an experiment, as a context manager: inside, all are ready; outside, nothing of them is left.

        with Launch([server, client], folder) as launch:
            launch.wait("client")

    `folder` gets `<role>.log` and, for roles that collect files, `<role>/`.
    """

    def __init__(self, roles: Sequence[Role], folder: Path, *, grace_s: float = 5.0) -> None:
        """`grace_s` is how long a role has between SIGTERM and SIGKILL.

        Raises:
            InputError: the roles do not fit together.
        """
        self._waves = waves(roles)
        self._folder, self._grace_s = folder, grace_s
        self._ending = False
        self._id = secrets.token_hex(6)
        self._running = {role.name: _Running(role, folder) for role in roles}
        self._ports: dict[str, tuple[str, dict[str, int]]] = {}

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def ports(self) -> Ports:
        """For every role its address and its ports."""
        return self._ports

    def wait(self, *names: str, timeout_s: float | None = None) -> None:
        """Wait until these roles have ended, each with status 0.

        Raises:
            RoleDiedError: one of them ended otherwise, or another role that has to last ended meanwhile.
            RoleLostError: the host of a role is gone.
            RoleLateError: that took longer than `timeout_s`.
        """
        waited = threading.Event()
        left = None if timeout_s is None else timeout_s
        while not all(self._leash(name).ended.is_set() for name in names):
            self._check(but=names)
            waited.wait(_TICK_S)
            left = None if left is None else left - _TICK_S
            if left is not None and left <= 0:
                raise RoleLateError(", ".join(names), f"did not end within {timeout_s:g} s", "see the logs")
        self._check(but=names)
        for name in names:
            leash, running = self._leash(name), self._running[name]
            if leash.code != 0:
                raise running.died() or RoleDiedError(
                    leash.name, f"ended with status {leash.code}", "see its log", running.log.lines()
                )

    def _leash(self, name: str) -> Leashed:
        leash = self._running[name].leash
        assert leash is not None, name
        return leash

    def _check(self, but: Sequence[str] = ()) -> None:
        """Raise what went wrong with any role; those in `but` may end."""
        for name, running in self._running.items():
            error = running.died()
            if error is not None and (name not in but or not isinstance(error, RoleDiedError)):
                raise error

    # -- coming and going ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._side_by_side(self._connect, list(self._running.values()))
            for wave in self._waves:
                self._side_by_side(self._start, [self._running[role.name] for role in wave])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _side_by_side(self, do: Callable[[_Running], None], these: Sequence[_Running]) -> None:
        """`do` for all, to the end; then the first error, if any."""
        with ThreadPoolExecutor(max_workers=max(1, len(these))) as pool:
            done = [pool.submit(do, running) for running in these]
        for future in done:
            future.result()

    def _connect(self, running: _Running) -> None:
        role = running.role
        staging = Staging(self._folder, into(self._folder / role.name)) if role.collect else None
        output = running.log
        try:
            leash = Leashed(role.name, role.host, lambda data, _err: output.write(data), staging)
        except OSError as error:
            what = f"cannot start: {error.filename or ''}: {error.strerror or error}"
            raise LaunchError(f"{role.name} on {role.host.name}", what, "install it, or choose another place") from error
        running.leash = leash
        if self._ending:  # interrupted while it was connecting
            leash.close()
            return
        below = role.host.folder or str((self._folder / "work").resolve())
        folder = f"{below}/{self._id}/{role.name}"
        plan = Plan(folder, role.ports, silence_s=role.host.silence_s, grace_s=self._grace_s)
        self._ports[role.name] = (role.host.address, dict(leash.prepare(plan).ports))

    def _start(self, running: _Running) -> None:
        role, leash = running.role, running.leash
        assert leash is not None
        own = self._ports[role.name][1]
        env = {**role.host.environment, **{k: filled(v, role, self._ports) for k, v in role.env.items()}}
        argv = [filled(word, role, self._ports) for word in role.argv]
        probe = role.ready.told(own) if role.ready else None
        leash.run(Command(argv, env, role.cwd, probe, role.collect))
        running.started = True
        if role.ready:
            self._until_ready(running)

    def _until_ready(self, running: _Running) -> None:
        leash, probe = running.leash, running.role.ready
        assert leash is not None and probe is not None
        while not leash.ready.wait(_TICK_S):
            self._check()
            if leash.ended.is_set():
                raise RoleDiedError(leash.name, "ended before it was ready", "see its log", running.log.lines())
        if leash.late:
            mend = f"see its log, or raise limit_s of its probe {type(probe).__name__}"
            raise RoleLateError(leash.name, f"not ready after {probe.limit_s:g} s", mend, running.log.lines())

    def _end(self) -> None:
        """End everything, those that were started last first; nothing here is given up half-way."""
        self._ending = True
        for wave in reversed(self._waves):
            with contextlib.suppress(InputError):
                self._side_by_side(self._end_one, [self._running[role.name] for role in wave])
        with contextlib.suppress(OSError):  # another launch may use the folder too
            (self._folder / "work").rmdir()

    def _end_one(self, running: _Running) -> None:
        leash = running.leash
        if leash is not None:
            leash.end()
            if running.started:
                leash.wait(self._grace_s + 10.0)
            leash.close(clean=True)
        running.log.close()
