"""The work folder of one host, over a connection: its state, its files, and how they are changed."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.provision.facts import Answer, ask
from harness.provision.layout import Layout
from harness.remote import CommandFailedError, Ran, Remote, RemoteError
from harness.remote.errors import one_line
from harness.remote.exchange import Lines
from harness.remote.trees import Files, arriving

LOOK_S = 60.0
"""For commands that only look or move things about."""
_WRITE = 'set -e; LC_ALL=C; export LC_ALL; cat > "$1.tmp"; mv -f -- "$1.tmp" "$1"'
_SUMS = 'cd -- "$1" && xargs -0 -r sha256sum -z -- 2>/dev/null; exit 0'
# hard links: what has arrived takes its place without needing space once more; the old file's readers keep it
_PLACE = 'set -e; mkdir -p -- "$2"; cp -rl --remove-destination -- "$1/tree/." "$2/"; rm -rf -- "$1"'
_DELETE = 'cd -- "$1" && xargs -0 -r rm -f --'
# $1: the work folder, $2: the topmost folder that was made for it (or nothing), then what to remove
_UNMAKE = """root=$1; top=$2; shift 2
rm -rf -- "$@" || exit 1
rmdir -- "$root/shared" 2>/dev/null
d=$root; while [ -n "$top" ] && rmdir -- "$d" 2>/dev/null && [ "$d" != "$top" ]; do d=$(dirname -- "$d"); done
if [ -n "$top" ] && [ -e "$root" ]; then ls -A -- "$root"; fi
exit 0"""
_UNLOCKED = "held by another"
# Held for as long as this connection lives: the lock goes with the process, which ends when its input does.
_LOCK = 'exec 9>"$1" && { flock -n 9 || { echo "held by another"; exit 0; }; echo held; exec cat; }'


class StepError(RemoteError):
    """A step of provisioning failed on a host."""


@dataclass
class State:
    """What is known to have been done on a host: the folder that was made, the files that are there, the keys of steps."""

    made: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: Answer) -> State:
        """The state that a host told; a new one where it has none."""
        told = answer.state or {}
        return cls(str(told.get("made", answer.made)), dict(told.get("files", {})), dict(told.get("keys", {})))

    def text(self) -> str:
        """As JSON."""
        told: dict[str, Any] = {"made": self.made, "files": self.files, "keys": self.keys}
        return json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


class Far:
    """The work folder of a host."""

    def __init__(self, remote: Remote) -> None:
        self.remote, self.host = remote, remote.host
        self.layout = Layout(remote.path(self.host.work_dir))

    def ask(self, *, make: bool) -> Answer:
        """The host's facts and state.

        Raises:
            StepError: the work folder cannot be made or written.
        """
        try:
            return ask(lambda argv: self._run(argv).stdout, self.layout.root, make=make)
        except CommandFailedError as error:
            said = one_line(error.stderr)
            raise StepError(
                self.host.name, f"work_dir {self.layout.root}: {said}", "name a folder that can be written"
            ) from error

    def _run(self, argv: Sequence[str], stdin: str | None = None) -> Ran:
        data = None if stdin is None else [stdin.encode("utf-8", "surrogateescape")]
        return self.remote.run(argv, stdin=data, timeout_s=LOOK_S)

    def _shell(self, script: str, *words: str, stdin: str | None = None) -> str:
        return self._run(["sh", "-c", script, "provision", *words], stdin).stdout

    def keep(self, state: State) -> None:
        """Write the state, whole or not at all.

        Raises:
            StepError: the disk is full, say.
        """
        try:
            self._shell(_WRITE, self.layout.state, stdin=state.text())
        except CommandFailedError as error:
            said = one_line(error.stderr)
            raise StepError(self.host.name, f"{self.layout.state}: {said}", "free some space there, then run again") from error

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """The SHA-256 of those of these files, relative to the work folder, that are there."""
        out = self._shell(_SUMS, self.layout.root, stdin="".join(f"{name}\0" for name in names))
        return {entry[66:]: entry[:64] for entry in out.split("\0") if entry}

    def place(self, files: Files) -> None:
        """Put files into the work folder, each in place of its old one; all have arrived and been checked before any is moved.

        Raises:
            TransferError: not all arrived, or not all could be put in place.
        """
        with arriving(self.remote, files, self.layout.root) as temporary:
            self._shell(_PLACE, temporary, self.layout.root)

    def delete(self, names: Sequence[str]) -> None:
        """Remove files from the work folder."""
        self._shell(_DELETE, self.layout.root, stdin="".join(f"{name}\0" for name in names))

    def remove(self, *paths: str) -> None:
        """Remove files and folders, given as absolute paths."""
        self._shell('rm -rf -- "$@"', *paths)

    def unmake(self, state: State) -> list[str]:
        """Remove all that provisioning made; gives what others left in a folder that it made, which therefore stays."""
        left = self._shell(_UNMAKE, self.layout.root, state.made, *self.layout.made, f"{self.layout.root}/.fivefold.lock")
        return left.splitlines()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other controller from provisioning this host while the block runs; where it has no `flock`, hope.

        Raises:
            StepError: another one does.
        """
        answer: list[str] = []
        with _leash(self.remote, ["sh", "-c", _LOCK, "lock", f"{self.layout.root}/.fivefold.lock"], answer):
            if answer == [_UNLOCKED]:
                raise StepError(
                    self.host.name, "another controller provisions it", "wait until that one is done, then run again"
                )
            yield


@contextlib.contextmanager
def _leash(remote: Remote, argv: Sequence[str], answer: list[str]) -> Iterator[None]:
    """`argv` runs on the host while the block does; the first line that it says is in `answer` when the block begins."""
    said, over = threading.Event(), threading.Event()

    def heard(line: str) -> None:
        answer.append(line)
        said.set()

    def held() -> Iterator[bytes]:
        while not over.wait(0.2):
            if not remote.alive:
                return
        yield b""

    def work() -> None:
        with contextlib.suppress(RemoteError):
            remote.stream(argv, Lines(heard), stdin=held())
        said.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    said.wait(remote.timing.connect_s)
    try:
        yield
    finally:
        over.set()
        thread.join(remote.timing.connect_s)
