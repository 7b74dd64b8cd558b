"""Connecting to real SSH servers: who is let in, who is refused and in which words, and how long that may take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.inventory import Host, load_inventory
from harness.remote import (
    HostKeyError,
    LoginError,
    PlaceholderError,
    RemoteError,
    Timing,
    UnreachableError,
    connect,
    fan_out,
)
from tests.integration.ssh_hosts import ONCE, QUICK
from tests.labs.fixtures import running
from tests.labs.keys import new_key
from tests.labs.ssh_lab import SshLab

pytest_plugins = ["tests.integration.ssh_hosts"]


def refusal(host: Host, kind: type[RemoteError], timing: Timing = ONCE) -> str:
    with pytest.raises(kind) as caught:
        connect(host, timing=timing)
    assert type(caught.value) is kind
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{host.name}: ")
    return line


def test_a_host_with_the_pinned_key_is_connected_to(hosts: tuple[Host, ...]) -> None:
    gathered = fan_out(hosts, lambda host: connect(host, timing=QUICK).run(["hostname"]).stdout.strip())
    assert gathered.done == {"node01": "node01", "node02": "node02"} and not gathered.failed


def test_a_host_without_a_pinned_key_is_not_even_called(hosts: tuple[Host, ...]) -> None:
    stranger = hosts[0].model_copy(update={"host_key": None, "address": "10.77.0.99"})
    assert "harness.remote.trust" in refusal(stranger, HostKeyError)


def test_a_host_with_another_key_is_refused(hosts: tuple[Host, ...]) -> None:
    swapped = hosts[0].model_copy(update={"host_key": hosts[1].host_key})
    line = refusal(swapped, HostKeyError, QUICK)
    assert "shows another key than the pinned one" in line and "harness.remote.trust" in line


def test_a_host_whose_key_has_changed_is_refused_by_new_connections(lab: SshLab, hosts: tuple[Host, ...]) -> None:
    with connect(hosts[1], timing=QUICK) as before:
        new = lab.change_host_key(1)
        try:
            refusal(hosts[1], HostKeyError)
            assert before.run(["echo", "still here"]).stdout == "still here\n"
            assert connect(hosts[1].model_copy(update={"host_key": new}), timing=QUICK).run(["true"]).returncode == 0
        finally:
            _restore_key(lab, hosts[1])


def _restore_key(lab: SshLab, host: Host) -> None:
    """The lab cannot give an old key back: later tests of this module pin the new one."""
    object.__setattr__(host, "host_key", (lab.folder / "etc" / host.name / "key.pub").read_text().strip().rpartition(" ")[0])


def test_another_kind_of_key_than_the_pinned_one_is_refused(hosts: tuple[Host, ...], tmp_path: Path) -> None:
    import paramiko

    key = paramiko.ECDSAKey.generate()
    other = hosts[0].model_copy(update={"host_key": f"{key.get_name()} {key.get_base64()}"})
    with pytest.raises((HostKeyError, UnreachableError)):
        connect(other, timing=ONCE)


def test_a_key_that_the_host_does_not_know_is_refused_once(hosts: tuple[Host, ...], tmp_path: Path) -> None:
    new_key(tmp_path / "stranger", "stranger")
    line = refusal(hosts[0].model_copy(update={"key_file": str(tmp_path / "stranger")}), LoginError, QUICK)
    assert "authorized_keys" in line and str(tmp_path / "stranger") in line


def test_a_host_that_lets_nobody_in_any_more(lab: SshLab, hosts: tuple[Host, ...]) -> None:
    lab.refuse_key(0)
    try:
        refusal(hosts[0], LoginError, QUICK)
    finally:
        lab.accept_key(0)


def test_a_user_that_the_host_does_not_have(hosts: tuple[Host, ...]) -> None:
    assert "nobody-here@" in refusal(hosts[0].model_copy(update={"user": "nobody-here"}), LoginError)


@pytest.mark.parametrize(
    "text", [None, "no key at all", "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----"]
)
def test_a_key_file_that_is_none(hosts: tuple[Host, ...], tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "key").write_text(text)
    assert "key_file" in refusal(hosts[0].model_copy(update={"key_file": str(tmp_path / "key")}), LoginError)


def test_a_key_with_a_passphrase(hosts: tuple[Host, ...], tmp_path: Path) -> None:
    import subprocess

    key = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "a passphrase", "-f", key], check=True)
    assert "agent" in refusal(hosts[0].model_copy(update={"key_file": str(key)}), LoginError)


def test_a_placeholder_is_never_called(hosts: tuple[Host, ...]) -> None:
    refusal(hosts[0].model_copy(update={"placeholder": True}), PlaceholderError)


def test_nobody_at_the_address(hosts: tuple[Host, ...]) -> None:
    nobody = hosts[0].model_copy(update={"address": "10.77.0.99"})
    began = time.monotonic()
    refusal(nobody, UnreachableError, Timing(connect_s=0.5, attempts=2, backoff_s=0.1))
    assert time.monotonic() - began < 10  # bounded, whatever the network says


def test_nobody_at_the_port(hosts: tuple[Host, ...]) -> None:
    assert ":2" in refusal(hosts[0].model_copy(update={"port": 2}), UnreachableError)


def test_a_host_that_is_cut_off(lab: SshLab, hosts: tuple[Host, ...]) -> None:
    lab.cut(0)
    try:
        refusal(hosts[0], UnreachableError)
    finally:
        lab.join(0)
    assert connect(hosts[0], timing=QUICK).run(["true"]).returncode == 0


def test_a_host_that_accepts_and_never_answers(lab: SshLab, hosts: tuple[Host, ...], capfd: pytest.CaptureFixture[str]) -> None:
    lab.hang(0)
    try:
        assert "no SSH server answered" in refusal(hosts[0], UnreachableError)
    finally:
        lab.thaw(0)
    assert connect(hosts[0], timing=QUICK).run(["true"]).returncode == 0
    assert capfd.readouterr().err == ""  # the library's threads keep their tracebacks to themselves


def test_a_host_that_comes_up_meanwhile_is_tried_again(lab: SshLab, hosts: tuple[Host, ...]) -> None:
    lab.start_slowly(0, 1.0)
    patient = Timing(connect_s=3.0, attempts=8, backoff_s=0.2)
    with connect(hosts[0], timing=patient) as remote:
        assert remote.run(["hostname"]).stdout == "node01\n"


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[tuple[SshLab, tuple[Host, ...]]]:
    """One host that is reached through a jump host alone."""
    with running(SshLab(tmp_path / "lab", hosts=1, jump=True, disk_mib=64)) as lab, lab.inside():
        assert lab.jump is not None
        from tests.labs.inventory import entry

        told = {"hosts": [entry(lab.jump, runner={"kind": "none"}), entry(lab.hosts[0], jump="jump")]}
        import yaml

        path = tmp_path / "hosts.yaml"
        path.write_text(yaml.safe_dump(told))
        yield lab, load_inventory(path).hosts


def test_through_a_jump_host(behind: tuple[SshLab, tuple[Host, ...]], tmp_path: Path) -> None:
    lab, (jump, host) = behind
    direct = host.model_copy(update={"jump": None})
    direct._via = None
    refusal(direct, UnreachableError)
    with connect(host, timing=QUICK) as remote:
        assert remote.run(["hostname"]).stdout == "node01\n"
        (tmp_path / "f").write_text("x" * 100_000)
        remote.put_file(tmp_path / "f", "/srv/fivefold/f")
        lab.hang(0)  # its kernel still answers: only asking the host itself shows that nobody is there
        try:
            with pytest.raises(RemoteError, match="fell silent"):
                remote.run(["echo", "anybody?"], timeout_s=30)
        finally:
            lab.thaw(0)
    wrong = host.model_copy(update={"host_key": jump.host_key})
    wrong._via = host.via
    refusal(wrong, HostKeyError)
    lab.cut(0)
    refusal_at_the_end = host.model_copy()
    refusal_at_the_end._via = host.via
    refusal(refusal_at_the_end, UnreachableError)
    lab.join(0)
    swapped = jump.model_copy(update={"host_key": host.host_key})
    blocked = host.model_copy()
    blocked._via = swapped
    with pytest.raises(HostKeyError, match=r"^jump: "):
        connect(blocked, timing=ONCE)
