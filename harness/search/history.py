"""The history of searches on disk: append-only JSON Lines, one answered probe a line.

    {"point": {"rate_rps": 0.5}, "probe": {"knobs": {"chunk": 64}, "seed": 0}, "objective": 1.2,
     "metrics": {"ttft_p99_s": 0.31}, "trial": "3f9a..."}

One file may hold several points, in any interleaving. A line is there once its newline is on the disk: an answer is
flushed before `append` returns, and a last line without a newline (a kill, a power cut) is dropped in reading and cut
off before the next append. Numbers that JSON lacks are the strings "nan", "inf" and "-inf"; all others come back to the
last bit.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.atomic import writing
from harness.search.propose import propose
from harness.search.space import Answer, Probe, SearchSpace
from systems.registry import InputError, Scalar

Levels = Mapping[str, Scalar]
MEND = "delete this file to search anew (trials that have run are not run again)"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: the answer, the hash of the trial that gave it, and where it stands (line numbers start at 1)."""

    point: Levels
    answer: Answer
    trial: str
    line: int


class History:
    """The answered probes of one file. Reading never changes it; writers take turns by a lock on the file."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist; its folder is made at the first append."""
        self.path = path

    def entries(self, point: Levels | None = None) -> list[Entry]:
        """All entries, or those of one point, in the order in which they were asked.

        Raises InputError for a line that is whole but is not an entry.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        lines = data[: _whole(data)].split(b"\n")[:-1]
        entries = [self._entry(line, number) for number, line in enumerate(lines, 1)]
        return [e for e in entries if point is None or _key(e.point) == _key(point)]

    def replay(self, point: Levels, space: SearchSpace) -> list[Answer]:
        """The answers at `point`, having checked that the search would ask each of these questions again, in this order.

        Raises InputError naming file and line where it would not: the figure's search block or the search itself has
        changed.
        """
        answers: list[Answer] = []
        for entry in self.entries(point):
            step = propose(space, answers)
            if step != entry.answer.probe:
                asked = f"asks {_said(step)}" if isinstance(step, Probe) else f"ends with {step.outcome!r}"
                mend = f"here the search now {asked}: {MEND}"
                raise InputError(f"{self.path}:{entry.line}", "probe", _said(entry.answer.probe), mend)
            answers.append(entry.answer)
        return answers

    def append(self, point: Levels, answer: Answer, trial: str = "") -> None:
        """Add an answer; it is on the disk when this returns.

        Raises InputError when the disk is full or the file can't be written; then the file is as it was.
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _append_line(descriptor, _line(point, answer, trial))
            finally:
                os.close(descriptor)
            if is_new:
                _sync_folder(self.path.parent)

    def _entry(self, line: bytes, number: int) -> Entry:
        try:
            told = json.loads(line)
            probe = Probe(_numbers(told["probe"]["knobs"]), int(told["probe"]["seed"]))
            answer = Answer(probe, _number(told["objective"]), _numbers(told["metrics"]))
            return Entry(dict(told["point"]), answer, str(told["trial"]), number)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            mend = f"is not an answer ({error!r}): {MEND}"
            raise InputError(f"{self.path}:{number}", "line", line.decode(errors="replace"), mend) from error


def _whole(data: bytes) -> int:
    """How many bytes at the front are whole lines."""
    return data.rfind(b"\n") + 1


def _append_line(descriptor: int, line: bytes) -> None:
    """Cut off a torn last line, then write; cut off again if the write fails."""
    end = _end_of_lines(descriptor)
    os.ftruncate(descriptor, end)
    try:
        os.lseek(descriptor, end, os.SEEK_SET)
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _end_of_lines(descriptor: int) -> int:
    """Offset behind the last newline, looked for from the end of the file."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 4096)
        found = _whole(os.pread(descriptor, end - start, start))
        if found:
            return start + found
        end = start
    return 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(point: Levels, answer: Answer, trial: str) -> bytes:
    probe = {"knobs": _coded(answer.probe.knobs), "seed": answer.probe.seed}
    told = {"point": dict(point), "probe": probe, "objective": _code(answer.objective), "metrics": _coded(answer.metrics)}
    return (json.dumps({**told, "trial": trial}, allow_nan=False) + "\n").encode()


def _code(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))


def _coded(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: _code(value) for name, value in values.items()}


def _number(value: Any) -> float:  # noqa: ANN401
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(value) for name, value in values.items()}


def _key(point: Levels) -> str:
    return json.dumps(dict(point), sort_keys=True)


def _said(probe: Probe) -> str:
    knobs = ", ".join(f"{name} {value:g}" for name, value in probe.knobs.items()) or "no knob"
    return f"{knobs}, seed {probe.seed}"
