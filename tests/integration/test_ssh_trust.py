"""Pinning a host's key: shown first, recorded only on the word of the one who compared it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from harness.inventory import keys_file, load_inventory
from harness.remote import HostKeyError, connect, trust
from systems.registry import InputError
from tests.integration.ssh_hosts import ONCE
from tests.labs.fixtures import running
from tests.labs.inventory import entry
from tests.labs.ssh_lab import SshLab

pytest_plugins = ["tests.integration.ssh_hosts"]
Write = Callable[..., Path]


@pytest.fixture
def inventory(lab: SshLab, tmp_path: Path) -> Path:
    """Both hosts, neither of them pinned."""
    hosts = [entry(host) for host in lab.hosts]
    for host in hosts:
        del host["host_key"]
    path = tmp_path / "hosts.yaml"
    path.write_text(yaml.safe_dump({"hosts": hosts}))
    return path


def real_fingerprint(lab: SshLab, name: str) -> str:
    command = ["ssh-keygen", "-lf", lab.folder / "etc" / name / "key.pub"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


def test_looking_records_nothing(lab: SshLab, inventory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trust.main([str(inventory)]) == 1
    said = capsys.readouterr().out
    assert all(f"{name}: ssh-ed25519 {real_fingerprint(lab, name)}: not pinned" in said for name in ("node01", "node02"))
    assert not keys_file(inventory).exists()
    with pytest.raises(HostKeyError):
        connect(load_inventory(inventory).host("node01"), timing=ONCE)


def test_the_right_fingerprint_is_recorded_and_a_wrong_one_is_not(
    lab: SshLab, inventory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="nothing was recorded"):
        trust.main([str(inventory), "node01", "--accept", real_fingerprint(lab, "node02")])
    assert not keys_file(inventory).exists()
    assert trust.main([str(inventory), "node01", "--accept", real_fingerprint(lab, "node01")]) == 0
    assert connect(load_inventory(inventory).host("node01"), timing=ONCE).run(["hostname"]).stdout == "node01\n"
    assert load_inventory(inventory).host("node02").host_key is None
    assert trust.main([str(inventory), "node01"]) == 0 and ": pinned" in capsys.readouterr().out


def test_a_changed_key_is_shown_loudly_and_replaced_only_deliberately(
    lab: SshLab, inventory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust.main([str(inventory), "node02", "--accept", real_fingerprint(lab, "node02")])
    old = load_inventory(inventory).host("node02")
    lab.change_host_key("node02")
    assert trust.main([str(inventory), "node02"]) == 1
    assert "ANOTHER KEY THAN THE PINNED ONE" in capsys.readouterr().out
    assert load_inventory(inventory).host("node02") == old
    assert trust.main([str(inventory), "node02", "--accept", real_fingerprint(lab, "node02")]) == 0
    assert connect(load_inventory(inventory).host("node02"), timing=ONCE).run(["true"]).returncode == 0


def test_all_at_once_cannot_be_accepted(inventory: Path) -> None:
    for names in ([], ["node01", "node02"], ["node[01-02]"]):
        with pytest.raises(InputError, match="name one host"):
            trust.main([str(inventory), *names, "--accept", "SHA256:x"])


def test_a_key_in_the_file_itself_is_not_overruled(lab: SshLab, tmp_path: Path) -> None:
    path = tmp_path / "hosts.yaml"
    path.write_text(yaml.safe_dump({"hosts": [entry(lab.hosts[0], host_key=lab.hosts[1].host_key)]}))
    with pytest.raises(InputError, match="the file itself pins another key"):
        trust.main([str(path), "node01", "--accept", real_fingerprint(lab, "node01")])


def test_a_host_that_is_not_there_is_said_so(inventory: Path, capsys: pytest.CaptureFixture[str], lab: SshLab) -> None:
    lab.kill_sshd("node01")
    try:
        assert trust.main([str(inventory)]) == 1
    finally:
        lab.start_sshd("node01")
    assert "node01: 10.77.0.11:22: Connection refused" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_keys_of_other_kinds_are_pinned_and_accepted(lab: SshLab, inventory: Path, kind: str) -> None:
    key = lab.folder / "etc" / "node01" / "key"
    before = {path: path.read_bytes() for path in (key, key.with_suffix(".pub"))}
    try:
        for path in before:
            path.unlink()
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", key], check=True)
        lab.kill_sshd("node01")
        lab.start_sshd("node01")
        assert trust.main([str(inventory), "node01", "--accept", real_fingerprint(lab, "node01")]) == 0
        pinned = load_inventory(inventory).host("node01")
        assert pinned.host_key is not None and kind in pinned.host_key.partition(" ")[0]
        assert trust.main([str(inventory), "node01"]) == 0
        assert connect(pinned, timing=ONCE).run(["true"]).returncode == 0
    finally:
        for path, data in before.items():
            path.write_bytes(data)
        lab.kill_sshd("node01")
        lab.start_sshd("node01")


def test_a_host_behind_a_jump_host_is_looked_at_through_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(SshLab(tmp_path / "lab", hosts=1, jump=True, disk_mib=64)) as lab, lab.inside():
        assert lab.jump is not None
        node = entry(lab.hosts[0], jump="jump")
        del node["host_key"]
        path = tmp_path / "hosts.yaml"
        path.write_text(yaml.safe_dump({"hosts": [entry(lab.jump, runner={"kind": "none"}), node]}))
        assert trust.main([str(path), "node01"]) == 1
        assert real_fingerprint(lab, "node01") in capsys.readouterr().out
        assert trust.main([str(path), "node01", "--accept", real_fingerprint(lab, "node01")]) == 0
        assert connect(load_inventory(path).host("node01"), timing=ONCE).run(["hostname"]).stdout == "node01\n"
