"""Files to and from real hosts: whole and checked, or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from harness.inventory import Host
from harness.remote import LostError, Remote, RemoteError, TransferError, connect
from tests.integration.ssh_hosts import QUICK, Traps
from tests.labs.ssh_lab import SshLab

pytest_plugins = ["tests.integration.ssh_hosts"]
THERE = "/srv/fivefold/tree"


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def temporaries(lab: SshLab) -> list[str]:
    return [path.name for path in lab.hosts[0].root.rglob(".fivefold-*")]


def test_a_tree_goes_there_and_comes_back(lab: SshLab, remote: Remote, traps: Traps, tmp_path: Path) -> None:
    names = [text.replace("/", "_") for text in traps.texts]
    files = {f"sub/{name}": name.encode() for name in names} | {
        "empty": b"",
        "a\\b": b"x",
        "-rf": b"y",
        "big": bytes(3_000_000),
    }
    local = make(tmp_path / "local", files)
    (local / "run.sh").write_text("#!/bin/sh\n")
    (local / "run.sh").chmod(0o755)
    make(local, {"left/out.pyc": b"", "__pycache__/x": b""})
    remote.put_tree(local, THERE, exclude=["*.pyc", "__pycache__"])
    remote.get_tree(THERE, tmp_path / "back")
    assert content(tmp_path / "back") == files | {"run.sh": b"#!/bin/sh\n"}
    assert (tmp_path / "back" / "run.sh").stat().st_mode & 0o111 and not (tmp_path / "back" / "big").stat().st_mode & 0o111
    assert not traps.sprung() or all(path.parent.name == "sub" for path in traps.sprung())
    assert not temporaries(lab) and not list(tmp_path.glob(".*"))


def test_a_tree_replaces_the_one_that_was_there(lab: SshLab, remote: Remote, tmp_path: Path) -> None:
    remote.put_tree(make(tmp_path / "one", {"a": b"1", "b": b"1"}), THERE)
    remote.put_tree(make(tmp_path / "two", {"b": b"2"}), THERE)
    assert content(lab.hosts[0].root / "tree") == {"b": b"2"}
    remote.get_tree(THERE, tmp_path / "one")
    assert content(tmp_path / "one") == {"b": b"2"} and not temporaries(lab)


def test_a_file_goes_there_and_comes_back(lab: SshLab, remote: Remote, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    remote.put_file(make(tmp_path, {"f": data}) / "f", "/srv/fivefold/new/folder/f")
    remote.get_file("/srv/fivefold/new/folder/f", tmp_path / "back" / "g")
    assert (tmp_path / "back" / "g").read_bytes() == data and not temporaries(lab)


@pytest.mark.parametrize("path", ["/no/such/thing", "/srv/fivefold/-x"])
def test_what_is_not_there_cannot_be_had_and_leaves_nothing(remote: Remote, tmp_path: Path, path: str) -> None:
    with pytest.raises(TransferError, match="cannot be read"):
        remote.get_file(path, tmp_path / "f")
    with pytest.raises(TransferError, match="cannot be read"):
        remote.get_tree(path, tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_out_of_a_tree_is_refused(remote: Remote, tmp_path: Path) -> None:
    remote.run(["sh", "-c", "rm -rf /srv/fivefold/bad && mkdir /srv/fivefold/bad && ln -s /etc/passwd /srv/fivefold/bad/x"])
    with pytest.raises(TransferError):
        remote.get_tree("/srv/fivefold/bad", tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(lab: SshLab, remote: Remote, tmp_path: Path) -> None:
    remote.put_tree(make(tmp_path / "old", {"a": b"old"}), THERE)
    lab.fill_disk(0, 1_000_000)
    try:
        with pytest.raises(TransferError, match="node01: disk full: free some space there"):
            remote.put_tree(make(tmp_path / "new", {"a": bytes(5_000_000)}), THERE)
        with pytest.raises(TransferError, match="disk full"):
            remote.put_file(tmp_path / "new" / "a", "/srv/fivefold/f")
    finally:
        lab.free_disk(0)
    assert content(lab.hosts[0].root / "tree") == {"a": b"old"} and not temporaries(lab)


def test_a_damaged_file_is_noticed(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.remote import trees

    local = make(tmp_path / "local", {"a": b"right"})
    told = trees.files_in(local)
    (local / "a").write_bytes(b"wrong")
    with pytest.raises(TransferError, match="did not arrive whole"):
        trees.put(remote, told, THERE)


@pytest.mark.parametrize("fault", ["cut", "kill_sshd", "hang"])
def test_a_transfer_that_is_cut_off_leaves_what_was_there(
    lab: SshLab, hosts: tuple[Host, ...], tmp_path: Path, fault: str
) -> None:
    new = make(tmp_path / "new", {"a": bytes(150_000_000)})
    mend = {"cut": lab.join, "hang": lab.thaw, "kill_sshd": lab.start_sshd}[fault]
    with connect(hosts[0], timing=QUICK) as remote:
        remote.put_tree(make(tmp_path / "old", {"a": b"old"}), THERE)
        begun, strike = threading.Event(), getattr(lab, fault)

        def when_under_way() -> None:
            while not any(path.stat().st_size > 1_000_000 for path in lab.hosts[0].root.rglob(".fivefold-*/tree/a")):
                if begun.wait(0.01):
                    return
            strike(0)

        striker = threading.Thread(target=when_under_way)
        striker.start()
        try:
            with pytest.raises(LostError):
                remote.put_tree(new, THERE)
        finally:
            begun.set()
            striker.join()
            mend(0)
    assert content(lab.hosts[0].root / "tree") == {"a": b"old"}
    with connect(hosts[0], timing=QUICK) as remote:
        remote.put_tree(tmp_path / "old", THERE)  # and the next one works
        remote.run(["sh", "-c", "rm -rf /srv/fivefold/.fivefold-*"])


def test_what_comes_back_is_whole_or_not_there(lab: SshLab, hosts: tuple[Host, ...], tmp_path: Path) -> None:
    with connect(hosts[0], timing=QUICK) as remote:
        remote.run(["sh", "-c", "mkdir -p /srv/fivefold/much && truncate -s 3G /srv/fivefold/much/a"])  # takes no memory
        old = make(tmp_path / "old", {"a": b"old"})
        done = threading.Event()

        def kill_when_some_has_come() -> None:
            while not any(path.is_file() for path in tmp_path.glob(".*/**/a")) and not done.wait(0.01):
                pass
            lab.kill_sshd(0)

        killer = threading.Thread(target=kill_when_some_has_come)
        killer.start()
        try:
            with pytest.raises(RemoteError):
                remote.get_tree("/srv/fivefold/much", old)
        finally:
            done.set()
            killer.join()
            lab.start_sshd(0)
    assert content(old) == {"a": b"old"} and not list(tmp_path.glob(".*"))
