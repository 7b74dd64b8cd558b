"""Makes the project's own Python environment, `.venv`, hold what a lock file says: what `make` does before anything else.

    python3 -I harness/environment.py runtime     # what figures need: requirements.lock
    python3 -I harness/environment.py test        # that and the test tools: requirements-test.lock

Needs Python 3.11 and nothing else, as it runs before anything is installed. An environment is complete when it holds a
marker with the key of its lock file; the marker is written last, and while one is being made another marker says so.
So a run that was cut off half-way is started over, a changed lock file is noticed, and a second run does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

LOCKS: Mapping[str, str] = {"runtime": "requirements.lock", "test": "requirements-test.lock"}
"""What can be asked for, and its lock file. `test` includes `runtime`."""
BUILDING = ".fivefold-building"
READY = ".fivefold-ready-"
VARIABLES_OFF = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
# Importing once writes the byte code of what a figure uses (pip would compile thousands of files that nobody
# imports, 8 s) and proves that the packages work on this machine.
WARM_UP = "import snakemake.cli, snakemake.api, pandas, pyarrow.parquet, pydantic, yaml, jinja2, tqdm, matplotlib.pyplot"


class Step(StrEnum):
    """What has to be done to an environment."""

    NOTHING = "nothing"
    ADD = "add"
    BUILD = "build"


@dataclass(frozen=True, slots=True)
class State:
    """What `.venv` is now: whether it exists and runs, the keys of its markers, and whether its making was cut off."""

    exists: bool
    python: tuple[int, int] | None
    building: bool
    ready: Mapping[str, str]


def step(state: State, kind: str, keys: Mapping[str, str], python: tuple[int, int] | None = None) -> Step:
    """What has to be done so that the environment holds `kind`.

    Args:
        state: the environment now.
        kind: a key of LOCKS.
        keys: the key of each lock file, as it should be.
        python: the version of Python that was asked for; None for any.
    """
    if not state.exists or state.building or state.python is None or (python and state.python != python):
        return Step.BUILD
    if state.ready.get(kind) == keys[kind]:
        return Step.NOTHING
    outdated = any(state.ready[name] != keys[name] for name in state.ready)
    # pip alone would leave behind what an outdated lock file had and the present one has not
    return Step.BUILD if outdated else Step.ADD


def key(root: Path, kind: str) -> str:
    """What determines an environment: its lock file, and its folder (the scripts in an environment name it)."""
    lock = (root / LOCKS[kind]).read_bytes()
    return hashlib.sha256(lock + b"\0" + os.fsencode(root)).hexdigest()


def look(venv: Path) -> State:
    """The state of the environment in the folder `venv`."""
    ready = {kind: (venv / (READY + kind)).read_text().strip() for kind in LOCKS if (venv / (READY + kind)).is_file()}
    return State(venv.exists(), _version(venv / "bin" / "python"), (venv / BUILDING).exists(), ready)


def _version(python: Path) -> tuple[int, int] | None:
    command = [str(python), "-I", "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        words = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return int(words[0]), int(words[1])


class BuildError(Exception):
    """The environment cannot be made; its text is one line with the way to mend it."""


def ensure(root: Path, kind: str, python: tuple[int, int] | None = None) -> Step:
    """Make `root`/.venv hold `kind`; what had to be done for it.

    Two calls at once do not disturb each other: the second waits for the first.

    Raises:
        BuildError: Python lacks `ensurepip`, `.venv` is somebody else's, or pip failed.
    """
    venv = root / ".venv"
    with _alone(root):
        keys = {name: key(root, name) for name in LOCKS}
        state = look(venv)
        todo = step(state, kind, keys, python)
        if todo is Step.NOTHING:
            return todo
        start = time.monotonic()
        if todo is Step.BUILD:
            _new(venv, state)
        (venv / BUILDING).touch()
        _install(root, venv, kind)
        for name in LOCKS if kind == "test" else (kind,):
            (venv / (READY + name)).write_text(keys[name] + "\n")
        (venv / BUILDING).unlink()
        print(f"{venv}: ready in {time.monotonic() - start:.1f} s ({LOCKS[kind]})", flush=True)
        return todo


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of the folder `root` itself, so that no lock file is left lying about.

    Children inherit it: a pip that outlives a killed parent keeps the next run waiting instead of writing beside it.
    """
    handle = os.open(root, os.O_RDONLY)
    os.set_inheritable(handle, True)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{root}: another run makes the environment: waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # some network file systems cannot lock a folder
            pass
        yield
    finally:
        os.close(handle)


def _new(venv: Path, state: State) -> None:
    if state.exists and not (state.building or state.ready):
        raise BuildError(f"{venv}: not made by make and not usable: remove it, or rename it, and run again")
    if importlib.util.find_spec("ensurepip") is None:
        raise BuildError(f"{sys.executable}: has no ensurepip: install it (Debian, Ubuntu: apt-get install python3-venv)")
    print(f"{venv}: making it, with Python {sys.version.split()[0]}: about 165 MB to download, half a minute", flush=True)
    if venv.is_symlink() or venv.is_file():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(venv)
    venv.mkdir()
    (venv / BUILDING).touch()
    # when run by the old environment's Python, which is gone now, its base is still there
    base = getattr(sys, "_base_executable", None) or sys.executable
    _do([base, "-I", "-m", "venv", str(venv)], f"{venv}: venv failed: see above, then run again")


def _install(root: Path, venv: Path, kind: str) -> None:
    python, lock = str(venv / "bin" / "python"), root / LOCKS[kind]
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", "--no-compile"]
    again = "see above (no network? disk full?), then run the same command again"
    _do([*pip, "--no-deps", "--require-hashes", "--requirement", str(lock)], f"{lock.name}: pip failed: {again}")
    (_site_packages(python) / "fivefold.pth").write_text(f"{root}\n")  # makes the project itself importable
    _do([python, "-c", WARM_UP], f"{lock.name}: what was installed does not work here: see above")


def _site_packages(python: str) -> Path:
    command = [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def _do(command: Sequence[str], failure: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES_OFF}
    done = subprocess.run(command, env=environment, check=False, stdin=subprocess.DEVNULL, close_fds=False)
    if done.returncode:
        raise BuildError(failure)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the environment; 0 when it is there, 2 with one line on stderr when it cannot be made."""
    parser = argparse.ArgumentParser(prog="harness/environment.py", description=__doc__)
    parser.add_argument("kind", choices=sorted(LOCKS), help="what it must hold")
    parser.add_argument("--this-python", action="store_true", help="and be of the same version of Python as this one")
    given = parser.parse_args(argv)
    root = Path(__file__).resolve().parent.parent
    try:
        ensure(root, given.kind, sys.version_info[:2] if given.this_python else None)
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again, it starts over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
