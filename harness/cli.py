"""What every command of the harness does around its work: one line for what is wrong, and an exit status that says so.

Every command takes `--log FILE` besides its own options: what it says on stderr goes into that file too.

0: done; 1: done, and the answer is no (a claim differs); 2: the input or the machine is unusable; 3: a fault of
the program, with a traceback; 130, 143: interrupted.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from harness import retries
from harness.atomic import make_folder, writing
from harness.streams import Lasting
from systems.registry import InputError

UNUSABLE = 2
BUG = 3


class Terminated(BaseException):
    """SIGTERM, raised where it hit so that everything is put away on the way out."""


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """The exit status of `main(argv)`; what a user can mend is printed in one line instead of a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    given = list(sys.argv[1:] if argv is None else argv)
    with contextlib.redirect_stdout(Lasting(sys.stdout)), contextlib.redirect_stderr(Lasting(sys.stderr)):
        try:
            with _logging(given) as (rest, log):
                status = _run(main, rest)
                if log is not None and status == UNUSABLE:
                    retries.mark(log)
                return status
        except InputError as error:  # the log cannot be written
            return _say(str(error), UNUSABLE)
        finally:
            sys.stdout.flush()


def _run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str]) -> int:
    try:
        return main(argv)
    except InputError as error:
        return _say(str(error), UNUSABLE)
    except KeyboardInterrupt:
        return _say("interrupted; what is finished is kept", 128 + signal.SIGINT)
    except Terminated:
        return _say("terminated; what is finished is kept", 128 + signal.SIGTERM)
    except Exception as error:
        line = _disk_error(error)
        return _say(str(line), UNUSABLE) if line else _say(traceback.format_exc().rstrip(), BUG)


class _Tee(Lasting):
    """Writes to a stream and to a log; a log that cannot be written must not keep a message from the user."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        super().__init__(stream)
        self._log = log

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._log.write(text)
            self._log.flush()
        return super().write(text)


@contextlib.contextmanager
def _logging(argv: list[str]) -> Iterator[tuple[list[str], Path | None]]:
    """Obeys `--log FILE` in `argv` while the block runs; gives the rest of `argv`, and the file."""
    if "--log" not in argv[:-1]:
        yield argv, None
        return
    place = argv.index("--log")
    path = Path(argv[place + 1])
    with writing(path):
        make_folder(path.parent)
        log = path.open("w", encoding="utf-8", errors="replace")
    retries.unmark(path)
    with contextlib.redirect_stderr(_Tee(sys.stderr, log)):
        yield argv[:place] + argv[place + 2 :], path
    with contextlib.suppress(OSError):
        log.close()


def _disk_error(error: Exception) -> InputError | None:
    """`error` in one line, where it is the disk's and a user can mend it."""
    try:
        with writing(Path(getattr(error, "filename", None) or "the disk")):
            raise error
    except InputError as line:
        return line
    except Exception:
        return None


def say(line: str) -> None:
    """One line on stderr, in one piece, so that it does not mix with what other processes say there."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _say(line: str, status: int) -> int:
    say(line)
    return status


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated
