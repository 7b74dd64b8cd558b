"""What a command of the workflow reads and writes, and how the same command is called in a folder on another host. No I/O."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from systems.registry import InputError

#: Commands that may run elsewhere.
MODULES = ("harness.series", "harness.rescale")
#: Options that name files, and whether they name several.
_PATHS = {"--figure": False, "--results": False, "--datasets": True, "--rescale": True, "--out": False}


@dataclass(frozen=True, slots=True)
class Job:
    """A command by its parts; all paths as they were given, that is, on this machine."""

    module: str
    words: tuple[str, ...]
    figure: Path
    results: Path
    out: Path
    datasets: tuple[Path, ...]
    rescale: tuple[Path, ...]
    config: str = "{}"
    """The value of `--config-json`."""

    @property
    def trials(self) -> Path:
        """The folder of all trials."""
        return self.results / "trials"

    @property
    def history(self) -> Path:
        """The history of the search."""
        return self.out.with_suffix(".history.jsonl")

    @property
    def key(self) -> Path:
        """What the history belongs to."""
        return self.out.with_suffix(".key")

    def name(self, controller: str) -> str:
        """Its folder on a host: the same whenever this job of this `controller` (machine and folder) comes to that host."""
        digest = hashlib.sha256(f"{controller}\0{os.path.normpath(self.out)}".encode()).hexdigest()[:16]
        return f"jobs/{self.out.stem}-{digest}"

    def argv(self, python: str) -> list[str]:
        """The command as it is called in its folder on a host."""
        words = _each_path(self.words, lambda path: inside(Path(path)))
        return [python, "-m", self.module, *words]


def inside(path: Path) -> str:
    """Where `path` of this machine is in the job's folder on a host: always below it, and never where another one is."""
    relative = PurePosixPath(os.path.normpath(path).replace(os.sep, "/"))
    if relative.is_absolute() or relative.parts[:1] == ("..",):
        return "outside" + os.path.abspath(path)  # noqa: PTH100 - without following links
    return str(relative)


def job_of(argv: Sequence[str]) -> Job:
    """The job that the command `argv` is.

    Raises:
        InputError: it is none that can run elsewhere.
    """
    if len(argv) < 3 or argv[1] != "-m" or argv[2] not in MODULES:
        shown = " ".join(argv[:3]) or "(none)"
        raise InputError("harness.dispatch", "command", shown, f"give `-- python -m` and one of {', '.join(MODULES)}")
    words = tuple(argv[3:])
    found: dict[str, list[str]] = {}
    option = ""
    for word in words:
        option = word if word.startswith("--") else option
        if option == word:
            found[option] = []
        elif option:
            found[option].append(word)
    for name in ("--figure", "--results", "--out"):
        if len(found.get(name, [])) != 1:
            raise InputError("harness.dispatch", name, " ".join(found.get(name, [])) or "(absent)", "name one path")
    paths = {name: tuple(map(Path, found.get(name, []))) for name in _PATHS}
    return Job(
        argv[2],
        words,
        figure=paths["--figure"][0],
        results=paths["--results"][0],
        out=paths["--out"][0],
        datasets=paths["--datasets"],
        rescale=paths["--rescale"],
        config=next(iter(found.get("--config-json", [])), "{}"),
    )


def _each_path(words: Sequence[str], change: Callable[[str], str]) -> list[str]:
    changed, option = [], ""
    for word in words:
        if word.startswith("--"):
            option = word
            changed.append(word)
        else:
            changed.append(change(word) if option in _PATHS else word)
    return changed


def without(words: Sequence[str], option: str) -> list[str]:
    """`words` less `option` and its value."""
    if option not in words[:-1]:
        return list(words)
    place = words.index(option)
    return [*words[:place], *words[place + 2 :]]


def environment(
    folder: str, code: str, commit: str, of_host: Mapping[str, str], facts: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The variables of a job on a host: its own, where the code is that was sent, and for provenance what is known here."""
    told = {"FIVEFOLD_FACTS": json.dumps(facts, sort_keys=True)} if facts else {}
    return {**of_host, **told, "PYTHONPATH": f"{folder}/{code}", "FIVEFOLD_COMMIT": commit, "PYTHONUNBUFFERED": "1"}
