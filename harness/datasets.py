"""Finds every dataset that a figure needs, checked, without ever taking wrong bytes for right ones.

`resolve` looks in the mirror, then in the cache, then downloads, then falls back to the dataset's synthetic stand-in.
What it found is written to a manifest that the series jobs read:

    python -m harness.datasets azure_conv --mirror ../shared/data --out azure_conv.json
    python -m harness.datasets --list
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.atomic import make_folder, sync_folder, temporary_beside, write_atomically, writing
from systems.registry import InputError

REGISTRY = Path(__file__).resolve().parent.parent / "datasets" / "registry.yaml"
TIMEOUT_S = 20.0
"""How long a server may keep silent, not how long a download may take."""
ATTEMPTS = 2
_CHUNK_BYTES = 1 << 18

log = logging.getLogger(__name__)


def _relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path:
        raise ValueError("must be a relative path that stays inside the mirror")
    return path


def _web(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise ValueError("must begin with https://")
    return url


RelativePath = Annotated[str, AfterValidator(_relative)]
WebAddress = Annotated[str, AfterValidator(_web)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """One file of a folder dataset. `source` is its path under the folder's `base_url`, where it isn't the same."""

    sha256: Sha256
    bytes: int = Field(ge=0)
    source: RelativePath | None = None


class DatasetEntry(_Strict):
    """One dataset: a single file (`sha256`, `url`) or a folder (`files`, `base_url`). datasets/README.md explains the keys."""

    title: str
    source: WebAddress
    licence: str
    redistribute: bool
    citation: str
    reader: str | None
    path: RelativePath
    rows: int | None = Field(default=None, ge=1)
    url: WebAddress | None = None
    sha256: Sha256 | None = None
    bytes: int | None = Field(default=None, ge=0)
    base_url: WebAddress | None = None
    files: dict[RelativePath, FileEntry] | None = Field(default=None, min_length=1)
    ask: str | None = None
    stand_in: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> DatasetEntry:
        if self.files is not None and (self.url, self.sha256, self.bytes) != (None, None, None):
            raise ValueError("a dataset with `files` has no url, sha256 or bytes of its own")
        if self.files is None and self.base_url is not None:
            raise ValueError("`base_url` belongs to a dataset with `files`")
        if self.url is not None and self.sha256 is None:
            raise ValueError("a dataset with a `url` needs a `sha256`: what is downloaded must be checked")
        if self.files is None and self.url is None and self.ask is None:
            raise ValueError("a dataset without `url` needs `ask`: say how to get the file")
        return self

    def parts(self) -> list[Part]:
        """The files of this dataset, by path inside mirror and cache."""
        if self.files is None:
            return [Part(PurePosixPath(self.path), self.sha256, self.bytes, self.url)]
        return [
            Part(PurePosixPath(self.path, name), entry.sha256, entry.bytes, self._address(name, entry))
            for name, entry in sorted(self.files.items())
        ]

    def _address(self, name: str, entry: FileEntry) -> str | None:
        return None if self.base_url is None else f"{self.base_url}/{urllib.parse.quote(entry.source or name)}"


@dataclass(frozen=True, slots=True)
class Part:
    """One file to find: where it lies inside a mirror, what it must hash to (None: unknown), where it comes from."""

    path: PurePosixPath
    sha256: str | None
    bytes: int | None
    url: str | None


class Registry(_Strict):
    """datasets/registry.yaml."""

    datasets: dict[str, DatasetEntry]

    def entry(self, name: str) -> DatasetEntry:
        """The dataset `name`. Raises InputError when there is none."""
        if name not in self.datasets:
            raise InputError("datasets", "name", name, f"use one of {', '.join(sorted(self.datasets))}")
        return self.datasets[name]


@lru_cache(maxsize=4)
def load_registry(path: Path = REGISTRY) -> Registry:
    """The registry in the file `path`.

    Raises InputError for a file that is no YAML, an unknown key, or a value that can't be.
    """
    try:
        with path.open("rb") as file:
            content = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return Registry.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(path, key, first.get("input"), first["msg"]) from error
    except (OSError, yaml.YAMLError) as error:
        raise InputError(path, "file", type(error).__name__, f"give a readable YAML file ({error})") from error


@dataclass(frozen=True, slots=True)
class Dataset:
    """Where a dataset was found: `path` and `sha256` are None for a stand-in.

    For a folder, `sha256` is that of the list of its files: lines `sha256  path`, sorted by path, as sha256sum prints them.
    """

    name: str
    path: Path | None
    sha256: str | None
    source: Literal["mirror", "cache", "download", "stand-in"]


def default_cache() -> Path:
    """The cache folder of this user: `$XDG_CACHE_HOME/fivefold/datasets`, else under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fivefold" / "datasets"


def resolve(
    name: str,
    mirror: Path | None,
    cache: Path,
    offline: bool,
    *,
    registry: Registry | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Dataset:
    """Dataset `name` from the mirror, the cache, the network or, last, as a synthetic stand-in.

    A mirror that isn't there is passed over; so is a dataset that a folder holds only in part. A file whose checksum differs
    is an error wherever it lies: it is never used, and nothing else is used in its stead.

    Args:
        name: a key of the registry.
        mirror: folder to look in first; nothing is ever written there.
        cache: folder for downloads.
        offline: never open a connection.
        registry: defaults to datasets/registry.yaml.
        timeout_s: how long a server may keep silent.

    Raises:
        InputError: unknown name; wrong checksum (naming both); full disk; a dataset that can't be had and has no stand-in.
    """
    entry = (registry or load_registry()).entry(name)
    parts = entry.parts()
    for root, source in ((mirror, "mirror"), (cache, "cache")):
        if root is not None and all((root / part.path).is_file() for part in parts):
            digest = _verified(entry, parts, root)
            return Dataset(name, root / entry.path, digest, "mirror" if source == "mirror" else "cache")
    reason = "offline" if offline else _download(parts, cache, timeout_s)
    if reason is None:
        return Dataset(name, cache / entry.path, _verified(entry, parts, cache), "download")
    if entry.stand_in is not None:
        log.warning("%s: %s; using its synthetic stand-in", name, reason)
        return Dataset(name, None, None, "stand-in")
    how = f"{entry.ask}, and put it" if entry.ask else f"get it from {entry.source} and put it"
    raise InputError("datasets", name, reason, f"{how} at {(mirror or cache) / entry.path}")


def _verified(entry: DatasetEntry, parts: Sequence[Part], root: Path) -> str:
    """The checksum of the dataset in `root`, once every file's is right."""
    digests = [_check(root / part.path, part.sha256) for part in parts]
    if entry.files is None:
        return digests[0]
    lines = (f"{digest}  {part.path.relative_to(entry.path)}\n" for digest, part in zip(digests, parts, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check(path: Path, expected: str | None) -> str:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(path, "file", error.strerror, "make it readable") from error
    if expected is not None and found != expected:
        raise InputError(path, "sha256", found, f"expected {expected}: delete the file or restore the original, then run again")
    return found


class _UnavailableError(Exception):
    """The network did not give a file; its text says why."""


def _download(parts: Sequence[Part], cache: Path, timeout_s: float) -> str | None:
    """Fetch into the cache whatever of `parts` it lacks; the reason why that can't be done, or None."""
    if any(part.url is None for part in parts):
        return "no address to download it from"
    for part in parts:
        target = cache / part.path
        if target.is_file():
            continue  # an earlier download of this folder got so far; `_verified` checks it again
        try:
            _fetch(part, target, timeout_s)
        except _UnavailableError as error:
            return str(error)
    return None


def _fetch(part: Part, target: Path, timeout_s: float) -> None:
    """Download one file to a temporary name, check it, and only then give it its name."""
    for attempt in range(1, ATTEMPTS + 1):
        temporary = temporary_beside(target)
        try:
            with writing(target):
                make_folder(target.parent)
                digest = _stream(part, temporary, timeout_s)
                if digest != part.sha256:
                    raise InputError(
                        str(part.url), "sha256", digest, f"expected {part.sha256}: the file has changed there; not used"
                    )
                temporary.replace(target)
                sync_folder(target.parent)
            return
        except _UnavailableError:
            if attempt == ATTEMPTS:
                raise
        finally:
            temporary.unlink(missing_ok=True)


def _stream(part: Part, temporary: Path, timeout_s: float) -> str:
    """Copy the body of `part.url` into `temporary`; the SHA-256 of what came."""
    from tqdm import tqdm  # only a download shows a bar

    assert part.url is not None
    digest = hashlib.sha256()
    request = urllib.request.Request(part.url, headers={"User-Agent": "fivefold", "Accept-Encoding": "identity"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response, temporary.open("xb") as file:
            size = _announced(response, part)
            with tqdm(total=size, desc=part.path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                while chunk := response.read(_CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                received = file.tell()
            file.flush()
            os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        raise _UnavailableError(f"{part.url} answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise _UnavailableError(f"{part.url} can't be reached: {getattr(error, 'reason', error)}") from error
    if size is not None and received < size:
        raise _UnavailableError(f"{part.url} broke off after {received} of {size} bytes")
    return digest.hexdigest()


def _announced(response: HTTPResponse, part: Part) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else part.bytes


def whereabouts(entry: DatasetEntry, mirror: Path | None, cache: Path) -> str:
    """Where `resolve` would take the dataset from, without reading a byte of it."""
    parts = entry.parts()
    for root, word in ((mirror, "mirror"), (cache, "cache")):
        if root is not None and all((root / part.path).is_file() for part in parts):
            return word
    ways = ["download"] if all(part.url for part in parts) else ["ask"] if entry.ask else []
    return " or ".join([*ways, *(["stand-in"] if entry.stand_in else [])]) or "nowhere"


def _table(registry: Registry, mirror: Path | None, cache: Path) -> str:
    rows = [("NAME", "LICENCE", "FOUND", "TITLE")]
    for name, entry in sorted(registry.datasets.items()):
        licence = entry.licence + ("" if entry.redistribute else " *")
        rows.append((name, licence, whereabouts(entry, mirror, cache), entry.title))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
    width = shutil.get_terminal_size((160, 24)).columns
    return "\n".join([*(line[:width] for line in lines), "* may not be redistributed"])


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.datasets", description="Find a dataset and write its manifest.")
    parser.add_argument("name", nargs="?", help="a dataset of datasets/registry.yaml")
    parser.add_argument("--mirror", type=Path, help="folder to look in first")
    parser.add_argument("--cache", type=Path, help="folder for downloads (default: this user's cache)")
    parser.add_argument("--offline", action="store_true", help="never open a connection")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the manifest")
    parser.add_argument("--list", action="store_true", help="print all datasets, their licences and where they are found")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (2 for bad input, said in one line on standard error)."""
    parser = _arguments()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    cache: Path = options.cache or default_cache()
    try:
        if options.list:
            print(_table(load_registry(), options.mirror, cache))
            return 0
        if not options.name or not options.out:
            parser.error("give a dataset's NAME and --out FILE.json, or --list")
        found = resolve(options.name, options.mirror, cache, options.offline)
        manifest = asdict(found) | {"path": None if found.path is None else str(found.path)}
        write_atomically(options.out, json.dumps(manifest, indent=1) + "\n")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
