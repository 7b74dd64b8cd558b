"""What is sent to hosts and what comes back, as far as no host is needed for it."""

from __future__ import annotations

import pickle
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.references import HIDDEN
from harness.remote import CommandFailedError, HostKeyError, RemoteError, Timing, command, fan_out
from harness.remote.errors import one_line
from harness.remote.exchange import Greeted, Lines
from harness.remote.masking import Mask
from harness.remote.trees import _sum_line, files_in
from harness.remote.trust import fingerprint
from systems.registry import InputError

WORDS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=30)


def test_no_other_policy_for_host_keys_is_anywhere_in_the_code(root: Path) -> None:
    """Fabric's default accepts every key: one call replaces it, in the one function that connects."""
    found: dict[str, list[str]] = {}
    for folder in ("harness", "systems", "figures", "benchmarks", "workflows", "containers"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".smk", ".j2", ".sh", ".yaml") and "__pycache__" not in path.parts:
                text = path.read_text(errors="replace")
                for word in (
                    "AutoAddPolicy",
                    "WarningPolicy",
                    "MissingHostKeyPolicy",
                    "set_missing_host_key_policy",
                    "RejectPolicy",
                ):
                    if word in text:
                        found.setdefault(word, []).append(path.relative_to(root).as_posix())
                assert not re.search(r"StrictHostKeyChecking[\s=:\"',]*(no|off|accept-new)", text, re.I), path
                assert not re.search(r"load_system_host_keys|forward_agent=True|SSHClient\(\)", text), path
                if path.relative_to(root).as_posix() not in ("harness/remote/connect.py",):
                    assert not re.search(r"^\s*(from|import) fabric\b", text, re.M), path
    assert found == {
        "set_missing_host_key_policy": ["harness/remote/connect.py"],
        "RejectPolicy": ["harness/remote/connect.py"],
    }


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=5), WORDS)
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_any_words_pass_through_any_shell(shell: str, words: list[str], value: str) -> None:
    line = command.line(["printf", "%s\\0", *words], environment={"V": value}, cwd="/", greeting="hello", stdin=True)
    assert "\n" not in line
    done = subprocess.run([shell, "-c", command.BOOTSTRAP], input=(line + "\n").encode(), capture_output=True, check=True)
    greeting, _, rest = done.stdout.partition(b"\n")
    assert greeting.startswith(b"hello ") and rest == b"".join(word.encode() + b"\0" for word in words)
    line = command.line(["sh", "-c", 'printf %s "$V"; cat'], environment={"V": value}, stdin=True)
    told = subprocess.run(
        [shell, "-c", command.BOOTSTRAP], input=line.encode() + b"\nthe rest", capture_output=True, check=True
    )
    assert told.stdout == value.encode() + b"the rest"


def test_a_home_folder_is_the_hosts_and_nothing_else_is_expanded() -> None:
    assert command.folder("~/a b") == "\"$HOME\"/'a b'" and command.folder("~") == '"$HOME"'
    assert command.folder("/~/$(x)") == "'/~/$(x)'"
    with pytest.raises(ValueError, match="zero byte"):
        command.quote("a\0b")


def test_the_environment_is_on_no_command_line() -> None:
    assert "$V" not in command.BOOTSTRAP and "secret" not in command.BOOTSTRAP


@given(st.binary(max_size=60), st.integers(1, 7))
def test_what_comes_before_the_greeting_is_dropped_however_it_is_cut(data: bytes, size: int) -> None:
    class Kept:
        def __init__(self) -> None:
            self.data = b""

        def write(self, data: bytes) -> None:
            self.data += data

        def close(self) -> None: ...

    kept, noise = Kept(), b"Welcome to gpu1\nfivefold\n"
    greeted = Greeted("fivefold-1", kept)
    stream = noise + b"fivefold-1 4711\n" + data
    for place in range(0, len(stream), size):
        greeted.write(stream[place : place + size])
    assert (greeted.process, kept.data) == (4711, data)


@given(st.text(max_size=80), st.integers(1, 5))
def test_lines_are_said_once_whole_and_in_order(text: str, size: int) -> None:
    said: list[str] = []
    lines, data = Lines(said.append), text.encode("utf-8", "replace")
    for place in range(0, len(data), size):
        lines.write(data[place : place + size])
    lines.close()
    whole = data.decode()
    assert lines.text == whole
    assert said == [line.removesuffix("\r") for line in (whole.split("\n") if whole else [])][: len(said)]
    assert len(said) == whole.count("\n") + (not whole.endswith("\n") and bool(whole))


@given(st.text(min_size=4, max_size=20), st.text(max_size=10), st.text(max_size=10))
def test_no_secret_survives_a_mask(secret: str, before: str, after: str) -> None:
    shown = Mask([secret])(f"{before}{secret}{after}")
    assert secret not in shown or secret in HIDDEN or secret in f"{before}{HIDDEN}{after}"


def test_a_secret_of_several_lines_is_hidden_line_by_line() -> None:
    mask = Mask(["first line\nsecond line", "abc"])
    assert mask("x second line y") == f"x {HIDDEN} y" and mask("abc") == "abc" and not Mask([])


def test_errors_are_one_printable_line_and_survive_a_trip_between_processes() -> None:
    error = CommandFailedError("gpu1", "ls: \x1b[2J bad\nthing", "look", 3, "long")
    assert str(error) == "gpu1: ls: [2J bad thing: look" and isinstance(error, InputError)
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.returncode, type(back)) == (str(error), 3, CommandFailedError)
    other = pickle.loads(pickle.dumps(HostKeyError("a", "b", "c")))
    assert type(other) is HostKeyError and str(other) == "a: b: c"
    assert len(one_line("x" * 1000)) == 400


def test_a_mistake_in_the_program_is_no_hosts_failure(tmp_path: Path) -> None:
    from harness.inventory import Host

    hosts = [Host(name=name, local=True) for name in ("a", "b")]

    def fail(host: Host) -> str:
        if host.name == "a":
            raise RemoteError("a", "x", "y")
        return host.name

    gathered = fan_out(hosts, fail)
    assert gathered.done == {"b": "b"} and str(gathered.failed["a"]) == "a: x: y"
    with pytest.raises(ZeroDivisionError):
        fan_out(hosts, lambda host: 1 / 0)


def test_pauses_grow() -> None:
    timing = Timing(backoff_s=1.0)
    assert all(2**n <= timing.pause_s(n) <= 1.5 * 2**n for n in range(5))


@given(st.text(st.characters(blacklist_characters="\0/", blacklist_categories=("Cs",)), min_size=1, max_size=12))
def test_digests_are_written_as_sha256sum_reads_them(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("sums")
    if name in (".", ".."):
        return
    (folder / name).write_text("x")
    (found,) = files_in(folder).items()
    line = _sum_line(*(found[0], found[1].sha256)) + "\n"
    done = subprocess.run(["sha256sum", "--check", "--strict"], input=line.encode(), cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_patterns_leave_files_and_folders_out(tmp_path: Path) -> None:
    for name in ("a.py", "b.pyc", "deep/c.py", "deep/__pycache__/d", "out/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(files_in(tmp_path, ["*.pyc", "__pycache__", "out"])) == ["a.py", "deep/c.py"]
    with pytest.raises(InputError, match="no such folder"):
        files_in(tmp_path / "none")


def test_a_fingerprint_is_that_of_openssh(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "k"], check=True)
    told = subprocess.run(["ssh-keygen", "-lf", tmp_path / "k.pub"], capture_output=True, text=True, check=True).stdout
    assert fingerprint(" ".join((tmp_path / "k.pub").read_text().split()[:2])) == told.split()[1]
