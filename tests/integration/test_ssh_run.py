"""Commands on real hosts: exactly the words that were given, once, with an end in every case."""

from __future__ import annotations

import threading
import time

import pytest

from harness.inventory import Host
from harness.references import HIDDEN
from harness.remote import CommandFailedError, CommandTimeoutError, Console, LostError, Remote, connect, fan_out
from tests.integration.ssh_hosts import QUICK, Traps
from tests.labs.processes import wait_for
from tests.labs.ssh_lab import SshLab

pytest_plugins = ["tests.integration.ssh_hosts"]


def test_words_arrive_as_they_are(remote: Remote, traps: Traps) -> None:
    words = [*traps.texts, "", " ", "-n", "\\n", "~", "*", "a\\\nb", "'\"'"]
    ran = remote.run(["printf", "%s\\0", *words], cwd="/srv/fivefold", env={"X": traps.texts[0]})
    assert ran.stdout.split("\0")[:-1] == words
    assert remote.run(["sh", "-c", 'printf %s "$X"'], env={"X": "\n".join(traps.texts)}).stdout == "\n".join(traps.texts)
    assert not traps.sprung()


def test_a_folder_with_a_strange_name_is_entered(remote: Remote, traps: Traps) -> None:
    for text in traps.texts[:5]:
        folder = f"/srv/fivefold/{text.replace('/', '_')}"
        remote.run(["mkdir", "-p", folder])
        assert remote.run(["pwd"], cwd=folder).stdout == f"{folder}\n"
    assert {path.name for path in traps.sprung()} <= set()
    assert remote.run(["pwd"], cwd="~").stdout.strip() == remote.home == remote.path("~")


def test_status_and_both_streams(remote: Remote) -> None:
    lines: list[str] = []
    ran = remote.run(["sh", "-c", "echo out; echo err >&2; printf end; exit 7"], check=False, on_line=lines.append)
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "out\nend", "err\n")
    assert sorted(lines) == ["end", "err", "out"]
    with pytest.raises(CommandFailedError, match=r"node01: sh -c .*exit status 7: err") as caught:
        remote.run(["sh", "-c", "echo err >&2; exit 7"])
    assert caught.value.returncode == 7
    assert remote.run(["cat"], stdin=[b"a\n", b"b"]).stdout == "a\nb"
    assert remote.run(["cat"]).stdout == ""
    with pytest.raises(CommandFailedError, match="exit status 127"):
        remote.run(["no-such-program"])
    with pytest.raises(CommandFailedError, match="exit status 126"):
        remote.run(["true"], cwd="/no/such/folder")


def test_what_a_host_says_cannot_forge_lines_of_another(hosts: tuple[Host, ...], capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(hosts)
    with connect(hosts[0], timing=QUICK) as remote:
        remote.run(["printf", "a\\rnode02 | b\\033[2J\\n"], on_line=console.of(hosts[0]))
    assert capsys.readouterr().err == "node01 | a?node02 | b?[2J\n"


def test_a_command_that_takes_too_long_is_ended_with_its_children(lab: SshLab, remote: Remote) -> None:
    with pytest.raises(CommandTimeoutError, match=r"no end after 0\.5 s"):
        remote.run(["sh", "-c", "trap '' TERM; sleep 4321 & sleep 4321; sleep 4321"], timeout_s=0.5)
    wait_for(lambda: "sleep 4321" not in lab.on(0, ["ps", "-ww", "-eo", "args"]).stdout, "end of the sleeps", timeout_s=5)
    assert remote.run(["echo", "on"]).stdout == "on\n"


def test_a_login_shell_that_runs_nothing_is_quoted(lab: SshLab, hosts: tuple[Host, ...]) -> None:
    """`command=` in authorized_keys does what a shell such as nologin does."""
    keys = lab.folder / "etc" / "node02" / "authorized_keys"
    keys.write_text(f'command="echo This account is not available; exit 1" {keys.read_text()}')
    try:
        with (
            connect(hosts[1], timing=QUICK) as remote,
            pytest.raises(CommandFailedError, match="exit status 1: This account is not available"),
        ):
            remote.run(["true"])
    finally:
        lab.accept_key(1)


def appended(lab: SshLab) -> str:
    path = lab.hosts[0].root / "ran"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("fault", ["cut", "hang", "kill_sshd"])
def test_a_connection_that_is_lost_during_a_command(lab: SshLab, hosts: tuple[Host, ...], fault: str) -> None:
    before = appended(lab)
    mend = {"cut": lab.join, "hang": lab.thaw, "kill_sshd": lab.start_sshd}[fault]
    with connect(hosts[0], timing=QUICK) as remote:
        timer = threading.Timer(1.0, getattr(lab, fault), [0])
        timer.start()
        began = time.monotonic()
        try:
            with pytest.raises(LostError, match="it may have run: look before"):
                remote.run(["sh", "-c", "echo once >>/srv/fivefold/ran; sleep 60"])
            assert time.monotonic() - began < 30
            with pytest.raises(LostError, match="connect again"):
                remote.run(["true"])
        finally:
            timer.join()
            mend(0)
    assert appended(lab) == before + "once\n"  # run, and not run again
    assert connect(hosts[0], timing=QUICK).run(["true"]).returncode == 0


def test_a_connection_that_was_cut_before_and_after_a_command(lab: SshLab, hosts: tuple[Host, ...]) -> None:
    before = appended(lab)
    with connect(hosts[0], timing=QUICK) as remote:
        remote.run(["sh", "-c", "echo once >>/srv/fivefold/ran"])
        lab.cut(0)
        try:
            with pytest.raises(LostError):
                remote.run(["sh", "-c", "echo never >>/srv/fivefold/ran"])
        finally:
            lab.join(0)
    assert appended(lab) == before + "once\n"


def test_a_host_that_fails_does_not_stop_the_others(lab: SshLab, hosts: tuple[Host, ...]) -> None:
    lab.kill_sshd(0)
    try:
        gathered = fan_out(hosts, lambda host: connect(host, timing=QUICK).run(["hostname"]).stdout)
    finally:
        lab.start_sshd(0)
    assert gathered.done == {"node02": "node02\n"} and list(gathered.failed) == ["node01"]


def test_a_secret_of_the_environment_is_seen_by_the_command_alone(lab: SshLab, hosts: tuple[Host, ...]) -> None:
    secret = "t0ps3cr3t-value"
    host = hosts[0].model_copy(update={"environment": {"MY_TOKEN": "env:MY_SECRET"}})
    host._where = "hosts.yaml"
    lines: list[str] = []
    script = (
        'echo "has $MY_TOKEN"; echo "$MY_TOKEN" | wc -c; touch /srv/fivefold/started; sleep 2; echo "$MY_TOKEN" >&2; exit 3'
    )
    failures: list[CommandFailedError] = []

    def work() -> None:
        with connect(host, timing=QUICK) as remote:
            try:
                remote.run(
                    ["sh", "-c", script], env=host.resolved_environment(environ={"MY_SECRET": secret}), on_line=lines.append
                )
            except CommandFailedError as error:
                failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: (lab.hosts[0].root / "started").exists(), "start of the command", timeout_s=10)
    processes = lab.on(0, ["ps", "-ww", "-eo", "args"]).stdout
    thread.join()
    assert "touch /srv/fivefold/started" in processes and secret not in processes
    assert lines == [f"has {HIDDEN}", str(len(secret) + 1), HIDDEN]  # it was there, and nobody was told
    assert secret not in str(failures[0]) + failures[0].stderr
    logs = "".join(path.read_text(errors="replace") for path in lab.logs.rglob("*") if path.is_file())
    assert secret not in logs
