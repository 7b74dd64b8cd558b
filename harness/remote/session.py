"""An open connection to a host: commands on it, and the watch over it."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import paramiko

from harness.inventory import Host
from harness.remote import command, trees
from harness.remote.errors import CommandFailedError, CommandTimeoutError, LostError, UnreachableError, one_line
from harness.remote.exchange import Exchange, Greeted, Lines, OnLine, Sink
from harness.remote.masking import Mask
from harness.remote.timing import Timing

# $1 leads a process group: sshd gives every command a session of its own. `--` is understood after `-s` only (dash).
_KILL = """kill -s TERM -- "-$1" || kill -s TERM "$1"
n=0; while kill -s 0 -- "-$1" && [ $n -lt 20 ]; do sleep 0.1; n=$((n+1)); done
kill -s KILL -- "-$1" || kill -s KILL "$1"; exit 0"""


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended, with all that it printed (secrets of the host's environment masked)."""

    returncode: int
    stdout: str
    stderr: str


class Remote:
    """A connection to `host`. Several threads may use it at once. `harness.remote.connect` makes them."""

    def __init__(self, host: Host, transport: paramiko.Transport, timing: Timing, close: Callable[[], None]) -> None:
        self.host, self.timing = host, timing
        self._transport, self._close = transport, close
        self._done = threading.Event()
        self._silent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and those through which it leads."""
        self._done.set()
        self._close()

    @property
    def alive(self) -> bool:
        """Whether the connection stands, as far as is known."""
        return bool(self._transport.is_active())

    # -- commands ----------------------------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
        on_line: OnLine | None = None,
        check: bool = True,
        stdin: Iterable[bytes] | None = None,
    ) -> Ran:
        """Run `argv` on the host to its end; it is run once, whatever happens.

        Args:
            argv: one word each; no shell interprets them.
            env: variables on top of the host's own; neither the process list nor a log ever shows them.
            cwd: the folder to run in, absolute or below `~/`.
            timeout_s: then it is told to end, with all its children, and killed if it does not.
            on_line: is told every line of both streams as it comes, from threads of its own, one at a time.
            check: whether a status other than 0 is an error.
            stdin: what it reads; nothing without.

        Raises:
            CommandFailedError: it ended with another status than 0, and `check` holds.
            CommandTimeoutError: it took longer than `timeout_s`.
            LostError: the connection ended or fell silent meanwhile; the command may have run.
        """
        mask = self._mask(env)
        told = _one_at_a_time(on_line, mask) if on_line else None
        out = Lines(told)
        status, err = self._exchange(argv, out, env, cwd, timeout_s, stdin, told)
        ran = Ran(status, mask(out.text), mask(err))
        if check and status:
            raise self._failed(argv, ran)
        return ran

    def stream(
        self,
        argv: Sequence[str],
        sink: Sink,
        *,
        cwd: str | None = None,
        timeout_s: float | None = None,
        stdin: Iterable[bytes] | None = None,
    ) -> None:
        """As `run`, with the bytes of its standard output for `sink`."""
        status, err = self._exchange(argv, sink, None, cwd, timeout_s, stdin, None)
        if status:
            raise self._failed(argv, Ran(status, "", err))

    def _exchange(
        self,
        argv: Sequence[str],
        out: Sink,
        env: Mapping[str, str] | None,
        cwd: str | None,
        timeout_s: float | None,
        stdin: Iterable[bytes] | None,
        on_line: OnLine | None,
    ) -> tuple[int, str]:
        """The exit status of a command, and what it wrote to standard error."""
        greeting = f"fivefold-{secrets.token_hex(8)}"
        text = command.line(argv, environment=env, cwd=cwd, greeting=greeting, stdin=stdin is not None)
        err, greeted = Lines(on_line), Greeted(greeting, out)
        exchange = Exchange(self._channel(argv), greeted, err)
        with contextlib.closing(exchange.channel):
            try:
                exchange.start(command.BOOTSTRAP, _preceded(text, stdin or ()))
            except (paramiko.SSHException, OSError, EOFError) as error:
                raise self._lost(argv) from error
            if not exchange.wait(timeout_s):
                self._end(greeted.process)
                mend = "it was told to end; is it stuck, or does it need more time?"
                raise CommandTimeoutError(self.host.name, f"{_shown(argv)}: no end after {timeout_s:g} s", mend)
            if exchange.failure is not None:
                raise exchange.failure
            status = exchange.status(self.timing.silence_s if self.alive else 0)
        if status is None:
            raise self._lost(argv)
        return status, err.text + greeted.before

    def _channel(self, argv: Sequence[str]) -> paramiko.Channel:
        try:
            return self._transport.open_session(timeout=self.timing.connect_s)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self._lost(argv, "before") from error

    def _lost(self, argv: Sequence[str], when: str = "during") -> LostError:
        why = "fell silent" if self._silent else "ended"
        mend = "connect again" if when == "before" else "it may have run: look before you run it again"
        return LostError(self.host.name, f"the connection {why} {when} {_shown(argv)}", mend)

    def _failed(self, argv: Sequence[str], ran: Ran) -> CommandFailedError:
        words = one_line((ran.stderr.strip() or ran.stdout.strip() or "it said nothing").splitlines()[-1])
        what = f"{_shown(argv)}: exit status {ran.returncode}: {words}"
        return CommandFailedError(self.host.name, what, "see what it says", ran.returncode, ran.stderr)

    def _end(self, process: int | None) -> None:
        """End the command that has this number there, with its process group: TERM, two seconds, KILL."""
        if process is None:
            return
        with contextlib.suppress(LostError, CommandTimeoutError):
            self.run(["sh", "-c", _KILL, "end", str(process)], check=False, timeout_s=self.timing.connect_s)

    def _mask(self, env: Mapping[str, str] | None) -> Mask:
        return Mask(value for name, value in (env or {}).items() if name in self.host.secrets)

    def tunnel(self, address: str, port: int) -> paramiko.Channel:
        """Bytes to and from `address`, a TCP connection that the host makes. Raises UnreachableError when it cannot."""
        try:
            return self._transport.open_channel("direct-tcpip", (address, port), ("", 0), timeout=self.timing.connect_s)
        except (paramiko.SSHException, OSError, EOFError) as error:
            mend = "is that machine on, and does it listen there?"
            raise UnreachableError(
                self.host.name, f"no connection to {address}:{port} ({one_line(str(error))})", mend
            ) from error

    # -- files -------------------------------------------------------------------------------------------------------

    @cached_property
    def home(self) -> str:
        """The user's home on the host."""
        return self.run(["sh", "-c", 'printf %s "$HOME"'], timeout_s=self.timing.connect_s).stdout

    def path(self, path: str) -> str:
        """`path` of the host as an absolute one."""
        return self.home + path[1:] if path == "~" or path.startswith("~/") else path

    def put_tree(self, local: Path, remote: str, exclude: Sequence[str] = ()) -> None:
        """Make the folder `remote` what `local` is: checked by SHA-256, then put in place by a rename.

        Patterns in `exclude` (as for fnmatch) are matched with each file's relative path and with every name in it.

        Raises:
            TransferError: it did not arrive whole (a full disk, say); what was there before is as it was.
            LostError: the connection ended; what was there before is as it was, unless all had arrived.
        """
        trees.put(self, trees.files_in(local, exclude), self.path(remote))

    def put_file(self, local: Path, remote: str) -> None:
        """Make the file `remote` what `local` is, as `put_tree` does; folders are made as needed."""
        trees.put_file(self, local, self.path(remote))

    def get_tree(self, remote: str, local: Path) -> None:
        """Make the folder `local` what `remote` is: checked by SHA-256, then put in place by a rename.

        Raises:
            TransferError: there is no such folder, or it did not arrive whole; `local` is as it was.
            LostError: the connection ended; `local` is as it was.
        """
        trees.get(self, self.path(remote), local)

    def get_file(self, remote: str, local: Path) -> None:
        """Make the file `local` what `remote` is, as `get_tree` does."""
        trees.get_file(self, self.path(remote), local)

    # -- the watch ---------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Begin to ask the host now and then whether it lives; when it does not answer, end the connection.

        Without this a command on a host that vanished, or froze, behind a jump host would be waited for without end.
        """
        threading.Thread(target=self._watch, name=f"watch-{self.host.name}", daemon=True).start()

    def _watch(self) -> None:
        while not self._done.wait(self.timing.probe_s) and self.alive:
            probe = threading.Thread(target=self._probe, daemon=True)
            probe.start()
            probe.join(self.timing.silence_s)
            if probe.is_alive() and self.alive:
                self._silent = True
                self._transport.close()

    def _probe(self) -> None:
        with contextlib.suppress(Exception):  # an error ends the connection, and those who use it notice
            self._transport.global_request("keepalive@openssh.com", wait=True)


def _preceded(line: str, stdin: Iterable[bytes]) -> Iterable[bytes]:
    yield line.encode("utf-8", "surrogateescape") + b"\n"
    yield from stdin


def _shown(argv: Sequence[str]) -> str:
    """`argv` as a message may show it; values never are in it, for the environment goes another way."""
    return one_line(" ".join(argv), 80)


def _one_at_a_time(on_line: OnLine, mask: Mask) -> OnLine:
    lock = threading.Lock()

    def tell(line: str) -> None:
        with lock:
            on_line(mask(line))

    return tell
