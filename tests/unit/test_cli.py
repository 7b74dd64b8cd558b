"""What every command does around its work: the exit status, the one line, the log, the reader that goes away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import cli
from harness.streams import Lasting
from systems.registry import InputError

Main = Callable[[object], int]


def raising(error: BaseException) -> Main:
    def main(_argv: object) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        (lambda _: 0, 0, ""),
        (lambda _: 1, 1, ""),
        (raising(InputError("f", "key", 3, "use 4")), 2, "f: key: 3: use 4\n"),
        (raising(OSError(errno.ENOSPC, "No space", "results/x")), 2, "results/x: disk: 'full': free some space"),
        (raising(OSError(errno.ENOSPC, "No space")), 2, "the disk: disk: 'full': free some space"),
        (raising(KeyboardInterrupt()), 130, "interrupted; what is finished is kept\n"),
        (raising(cli.Terminated()), 143, "terminated; what is finished is kept\n"),
        (raising(ZeroDivisionError("oh")), 3, "Traceback (most recent call last):"),
    ],
)
def test_statuses_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Main, status: int, said: str) -> None:
    log = tmp_path / "logs" / "log"
    assert cli.run(main, ["--log", str(log)]) == status  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert err.startswith(said) and bool(err) == bool(said)
    assert log.read_text() == err
    assert not isinstance(sys.stderr, Lasting)


def test_the_log_is_taken_out_of_the_arguments(tmp_path: Path) -> None:
    seen: list[object] = []
    cli.run(lambda argv: seen.append(argv) or 0, ["a", "--log", str(tmp_path / "l"), "b"])  # type: ignore[func-returns-value]
    assert seen == [["a", "b"]]


def test_a_log_that_cannot_be_made_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.run(lambda _: 0, ["--log", str(tmp_path / "file" / "sub" / "log")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "file") in err


SPEAKER = """
import sys
from harness import cli
def main(argv):
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(3):
        cli.say("nobody reads this")
        print("nor this")
    return 7
raise SystemExit(cli.run(main, []))
"""


def test_a_command_outlives_its_readers(root: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SPEAKER], cwd=root, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        process.stderr.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(60) == 7


def test_sigterm_ends_a_command_by_the_way_out(root: Path) -> None:
    code = (
        "import signal; from harness import cli; print(cli.run(lambda _: (print('ready', flush=True), signal.pause())[0], []))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert out == "143\n" and err == "terminated; what is finished is kept\n"
