"""Which files travel with a job, and where those that come back belong."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.atomic import make_folder, sync_folder, write_atomically
from harness.code_version import CODE, ROOT, calibrations, code_version, system_version
from harness.dispatch.job import Job, inside
from harness.figure_file import system_of
from harness.launch.leashed import Leashed
from harness.manifest import Manifest, read_manifests

#: What a job imports and reads of the project.
CODE_PARTS = ("harness", "systems", "datasets", "figures/__init__.py", *calibrations())
_WHOLE = ("spec.json", "provenance.json", "metrics.json")
_TRAVELS = _WHOLE  # the rows of requests stay: nobody asks a trial for them again on a host


@dataclass(frozen=True, slots=True)
class Cargo:
    """What goes with `job`; `folder` is its folder on the host, relative to the host's work folder."""

    job: Job
    folder: str
    manifests: Mapping[Path, Manifest]

    @property
    def code(self) -> str:
        """The folder of the code on the host: one for each version, whoever sends it."""
        return f"code/{code_version(*CODE_PARTS)[:20]}"

    def there(self, path: Path) -> str:
        """Where `path` of this machine is on the host, relative to its work folder."""
        return f"{self.folder}/{inside(path)}"

    @property
    def compared(self) -> tuple[str, ...]:
        """Patterns of the files on the host whose checksums decide what travels."""
        return (f"{self.code}/**/*", f"{self.folder}/**/*")

    @property
    def named(self) -> tuple[str, ...]:
        """Patterns of files that bear their checksum in their name: there, they are right."""
        return tuple(f"{_data(found)}/**/*" for found in self.manifests.values() if found.path)

    @property
    def comes_back(self) -> tuple[str, ...]:
        """Patterns of what comes back, what is referred to first."""
        job = self.job
        return (f"{self.there(job.trials)}/*/*", self.there(job.key), self.there(job.history), self.there(job.out))

    # -- the way there -------------------------------------------------------------------------------------------------

    def send(self, leash: Leashed, found: Mapping[str, str], work_dir: str) -> None:
        """Send what the host lacks; `found` are the checksums of what it has, `work_dir` is its work folder in full."""
        for local, there in self._files(found):
            leash.put_file(local, there)
        for path, manifest in self.manifests.items():
            data = _data(manifest)
            told = {"name": manifest.name, "path": None, "sha256": manifest.sha256, "source": manifest.source}
            if manifest.path:
                told["path"] = f"{work_dir}/{data}/{manifest.path.name}"
            leash.put_bytes(self.there(path), json.dumps(told).encode())
        job = self.job
        for path in (job.history, job.key):
            if not path.exists() and self.there(path) in found:
                leash.drop(self.there(path))  # deleted here, to search anew

    def _files(self, found: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
        from harness.launch.far.files import checksum

        for part in CODE_PARTS:
            for path in code_files(ROOT / part):
                there = f"{self.code}/{path.relative_to(ROOT).as_posix()}"
                if found.get(there) != checksum(path):
                    yield path, there
        for path in (self.job.figure, *self.job.rescale, self.job.key, self.job.history):
            there = self.there(path)
            if path.exists() and found.get(there) != checksum(path):
                yield path, there
        for manifest in self.manifests.values():
            yield from _dataset_files(manifest, found)
        for trial in self._trials():
            for name in _TRAVELS:
                there = f"{self.there(self.job.trials)}/{trial.name}/{name}"
                if there not in found:
                    yield trial / name, there

    def _trials(self) -> Iterator[Path]:
        """The trials that the job may ask for: those of its system, by the code that there is now."""
        system = system_of(self.job.figure)
        version = system_version(system)
        for path in sorted(self.job.trials.glob("[!.]*/spec.json")):
            with contextlib.suppress(OSError, ValueError):
                spec = json.loads(path.read_bytes())
                if (spec["system"], spec["code"]) == (system, version):
                    yield path.parent

    # -- the way back --------------------------------------------------------------------------------------------------

    def left_behind(self, found: Mapping[str, str]) -> list[str]:
        """The files on the host of whole trials that are not here: an earlier run there was cut off."""
        prefix = f"{self.there(self.job.trials)}/"
        trials: dict[str, list[str]] = {}
        for path in found:
            if path.startswith(prefix):
                trials.setdefault(path[len(prefix) :].split("/")[0], []).append(path)
        return [
            path
            for name, paths in trials.items()
            if {f"{prefix}{name}/{file}" for file in _WHOLE} <= set(paths) and not (self.job.trials / name).exists()
            for path in paths
        ]

    def publish(self, staging: Path, batch: Sequence[str]) -> None:
        """Put what came back where it belongs: trials as whole folders, then the key, the history and the result."""
        prefix = f"{self.there(self.job.trials)}/"
        trials = dict.fromkeys(path[len(prefix) :].split("/")[0] for path in batch if path.startswith(prefix))
        for name in trials:
            self._publish_trial(staging / prefix / name, name)
        for path in (self.job.key, self.job.history, self.job.out):
            came = staging / self.there(path)
            if self.there(path) in batch:
                self._publish_file(path, came)

    def _publish_trial(self, came: Path, name: str) -> None:
        if not all((came / file).exists() for file in _WHOLE):
            return  # it was here before, and only what is new of it came
        make_folder(self.job.trials)
        with contextlib.suppress(OSError):  # it has come from elsewhere meanwhile: the same by its name
            came.rename(self.job.trials / name)
        sync_folder(self.job.trials)

    def _publish_file(self, path: Path, came: Path) -> None:
        data = came.read_bytes()
        if path == self.job.key and not (path.exists() and path.read_bytes() == data):
            self.job.history.unlink(missing_ok=True)  # it belongs to something else; the new one follows
        write_atomically(path, data)


def cargo_of(job: Job, controller: str) -> Cargo:
    """What travels with `job`. Raises InputError when a manifest is unreadable or its dataset gone."""
    manifests = {path: found for path in job.datasets for found in read_manifests([path]).values()}
    return Cargo(job, job.name(controller), manifests)


def code_files(folder: Path) -> list[Path]:
    """All code below `folder`, or `folder` itself where it is a file."""
    found = [folder] if folder.is_file() else []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        found += [Path(here, name) for name in sorted(names) if Path(name).suffix in CODE]
    return found


def _data(manifest: Manifest) -> str:
    return f"data/{manifest.sha256}"


def _dataset_files(manifest: Manifest, found: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    if manifest.path is None:
        return
    root = manifest.path.parent
    paths = sorted(path for path in manifest.path.rglob("*") if path.is_file()) if manifest.path.is_dir() else [manifest.path]
    for path in paths:
        there = f"{_data(manifest)}/{path.relative_to(root).as_posix()}"
        if there not in found:
            yield path, there
