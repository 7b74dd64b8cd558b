"""Measured trials in a process of their own: a fault on the GPU or a hang costs one trial, and not those after it.

`Worker` owns the process (`python -m harness.worker`), which keeps what its trials share: models, graphs, other processes. They
speak JSON lines. Finished trials go into the trial store, by the process that ran them; lines only say that they are there.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.code_version import ROOT
from harness.config import config_from_json
from harness.manifest import read_manifests
from harness.orphans import end_with_parent
from harness.trials import Ran, TrialStore, hash_of, store_of
from systems.registry import InputError, Trial, prepare

FAULT = 1


class Fault(Exception):  # noqa: N818
    """A trial that did not come to an end: what happened, in one line."""


def told_of(trial: Trial) -> dict[str, Any]:
    """`trial` as JSON can hold it."""
    return {**asdict(trial), "datasets": {name: path and str(path) for name, path in trial.datasets.items()}}


def trial_of(told: Mapping[str, Any]) -> Trial:
    """The inverse of `told_of`."""
    return Trial(**{**told, "datasets": {name: path and Path(path) for name, path in told["datasets"].items()}})


class Worker:
    """The process, started when it is needed and again after a fault; it ends with `close`, and when we die."""

    def __init__(self, results: Path, config_json: str, manifests: Sequence[Path]) -> None:
        data = [str(path.resolve()) for path in manifests]
        options = ["--results", str(results.resolve()), "--config-json", config_json, "--datasets", *data]
        self._command = [sys.executable, "-m", "harness.worker", *options]
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def prepare(self, trials: Sequence[Trial]) -> None:
        """Say which trials come first."""
        self._send(prepare=[told_of(trial) for trial in trials])

    def run(self, trial: Trial, asked_by: str, limit_s: float) -> None:
        """Run `trial`; when this returns it is in the store.

        Raises:
            InputError: the trial was refused.
            Fault: it failed, its process died, or it took longer than `limit_s`.
        """
        process = self._send(trial=told_of(trial), asked_by=asked_by)
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self.close()
            raise Fault(f"no answer within {limit_s:.0f} s") from None
        if not line:
            code = process.wait()
            self.close()
            raise Fault(f"its process ended with exit code {code}")
        told: dict[str, Any] = json.loads(line)
        if "refused" in told:
            raise InputError(*told["refused"])
        if "failed" in told:
            self.close()
            raise Fault(told["failed"])

    def close(self, patience_s: float = 0.0) -> None:
        """End the process and all that it started, after `patience_s` by force."""
        process, self._process = self._process, None
        if process is None:
            return
        if patience_s and process.stdin is not None:
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                process.stdin.close()
                process.wait(patience_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _send(self, **order: object) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True, cwd=ROOT
            )
            self._lines = queue.Queue()
            threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # that it ended is found out by who waits for its answer
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self._process


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


@dataclass(frozen=True, slots=True)
class WorkedStore(TrialStore):
    """A trial store whose measured trials a worker runs, each for at most `limit_s` seconds."""

    worker: Worker | None = None
    limit_s: float = 90.0

    def run(self, trial: Trial, asked_by: str) -> Ran:
        """See `TrialStore`. Raises Fault besides."""
        if trial.backend != "measured":
            return TrialStore.run(self, trial, asked_by)
        name = hash_of(self.spec(trial))
        stored = self.metrics(name)
        if fresh := stored is None:
            if self.worker is None:
                raise Fault("is not in the store")
            self.worker.run(trial, asked_by, self.limit_s)
            stored = self.metrics(name)
            if stored is None:
                raise Fault("its process stored something else: do both run the same code?")
        return Ran(name, stored, fresh)


def _serve(store: TrialStore) -> None:
    """Do what standard input asks, line by line."""
    out = sys.__stdout__
    assert out is not None

    def say(**told: object) -> None:
        out.write(json.dumps(told) + "\n")
        out.flush()

    for line in sys.stdin:
        told = json.loads(line)
        try:
            if "prepare" in told:
                _prepare([trial_of(one) for one in told["prepare"]])
                continue
            ran = store.run(trial_of(told["trial"]), told["asked_by"])
            say(hash=ran.hash)
        except InputError as error:
            say(refused=[str(error.where), error.key, str(error.value), error.mend])
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            say(failed=f"{type(error).__name__}: {first}"[:300])
            sys.stderr.flush()
            os._exit(FAULT)  # what is left on the GPU cannot be trusted


def _prepare(trials: Sequence[Trial]) -> None:
    """Let the systems begin to start what `trials` need. What goes wrong is printed: the trial that needs it says so too."""
    for system in {trial.system: None for trial in trials}:
        try:
            prepare(system, [trial for trial in trials if trial.system == system])
        except Exception:
            traceback.print_exc()


def main(argv: Sequence[str] | None = None) -> int:
    """Be the process."""
    parser = argparse.ArgumentParser(prog="python -m harness.worker")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--config-json", default="{}")
    parser.add_argument("--datasets", type=Path, nargs="*", default=[])
    args = parser.parse_args(argv)
    end_with_parent()
    config = config_from_json(args.config_json)
    sys.stdout = sys.stderr  # whatever a library prints must not get between the lines
    _serve(store_of(args.results, config, read_manifests(args.datasets)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
