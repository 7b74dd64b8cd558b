"""The files that a host needs: those of the checkout that git tracks, and the datasets that figures use."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.datasets import default_cache, load_registry, resolve
from harness.figure_file import load_figure
from harness.remote.trees import Files, Sent, sent
from systems.registry import InputError

LEFT_OUT = frozenset({".venv", "results", "__pycache__", ".snakemake", ".git"})
"""Folders that do not belong to the project where there is no git to ask."""


@dataclass(frozen=True, slots=True)
class Cargo:
    """What every host gets: files by their path below the work folder. Read once for all hosts."""

    root: Path
    files: Files
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def digest(self) -> str:
        """What it is, in 20 digits."""
        text = "".join(f"{name}\0{file.sha256}\0{file.program}\n" for name, file in sorted(self.files.items()))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]

    def read(self, name: str) -> bytes:
        """The content of the project's file `name`, as every host gets it."""
        return self.files[f"checkout/{name}"].path.read_bytes()


def load(root: Path, mirror: Path | None, *, datasets: bool = True) -> Cargo:
    """The cargo of the checkout `root`.

    Raises:
        InputError: a file cannot be read, or a dataset's bytes are wrong.
    """
    names, notes = tracked(root)
    files = {f"checkout/{name}": sent(root / name) for name in names}
    return Cargo(root, {**files, **(_datasets(root, mirror) if datasets else {})}, notes)


def tracked(root: Path) -> tuple[list[str], list[str]]:
    """The project's files, relative to `root`, and what should be said about them."""
    listed = _git(root, "ls-files", "-z")
    if listed is None:
        return sorted(_walk(root)), [f"{root} is no git checkout: every file of it is sent"]
    names = [name for name in listed.split("\0") if name and (root / name).is_file()]
    strangers = [name for name in (_git(root, "ls-files", "-z", "--others", "--exclude-standard") or "").split("\0") if name]
    mend = f"{len(strangers)} files that git does not know are not sent, such as {strangers[0]}" if strangers else ""
    return sorted(names), [mend] if mend else []


def _git(root: Path, *words: str) -> str | None:
    """What git says of the checkout `root`; None when it is none, or only a folder in somebody else's."""
    top = ["git", "-C", str(root), "rev-parse", "--show-toplevel"]
    try:
        found = subprocess.run(top, capture_output=True, text=True, timeout=60, check=True).stdout.removesuffix("\n")
        if Path(found).resolve() != root.resolve():
            return None
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "surrogateescape")


def _walk(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.is_file() and not LEFT_OUT & set(relative.parts):
            yield relative.as_posix()


def _datasets(root: Path, mirror: Path | None) -> dict[str, Sent]:
    """Files of the datasets that figures need, where they are here; where not, a host has their stand-in, as this machine."""
    needed = {name for path in sorted((root / "figures").glob("*/*.yaml")) for name in load_figure(path).datasets}
    registry = load_registry()
    files: dict[str, Sent] = {}
    for name in sorted(needed & registry.datasets.keys()):
        entry = registry.entry(name)
        try:
            found = resolve(name, mirror, default_cache(), offline=True)
        except InputError:
            continue  # `doctor` says so; the figure that needs it will, too
        if found.path is None:
            continue
        base = mirror if found.source == "mirror" and mirror else default_cache()
        files |= {f"shared/data/{part.path}": sent(base / part.path) for part in entry.parts()}
    return files


def differing(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names in `wanted` that `found` lacks or has with another digest."""
    return sorted(name for name, digest in wanted.items() if found.get(name) != digest)
