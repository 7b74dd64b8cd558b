"""Files between here and a host: a tar stream, checked by SHA-256 on the side where it arrives, then renamed into place.

The host needs nothing but POSIX tools, tar and sha256sum. What arrives lies under a hidden temporary name in the same
folder until it is known to be whole; whatever goes wrong, that is removed and what was there before stays.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import posixpath
import queue
import re
import secrets
import shutil
import tarfile
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.atomic import make_folder, sync_folder, temporary_beside, writing
from harness.remote.errors import CommandFailedError, LostError, RemoteError, TransferError, one_line
from systems.registry import InputError

if TYPE_CHECKING:
    from harness.remote.session import Remote

_CHUNK = 1 << 17
_HELD = 32  # chunks that may wait between the thread that makes a tar stream and the one that sends it
# what tar, cat, mv and the shell say of it, in the C locale; tar's "wrote only" is a write that the disk cut short
_FULL = re.compile(r"no space left|wrote only|quota", re.IGNORECASE)
# $1 is the temporary folder. Standard input holds the digests in the form of sha256sum, an empty line, and the tar stream.
_RECEIVE = """set -e; LC_ALL=C; export LC_ALL
umask 022; mkdir -p -- "$1"; cd -- "$1"
while IFS= read -r line && [ -n "$line" ]; do printf '%s\\n' "$line"; done > .sums
mkdir tree; tar -xf - -C tree
cd tree; if [ -s ../.sums ]; then sha256sum --check --quiet --strict ../.sums >&2; fi
"""
# $1: the temporary folder, $2: where its tree goes, $3: a name for what is there now
_PLACE = """set -e
if [ -e "$2" ] || [ -L "$2" ]; then mv -T -- "$2" "$3"; fi
mv -T -- "$1/tree" "$2" || { if [ -e "$3" ]; then mv -T -- "$3" "$2"; fi; exit 1; }
rm -rf -- "$3" "$1"
"""
_PLACE_FILE = 'set -e; mkdir -p -- "$(dirname -- "$2")"; mv -fT -- "$1/tree/$3" "$2"; rm -rf -- "$1"'
_SUMS = 'cd -- "$1" && find . -type f -exec sha256sum -z -- {} +'


@dataclass(frozen=True, slots=True)
class Sent:
    """A local file on its way: where it is, its SHA-256 and whether it is a program."""

    path: Path
    sha256: str
    program: bool


Files = Mapping[str, Sent]
"""Files by their path relative to the folder that they belong to, with `/` in it."""


def sent(path: Path) -> Sent:
    """The file `path` as it is now. Raises InputError when it cannot be read."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Sent(path, digest, bool(os.fstat(file.fileno()).st_mode & 0o100))
    except OSError as error:
        raise InputError(path, "file", error.strerror, "make it readable") from error


def files_in(folder: Path, exclude: Sequence[str] = ()) -> Files:
    """All files below `folder`, without those that a pattern in `exclude` matches; symbolic links count as what they name.

    Raises:
        InputError: it is no folder, or a file in it cannot be read.
    """
    if not folder.is_dir():
        raise InputError(folder, "folder", str(folder), "no such folder")
    found = {}
    for root, folders, names in os.walk(folder):
        relative = Path(root).relative_to(folder)
        folders[:] = sorted(name for name in folders if not _excluded((relative / name).as_posix(), exclude))
        for name in sorted(names):
            path = (relative / name).as_posix()
            if not _excluded(path, exclude) and Path(root, name).is_file():
                found[path] = sent(Path(root, name))
    return found


def _excluded(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(Path(path).name, pattern) for pattern in patterns)


def put(remote: Remote, files: Files, target: str) -> None:
    """Make the folder `target` of the host hold exactly `files`."""
    with arriving(remote, files, posixpath.dirname(target)) as temporary:
        _shell(remote, _PLACE, temporary, target, f"{temporary}.old")


def put_file(remote: Remote, local: Path, target: str) -> None:
    """Make the file `target` of the host what `local` is."""
    with arriving(remote, {"file": sent(local)}, posixpath.dirname(target)) as temporary:
        _shell(remote, _PLACE_FILE, temporary, target, "file")


@contextlib.contextmanager
def arriving(remote: Remote, files: Files, beside: str) -> Iterator[str]:
    """A fresh folder in `beside` on the host whose `tree` holds `files`, checked; removed when the block ends."""
    temporary = posixpath.join(beside, f".fivefold-{secrets.token_hex(8)}.tmp")
    sums = "".join(f"{_sum_line(name, file.sha256)}\n" for name, file in files.items())
    try:
        with contextlib.closing(_tar(files)) as stream:
            _shell(remote, _RECEIVE, temporary, stdin=_after(sums + "\n", stream))
        yield temporary
    except LostError:
        raise  # nothing can be removed there now
    except CommandFailedError as error:
        _remove(remote, temporary)
        raise _transfer_error(error) from error
    except BaseException:
        _remove(remote, temporary)
        raise


def _sum_line(name: str, digest: str) -> str:
    """As sha256sum writes it: names with a backslash or a line end in them are escaped."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}"


def _after(head: str, stream: Iterable[bytes]) -> Iterator[bytes]:
    yield head.encode("utf-8", "surrogateescape")
    yield from stream


def _shell(remote: Remote, script: str, *words: str, stdin: Iterable[bytes] | None = None) -> None:
    remote.run(["sh", "-c", script, "fivefold", *words], stdin=stdin)


def _remove(remote: Remote, path: str) -> None:
    with contextlib.suppress(RemoteError):
        _shell(remote, 'rm -rf -- "$1" "$1.old"', path)


def _transfer_error(error: CommandFailedError) -> TransferError:
    said = one_line(error.stderr) or "the host did not say why"
    if _FULL.search(error.stderr):
        return TransferError(error.host, "disk full", f"free some space there, then run the same command again ({said})")
    return TransferError(error.host, "the files did not arrive whole", f"run the same command again ({said})")


def _tar(files: Files) -> Generator[bytes, None, None]:
    """The files as a tar stream, made by a thread of its own: tarfile writes, a channel reads."""
    chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(_HELD)
    stopped = threading.Event()
    thread = threading.Thread(target=_make_tar, args=(files, chunks, stopped), daemon=True)
    thread.start()
    try:
        while (chunk := chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk
    finally:
        stopped.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                chunks.get(timeout=0.05)


def _make_tar(files: Files, chunks: queue.Queue[bytes | BaseException | None], stopped: threading.Event) -> None:
    class Pipe:
        def write(self, data: bytes) -> int:
            if stopped.is_set():
                raise _StoppedError
            chunks.put(bytes(data))
            return len(data)

    try:
        with tarfile.open(fileobj=Pipe(), mode="w|", bufsize=_CHUNK, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
            for name, file in files.items():
                _add(tar, name, file)
        chunks.put(None)
    except _StoppedError:
        pass
    except BaseException as error:
        chunks.put(error)


class _StoppedError(Exception):
    """Nobody reads the stream any more."""


def _add(tar: tarfile.TarFile, name: str, file: Sent) -> None:
    info = tarfile.TarInfo(name)
    with file.path.open("rb") as source:
        info.size = os.fstat(source.fileno()).st_size
        info.mode = 0o755 if file.program else 0o644
        tar.addfile(info, source)


# -- from the host -----------------------------------------------------------------------------------------------------


def digests(remote: Remote, folder: str) -> dict[str, str]:
    """The SHA-256 of every file below `folder` on the host, by relative path. Raises TransferError if there is none."""
    ran = remote.run(["sh", "-c", _SUMS, "fivefold", folder], check=False)
    if ran.returncode:
        raise TransferError(remote.host.name, f"{folder} cannot be read ({one_line(ran.stderr)})", "is the path right?")
    return {entry[66:].removeprefix("./"): entry[:64] for entry in ran.stdout.split("\0") if entry}


def get(remote: Remote, source: str, local: Path) -> None:
    """Make the folder `local` what `source` on the host is."""
    wanted = digests(remote, source)
    temporary = temporary_beside(local)
    with writing(local):
        make_folder(local.parent)
        try:
            temporary.mkdir()
            _receive(remote, source, temporary)
            found = {name: file.sha256 for name, file in files_in(temporary).items()}
            _compare(remote, source, wanted, found)
            _replace(temporary, local)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(local.parent)


def _receive(remote: Remote, source: str, into: Path) -> None:
    """Unpack what the host sends; links that lead out of the folder, devices and the like are refused."""
    reading, writing_end = os.pipe()
    failures: list[BaseException] = []

    def unpack() -> None:
        try:
            with os.fdopen(reading, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                tar.extractall(into, filter="data")
                while stream.read(_CHUNK):
                    pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=unpack, daemon=True)
    thread.start()
    try:
        with os.fdopen(writing_end, "wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
            remote.stream(["tar", "-cf", "-", "-C", source, "."], pipe)
    finally:
        thread.join()
    for failure in failures:
        if isinstance(failure, tarfile.TarError):
            raise TransferError(remote.host.name, f"{source}: {failure}", "run the same command again") from failure
        raise failure


def get_file(remote: Remote, source: str, local: Path) -> None:
    """Make the file `local` what `source` on the host is."""
    told = remote.run(["sha256sum", "-z", "--", source], check=False)
    if told.returncode:
        raise TransferError(remote.host.name, f"{source} cannot be read ({one_line(told.stderr)})", "is the path right?")
    temporary = temporary_beside(local)
    with writing(local):
        make_folder(local.parent)
        try:
            with temporary.open("xb") as file:
                remote.stream(["cat", "--", source], file)
            _compare(remote, source, {"": told.stdout[:64]}, {"": sent(temporary).sha256})
            temporary.replace(local)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(local.parent)


def _compare(remote: Remote, source: str, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        what = f"{posixpath.join(source, wrong[0])} changed on its way ({len(wrong)} files did)"
        raise TransferError(remote.host.name, what, "does something still write there? run the same command again")


def _replace(new: Path, final: Path) -> None:
    """Put the folder `new` at `final`; what was there is removed when that has worked."""
    old = temporary_beside(final)
    had = final.exists()
    if had:
        final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        if had:
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)
