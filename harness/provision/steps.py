"""What is done on one host, step by step; each step says what it did, or nothing when there was nothing to do."""

from __future__ import annotations

import hashlib
import json
import math
import os
import posixpath
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import environment
from harness.inventory import Host
from harness.provision import code, facts, image, smoke, wheelhouse
from harness.provision.code import Cargo
from harness.provision.far import Far, State, StepError
from harness.provision.layout import STEPS, Layout
from harness.remote import CommandFailedError, CommandTimeoutError, Timing, connect
from harness.remote.errors import one_line

Say = Callable[[str], None]
LOCK = "requirements.lock"
ENVIRONMENT_S, SMOKE_S, PROBE_S = 1800.0, 300.0, 15.0
KIND = "runtime"
# $1: a package index; 0 when it answers. urllib heeds the variables for proxies, as pip does.
_PROBE = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5).close()"
_INDEX = "https://pypi.org/simple/pip/"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted of every host: the files, the numbers of the smoke trial, where facts go, and the last step."""

    cargo: Cargo
    metrics: Callable[[], str]
    results: Path
    until: str = STEPS[-1]
    wheels: Callable[[Path], Path] = wheelhouse.ensure
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True, slots=True)
class Done:
    """A host on which all steps went well: what had to be done, and how long that took."""

    changes: tuple[str, ...]
    notes: tuple[str, ...]
    took_s: float
    until: str

    @property
    def line(self) -> str:
        """In one line."""
        state = "ready" if self.until == STEPS[-1] else f"done up to {self.until}"
        what = "; ".join(self.changes) or "nothing to do"
        return f"{state}: {what} ({self.took_s:.1f} s)" + "".join(f"; note: {note}" for note in self.notes)


def provision(host: Host, plan: Plan, say: Say) -> Done:
    """Make `host` ready.

    Raises:
        RemoteError: a step failed; what was done before it stays, and the next run goes on from there.
    """
    began = time.monotonic()
    if host.local:
        return Done((), (), 0.0, STEPS[-1])
    with connect(host, timing=plan.timing) as remote:
        run = Run(Far(remote), plan, say)
        run.all()
    return Done(tuple(run.changes), tuple(run.notes), time.monotonic() - began, plan.until)


class Run:
    """One host being provisioned."""

    def __init__(self, far: Far, plan: Plan, say: Say) -> None:
        self.far, self.plan, self.say = far, plan, say
        self.host: Host = far.host
        self.layout: Layout = far.layout
        self.changes: list[str] = []
        self.notes: list[str] = []
        self.facts: facts.Facts
        self.state: State

    def all(self) -> None:
        """Every step up to the last one wanted."""
        steps: Mapping[str, Callable[[], None]] = {"sync": self.sync, "environment": self.runner, "smoke": self.smoke}
        self.look()
        wanted = STEPS[1 : STEPS.index(self.plan.until) + 1]
        if not wanted:
            return
        if not self._current():
            with self.far.alone():
                for step in wanted:
                    steps[step]()

    # -- facts -------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Reach the host's work folder, gather its facts and judge them."""
        answer = self.far.ask(make=True)
        self.facts, self.state = answer.facts, State.of(answer)
        if answer.taken and answer.state is None:
            mend = "name another work_dir, or remove that folder there"
            raise StepError(self.host.name, f"{self.layout.checkout} is there and not ours", mend)
        for what, mend in facts.problems(self.host, self.facts, needs_space="environment" not in self.state.keys):
            raise StepError(self.host.name, what, mend)
        self.notes += facts.notes(self.facts)
        if facts.keep(self.plan.results, self.host, self.facts):
            self.changes.append("facts written")

    def _current(self) -> bool:
        """Whether the host says that all is done, and its files bear that out: then it need not be locked."""
        keys = self.state.keys
        if self.host.runner.kind != "venv":
            return False  # whether it still has its image, its engine must be asked
        done = {"sync": self.plan.cargo.digest, "environment": self._environment_key(), "smoke": self._smoke_key()}
        if any(keys.get(step) != key for step, key in done.items()):
            return False
        wanted = {**{name: file.sha256 for name, file in self.plan.cargo.files.items()}, **self._marker()}
        return not code.differing(wanted, self.far.digests(list(wanted)))

    def _keep(self, step: str, key: str) -> None:
        self.state.keys[step] = key
        self.far.keep(self.state)

    def _begin(self, step: str) -> None:
        """From now on, until it is done, `step` and what comes after it do not count as done."""
        for later in STEPS[STEPS.index(step) :]:
            self.state.keys.pop(later, None)
        self.far.keep(self.state)

    # -- sync --------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """The project's files and the datasets: what differs is sent, what is no longer ours is removed."""
        cargo = self.plan.cargo
        wanted = {name: file.sha256 for name, file in cargo.files.items()}
        send = code.differing(wanted, self.far.digests(list(wanted)))
        drop = sorted(self.state.files.keys() - wanted.keys())
        if send or drop or self.state.keys.get("sync") != cargo.digest:
            self.state.files = {**self.state.files, **wanted}  # before they are there: what is cut off half-way is ours too
            self._begin("sync")
            if send:
                self.say(f"sending {len(send)} files")
                self.far.place({name: cargo.files[name] for name in send})
            if drop:
                self.far.delete(drop)
            self.state.files = wanted
            self._keep("sync", cargo.digest)
            self.changes.append(f"{len(send)} files sent" + (f", {len(drop)} removed" if drop else ""))

    # -- environment or image ----------------------------------------------------------------------------------------

    def runner(self) -> None:
        """What jobs run in."""
        if self.host.runner.kind == "container":
            self._image()
        else:
            self._environment()

    def _marker(self) -> dict[str, str]:
        """The digest of the file that a complete environment has."""
        path = f"checkout/.venv/{environment.READY}{KIND}"
        return {path: hashlib.sha256(f"{self._environment_key()}\n".encode()).hexdigest()}

    def _environment_key(self) -> str:
        """As harness.environment reckons it on the host."""
        lock = self.plan.cargo.read(LOCK)
        return hashlib.sha256(lock + b"\0" + os.fsencode(self.layout.checkout)).hexdigest()

    def _environment(self) -> None:
        """The virtual environment, from the lock file; from this machine's wheels where the host has no network."""
        key, marker = self._environment_key(), self._marker()
        whole = not code.differing(marker, self.far.digests(list(marker)))
        if whole and self.state.keys.get("environment") == key:
            return
        self._begin("environment")
        if not whole:
            began = time.monotonic()
            self._install(self.host.resolved_environment())
            self.changes.append(f"environment made in {time.monotonic() - began:.0f} s")
        self._keep("environment", key)

    def _install(self, variables: Mapping[str, str]) -> None:
        python = self.facts.python
        assert python is not None
        offline = {} if self._online(python.path, variables) else self._bring_wheels(python)
        self.say("making the environment" + (" from wheels" if offline else ""))
        command = [python.path, "-I", "harness/environment.py", KIND]
        try:
            self._do(command, {**variables, **offline}, ENVIRONMENT_S, "environment")
        finally:
            if offline:
                self.far.remove(self.layout.wheels)

    def _online(self, python: str, variables: Mapping[str, str]) -> bool:
        """Whether the host reaches the package index that pip would ask."""
        index = variables.get("PIP_INDEX_URL", _INDEX)
        try:
            told = self.far.remote.run([python, "-c", _PROBE, index], env=variables, timeout_s=PROBE_S, check=False)
        except CommandTimeoutError:
            return False
        return told.returncode == 0

    def _bring_wheels(self, python: facts.Python) -> dict[str, str]:
        here, there = wheelhouse.here(), (".".join(map(str, python.minor)), self.facts.machine)
        if there != here:
            mend = f"give it a network, or Python {here[0]} on {here[1]} as on this machine"
            what = f"it has no network, and packages for Python {there[0]} on {there[1]} cannot be had here"
            raise StepError(self.host.name, what, mend)
        self.say("no network there: packages are taken from this machine")
        folder = self.plan.wheels(self.plan.cargo.root / LOCK)
        self.say("sending packages")
        self.far.remote.put_tree(folder, self.layout.wheels)
        return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.layout.wheels, "PIP_CONFIG_FILE": "/dev/null"}

    def _image(self) -> None:
        assert self.host.runner.kind == "container"
        name = self.host.runner.image
        key = f"{name} {image.ensure(self.far.remote, self.host, self.facts.engines[0], self.say)}"
        if self.state.keys.get("environment") != key:
            self._begin("environment")
            self._keep("environment", key)
            self.changes.append(f"image {name} is there")

    # -- smoke -------------------------------------------------------------------------------------------------------

    def _smoke_key(self) -> str:
        return f"{smoke.key()} {self.state.keys.get('environment', '')} {self.state.keys.get('sync', '')}"

    def smoke(self) -> None:
        """The smallest trial there must give what it gives here."""
        if self.state.keys.get("smoke") == self._smoke_key():
            return
        if self.host.runner.kind != "venv":
            self._keep("smoke", self._smoke_key())  # nothing to try outside; what runs a container reports what it lacks
            return
        self.say("running the smoke trial")
        out = self._do([self.layout.python, "-m", "harness.provision.smoke"], {}, SMOKE_S, "smoke trial", aloud=False)
        if differ := _differences(out, self.plan.metrics()):
            mend = "its numbers cannot be compared with this machine's: is it another kind of machine?"
            raise StepError(self.host.name, f"smoke trial: {differ}", mend)
        self._keep("smoke", self._smoke_key())
        self.changes.append("smoke trial as here")

    def _do(
        self, command: Sequence[str], variables: Mapping[str, str], timeout_s: float, what: str, *, aloud: bool = True
    ) -> str:
        """Run a command in the checkout; what it printed."""
        try:
            told = self.far.remote.run(
                command, env=variables, cwd=self.layout.checkout, timeout_s=timeout_s, on_line=self.say if aloud else None
            )
        except CommandFailedError as error:
            said = (error.stderr.strip() or error.what).splitlines()[-1]
            raise StepError(self.host.name, f"{what}: {one_line(said)}", "see above what it said, then run again") from error
        return told.stdout


def _differences(there: str, here: str) -> str:
    try:
        far, near = json.loads(there), json.loads(here)
    except ValueError:
        return "it printed no metrics"
    names = [name for name in sorted(far.keys() | near.keys()) if not _same(far.get(name), near.get(name))]
    return f"{names[0]} is {far.get(names[0])!r} there and {near.get(names[0])!r} here" if names else ""


def _same(there: object, here: object) -> bool:
    """Equal, but for what another processor's arithmetic may change in the last digits."""
    if isinstance(there, float) and isinstance(here, float):
        return math.isclose(there, here, rel_tol=1e-9)
    return there == here


def deprovision(host: Host, results: Path, timing: Timing | None = None) -> str:
    """Remove all that `provision` made on the host, and its facts here; what was done, in a few words.

    Raises:
        RemoteError: the host cannot be reached, or files there cannot be removed.
    """
    facts.facts_file(results, host.name).unlink(missing_ok=True)
    if host.local:
        return "this machine: nothing to remove"
    with connect(host, timing=timing) as remote:
        far = Far(remote)
        answer = far.ask(make=False)
        if answer.state is None:
            return "nothing to remove"
        with far.alone():
            left = far.unmake(State.of(answer))
    if left:
        return f"removed; {posixpath.basename(far.layout.root)} stays, for others left {', '.join(left[:3])} in it"
    return "removed"
