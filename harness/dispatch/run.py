"""The way of one job to one host and back, and from a host that fails to the next."""

from __future__ import annotations

import codecs
import contextlib
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import provenance
from harness.cli import UNUSABLE
from harness.code_version import ROOT
from harness.config import config_from_json
from harness.dispatch import slots
from harness.dispatch.cargo import Cargo, cargo_of
from harness.dispatch.job import Job, environment
from harness.figure_file import load_figure
from harness.inventory import Container, Host
from harness.launch.errors import RoleLostError
from harness.launch.leashed import Command, Leashed, Plan, Ready
from harness.launch.places import Contained, Here, Over, Place
from harness.launch.staging import Staging
from harness.provision import facts
from harness.provision.layout import Layout
from systems.registry import InputError

ATTEMPTS = 4
"""So many hosts, or times, a job is tried before it is given up."""
_BUSY_S = 1.0
_AGAIN_S = 2.0
_INSIDE = "/fivefold"
_SILENCE_S = 10.0
_GRACE_S = 5.0
_FULL_BYTES = 16 << 20
"""With less than this on its disk, a host on which a job gave up is taken to be the reason."""


class Busy(Exception):  # noqa: N818
    """Another controller has all slots of the host."""


class NotReady(InputError):  # noqa: N818
    """The host lacks what a job needs."""


class HostFailed(Exception):  # noqa: N818
    """`host` could not do it, for the reason of `error`."""

    def __init__(self, host: Host, error: InputError) -> None:
        super().__init__(str(error))
        self.host, self.error = host, error


@dataclass(frozen=True, slots=True)
class Site:
    """A host as a place for jobs: where its Python and its work folder are, as the job sees them."""

    host: Host
    place: Place
    python: str
    work_dir: str


def site_of(host: Host) -> Site:
    """How jobs run on `host`."""
    outside: Place = Here() if host.local else Over(host)
    if isinstance(host.runner, Container):
        engine = host.environment.get("FIVEFOLD_ENGINE", "docker")
        place = Contained(host.runner.image, outside, engine, {host.work_dir: _INSIDE}, network="none", folder=_INSIDE)
        return Site(host, place, "python3", _INSIDE)
    if host.local:
        return Site(host, outside, sys.executable, host.work_dir)
    return Site(host, outside, Layout(host.work_dir).python, host.work_dir)


def run_anywhere(job: Job, hosts: Sequence[Host], where: Path, per_host: int, say: Callable[[str], None]) -> int:
    """Run `job` on one of `hosts`, and on another when that one fails; its exit status.

    Args:
        job: what to run.
        hosts: those that may take it.
        where: the inventory that describes them, for messages.
        per_host: how many jobs a host takes at once, where it doesn't say.
        say: is told what the user should know.

    Raises:
        InputError: no host is ready for it, or all that it was tried on failed.
    """
    cargo = cargo_of(job, controller())
    failed: dict[str, InputError] = {}
    pause = threading.Event()
    for attempt in range(ATTEMPTS):
        able = [host for host in hosts if not isinstance(failed.get(host.name), NotReady)]
        fresh = [host for host in able if host.name not in failed]
        if not able:
            break
        if not fresh:
            pause.wait(_AGAIN_S * attempt)  # all have failed once: they get another chance
        try:
            host, status = _on_one(cargo, fresh or able, where, per_host, say)
        except HostFailed as failure:
            failed[failure.host.name] = failure.error
            say(f"{failure.error}; what it had finished is kept")
            continue
        _salvage(cargo, [other for other in hosts if other.name in failed and other is not host], where)
        return status
    reasons = "; ".join(map(str, failed.values()))
    raise InputError(where, "hosts", ", ".join(failed), f"none could finish {job.out.stem}: mend one and run again ({reasons})")


def able(job: Job, hosts: Sequence[Host], where: Path) -> Sequence[Host]:
    """Those of `hosts` that have the GPUs of the job's testbed, where it is measured; else all.

    Raises:
        InputError: none has them.
    """
    config = config_from_json(job.config)
    if config.backend != "measured":
        return hosts
    testbed = config.testbed(load_figure(job.figure).testbed)
    model, _, count = testbed.rpartition("x")
    found = [host for host in hosts if sum(gpu.count for gpu in host.gpus if gpu.model == model) >= int(count)]
    if not found:
        mend = "no host has these GPUs: add one, or run on what there is with --config hardware=<gpu>x<count>"
        raise InputError(where, "gpus", testbed, mend)
    return found


def _on_one(cargo: Cargo, hosts: Sequence[Host], where: Path, per_host: int, say: Callable[[str], None]) -> tuple[Host, int]:
    pause = threading.Event()
    while True:
        with slots.taken(hosts, per_host, say) as host:
            try:
                return host, _Visit(cargo, site_of(host), where, slots.count_of(host, per_host)).run()
            except Busy:
                pass
            except InputError as error:
                raise HostFailed(host, error) from error
        pause.wait(_BUSY_S)


@dataclass(slots=True)
class _Visit:
    """One job at one host."""

    cargo: Cargo
    site: Site
    where: Path
    slots: int
    _decoders: Mapping[bool, codecs.IncrementalDecoder] = field(
        default_factory=lambda: {err: codecs.getincrementaldecoder("utf-8")("replace") for err in (False, True)}
    )

    def run(self) -> int:
        """The exit status of the job. Raises Busy, NotReady, or another InputError where the host fails."""
        leash = self._connect()
        done = False
        try:
            status = self._run(leash)
            done = True
            return status
        finally:
            leash.close(clean=done)

    def _connect(self) -> Leashed:
        staging = Staging(self.cargo.job.results, self.cargo.publish)
        try:
            return Leashed(self.cargo.job.out.stem, self.site.place, self._say, staging)
        except OSError as error:
            staging.close()
            raise RoleLostError(self.site.host.name, f"cannot start: {error}", "install what is missing") from error

    def _run(self, leash: Leashed) -> int:
        ready = self._prepare(leash)
        self._welcome_back(leash, ready)
        self.cargo.send(leash, ready.found, ready.folder)
        python = self.site.python.replace(self.site.work_dir, ready.folder, 1)
        known = facts.read(self.cargo.job.results, self.site.host.name)
        env = environment(ready.folder, self.cargo.code, commit(), self.site.place.environment, known)
        argv = self.cargo.job.argv(python)
        leash.run(Command(argv, env, self.cargo.folder, collect=self.cargo.comes_back))
        leash.wait()
        if leash.failure is not None:
            raise leash.failure
        assert leash.code is not None
        if leash.code == UNUSABLE and leash.free_bytes < _FULL_BYTES and not self.site.host.local:
            raise RoleLostError(leash.name, "could not go on: the disk there is full", "free some space there")
        return leash.code if leash.code >= 0 else 128 - leash.code

    def _prepare(self, leash: Leashed) -> Ready:
        site = self.site
        ready = leash.prepare(
            Plan(
                site.work_dir,
                slots={"folder": f"{site.work_dir}/slots", "count": self.slots},
                list=self.cargo.compared,
                names=self.cargo.named,
                required=(site.python,) if "/" in site.python else (),
                clean=self.cargo.folder,
                silence_s=site.place.silence_s,
                grace_s=_GRACE_S,
            )
        )
        if ready.missing:
            mend = f"run snakemake provision --config inventory={self.where}"
            raise NotReady(site.host.name, "is not ready: missing", ", ".join(ready.missing), mend)
        if ready.slot is None:
            raise Busy
        return ready

    def _welcome_back(self, leash: Leashed, ready: Ready) -> None:
        """Take the trials that an earlier run there finished and could not bring home."""
        left = self.cargo.left_behind(ready.found)
        if left:
            leash.fetch(left)

    def _say(self, data: bytes, error: bool) -> None:
        stream = sys.stderr if error else sys.stdout
        stream.write(self._decoders[error].decode(data))
        stream.flush()


def _salvage(cargo: Cargo, hosts: Sequence[Host], where: Path) -> None:
    """The job is done elsewhere: take what hosts that failed had finished, where they are back by now, and tidy up there."""
    for host in hosts:
        with contextlib.suppress(InputError, Busy, OSError):
            visit = _Visit(cargo, _in_a_hurry(site_of(host)), where, slots=1 << 10)
            leash = visit._connect()
            try:
                visit._welcome_back(leash, visit._prepare(leash))
            finally:
                leash.close(clean=True)


def _in_a_hurry(site: Site) -> Site:
    if not isinstance(site.place, Over):
        return site
    from harness.remote import Timing

    return Site(site.host, Over(site.host, timing=Timing(connect_s=3.0, attempts=1)), site.python, site.work_dir)


def controller() -> str:
    """This folder on this machine: what tells its jobs on a host apart from those of others."""
    return f"{platform.node()}:{os.path.realpath(Path.cwd())}"


def commit() -> str:
    """The commit of this checkout, for the provenance of trials on hosts that have no git: `<hash>`, with `+` if changed."""
    if told := os.environ.get("FIVEFOLD_COMMIT"):
        return told
    found = provenance.commit(ROOT)
    return f"{found['commit']}{'+' if found['dirty'] is True else ''}"
