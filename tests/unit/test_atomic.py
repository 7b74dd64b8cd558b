"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from harness import atomic
from harness.atomic import atomic_folder, write_atomically
from systems.registry import InputError


def test_writes_text_and_bytes_and_makes_folders(tmp_path):
    target = tmp_path / "a" / "b.txt"
    write_atomically(target, "é\n")
    assert target.read_bytes() == "é\n".encode()
    write_atomically(target, b"\x00\x01")
    assert target.read_bytes() == b"\x00\x01"
    assert [p.name for p in target.parent.iterdir()] == ["b.txt"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def fail_sync(monkeypatch, number):
    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic, "_sync", refuse)


@pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")])
def test_full_disk_leaves_the_old_file_and_one_clear_line(tmp_path, monkeypatch, number, word):
    target = tmp_path / "table.csv"
    write_atomically(target, "old")
    fail_sync(monkeypatch, number)
    with pytest.raises(InputError, match=word) as caught:
        write_atomically(target, "new")
    assert str(caught.value).startswith(str(target)) and "\n" not in str(caught.value)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_other_errors_pass_and_leave_nothing(tmp_path, monkeypatch):
    fail_sync(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_atomically(tmp_path / "x", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(InputError):
        write_atomically(tmp_path / "results" / "x", "new")


def test_readers_never_see_half_a_file(tmp_path):
    target = tmp_path / "x"
    contents = [letter * 100_000 for letter in "ab"]
    write_atomically(target, contents[0])
    stop = threading.Event()
    seen: set[str] = set()

    def read():
        while not stop.is_set():
            seen.add(target.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_atomically(target, contents[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(contents)


def test_folder_appears_when_the_block_ends(tmp_path):
    final = tmp_path / "trials" / "abc"
    with atomic_folder(final) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "spec.json").write_text("{}")
        assert not final.exists()
        assert folder.parent == final.parent  # same file system, so that the rename is one step
    assert (final / "deep" / "spec.json").read_text() == "{}"
    assert [p.name for p in final.parent.iterdir()] == ["abc"]


def test_folder_vanishes_when_the_block_fails(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "abc") as folder:
        (folder / "spec.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_folder_that_another_run_finished_first_stays(tmp_path):
    final = tmp_path / "abc"
    with atomic_folder(final) as mine:
        (mine / "who").write_text("second")
        with atomic_folder(final) as theirs:
            (theirs / "who").write_text("first")
    assert (final / "who").read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


def test_full_disk_inside_a_folder(tmp_path):
    with pytest.raises(InputError, match="disk: 'full'"), atomic_folder(tmp_path / "abc"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_truly_full_device(tmp_path):
    with (
        pytest.raises(InputError, match="full"),
        atomic_folder(tmp_path / "abc"),
        Path("/dev/full").open("wb", buffering=0) as device,
    ):
        device.write(b"x")
