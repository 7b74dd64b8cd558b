"""Roles on this machine: found ports, readiness, last words, and nothing left behind on any way out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness.launch import File, Here, Http, Launch, LogLine, Role, RoleDiedError, RoleLateError, RoleLostError, Tcp
from harness.launch.errors import LaunchError
from systems.registry import InputError

SERVE = """
    import http.server, sys
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def python(code: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code), *words)


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_client_starts_when_its_server_is_ready_and_reaches_it_at_the_port_that_was_found(tmp_path: Path) -> None:
    server = Role("server", python(SERVE, "{port.http}"), ports=("http",), ready=Http("http", "/"))
    ask = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).status); open('answer.txt', 'w').write('yes')"
    client = Role("client", python(ask, "http://{server.http}/"), needs=("server",), lasts=False, collect=("*.txt",))
    with Launch([client, server], tmp_path) as launch:
        launch.wait("client", timeout_s=60)
        assert launch.ports["server"][1]["http"] > 0
    assert (tmp_path / "client.log").read_text() == "200\n"
    assert (tmp_path / "client" / "answer.txt").read_text() == "yes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client", "client.log", "server.log"]


def test_two_launches_side_by_side_have_ports_of_their_own(tmp_path: Path) -> None:
    def server() -> Role:
        return Role("server", python(SERVE, "{port.http}"), ports=("http",), ready=Tcp("http"))

    with Launch([server()], tmp_path / "a") as one, Launch([server()], tmp_path / "b") as other:
        assert one.ports["server"] != other.ports["server"]


@pytest.mark.parametrize(
    ("code", "probe"),
    [
        ("import time; time.sleep(0.3); open('up', 'w'); time.sleep(60)", File("up")),
        ("import time; time.sleep(0.3); print('it is up', flush=True); time.sleep(60)", LogLine("is u.")),
        ("import sys, time; time.sleep(0.3); sys.stderr.write('up\\n'); time.sleep(60)", LogLine("^up$")),
    ],
)
def test_readiness_by_a_file_and_by_a_line(tmp_path: Path, code: str, probe: File | LogLine) -> None:
    began = time.monotonic()
    with Launch([Role("slow", python(code), ready=probe)], tmp_path):
        assert time.monotonic() - began >= 0.3


def test_a_role_that_dies_while_starting_is_reported_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('loading'); sys.exit('no such model: llama-9')"
    role = Role("replica0", python(code), ports=("http",), ready=Http("http"))
    with pytest.raises(RoleDiedError) as error, Launch([role], tmp_path):
        pass
    assert str(error.value).count("\n") == 0
    assert "replica0 on this machine: ended" in str(error.value) and "no such model: llama-9" in str(error.value)


def test_a_lasting_role_that_dies_later_ends_the_wait(tmp_path: Path) -> None:
    server = Role(
        "server", python("import time; print('up', flush=True); time.sleep(0.5); raise SystemExit(3)"), ready=LogLine("up")
    )
    client = Role("client", python("import time; time.sleep(60)"), needs=("server",), lasts=False)
    with pytest.raises(RoleDiedError, match=r"server on this machine: ended too early .exit status 3."):  # noqa: SIM117
        with Launch([server, client], tmp_path) as launch:
            launch.wait("client")


def test_a_client_that_fails_is_an_error_and_a_signal_is_named(tmp_path: Path) -> None:
    client = Role("client", python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), lasts=False)
    with pytest.raises(RoleDiedError, match="signal 11"), Launch([client], tmp_path) as launch:
        launch.wait("client")


def test_a_role_that_is_never_ready_is_late_and_ended(tmp_path: Path) -> None:
    code = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
    role = Role("stuck", python(code), ready=File("never", limit_s=1.0))
    with pytest.raises(RoleLateError, match="not ready after 1 s"), Launch([role], tmp_path):
        pass
    assert gone(int((tmp_path / "stuck.log").read_text().split()[1]))


def test_what_cannot_be_started_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RoleLostError, match="cannot start: /no/such/program: No such file"):  # noqa: SIM117
        with Launch([Role("ghost", ("/no/such/program",))], tmp_path):
            pass
    with pytest.raises(LaunchError, match="cannot start"):  # noqa: SIM117
        with Launch([Role("ghost", ("true",), Here(python="/no/such/python"))], tmp_path):
            pass


STUBBORN = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    away = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True);"
    away += "time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", away], start_new_session=True)
    time.sleep(0.2)
    print(os.getpid(), flush=True)
    print("up", flush=True)
    time.sleep(600)
"""


def pids(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split() if line.isdigit()]


def test_a_role_that_ignores_sigterm_is_killed_with_its_children_that_left_its_session(tmp_path: Path) -> None:
    with Launch([Role("stubborn", python(STUBBORN), ready=LogLine("up"))], tmp_path, grace_s=0.3):
        until(lambda: len(pids(tmp_path / "stubborn.log")) == 2)
        assert not any(map(gone, pids(tmp_path / "stubborn.log")))
    assert all(map(gone, pids(tmp_path / "stubborn.log")))


def test_a_role_that_heeds_sigterm_has_its_last_word(tmp_path: Path) -> None:
    code = """
        import signal, sys, time
        def leave(*_):
            print("goodbye", flush=True); open("late.txt", "w").write("saved"); sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        print("up", flush=True)
        time.sleep(600)
    """
    with Launch([Role("polite", python(code), ready=LogLine("up"), collect=("*.txt",))], tmp_path):
        pass
    assert (tmp_path / "polite.log").read_text() == "up\ngoodbye\n"
    assert (tmp_path / "polite" / "late.txt").read_text() == "saved"


CONTROLLER = """
    import sys, threading
    from pathlib import Path
    from harness import cli
    from harness.launch import Launch, LogLine, Role
    role = lambda name: Role(name, (sys.executable, "-c", sys.argv[2]), ready=LogLine("up"))
    def main(argv):
        with Launch([role("one"), role("two")], Path(sys.argv[1]), grace_s=0.5):
            print("running", flush=True)
            if len(sys.argv) > 3:
                raise ValueError("an error")
            threading.Event().wait()
        return 0
    sys.exit(cli.run(main, []))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, "error"])
def test_nothing_runs_on_when_the_controller_ends_in_whatever_way(
    root: Path, tmp_path: Path, how: signal.Signals | str
) -> None:
    argv = [*python(CONTROLLER), str(tmp_path), textwrap.dedent(STUBBORN), *(["error"] if how == "error" else [])]
    controller = subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert controller.stdout is not None and controller.stdout.readline() == "running\n"
    running = pids(tmp_path / "one.log") + pids(tmp_path / "two.log")
    assert len(running) == 4
    if isinstance(how, signal.Signals):
        controller.send_signal(how)
    controller.communicate(timeout=60)
    assert controller.returncode != 0
    until(lambda: all(map(gone, running)))


def test_a_leash_that_is_killed_takes_its_role_along(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), os.getppid(), flush=True); print('up', flush=True); time.sleep(600)"
    with Launch([Role("role", python(code), ready=LogLine("up"))], tmp_path) as launch:
        role, leash = pids(tmp_path / "role.log")
        os.kill(leash, signal.SIGKILL)
        until(lambda: gone(role))
        with pytest.raises(RoleLostError, match="role on this machine: is gone"):
            launch.wait("role")


def test_much_output_goes_through_without_a_hole_and_without_much_memory(tmp_path: Path) -> None:
    code = "import sys\nfor i in range(200000): sys.stdout.write(f'{i:099}\\n')"
    with Launch([Role("talker", python(code), lasts=False)], tmp_path) as launch:
        before = psutil.Process().memory_info().rss
        launch.wait("talker", timeout_s=120)
        assert psutil.Process().memory_info().rss - before < 10e6
    with (tmp_path / "talker.log").open() as file:
        assert all(int(line) == number for number, line in enumerate(file))
    assert (tmp_path / "talker.log").stat().st_size == 200000 * 100


def test_a_role_that_leaves_a_daemon_behind_ends_with_it(tmp_path: Path) -> None:
    code = """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print(child.pid, flush=True)
    """
    with Launch([Role("parent", python(code), lasts=False)], tmp_path) as launch:
        launch.wait("parent", timeout_s=60)
        until(lambda: all(map(gone, pids(tmp_path / "parent.log"))))


def test_secrets_are_on_no_command_line(tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['TOKEN'][::-1] == 'hsuh-hsuh', flush=True); time.sleep(600)"
    with Launch([Role("role", python(code), env={"TOKEN": "hush-hush"}, ready=LogLine("True"))], tmp_path):
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        assert not any("hush-hush" in word for line in lines for word in line)


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ([Role("a", ("true",)), Role("a", ("true",))], "'a': give each role a name of its own"),
        ([Role("a", ("true",), needs=("b",))], "needs: 'b': use one of a"),
        ([Role("a", ("true",), needs=("b",)), Role("b", ("true",), needs=("a",))], "in a circle"),
        ([Role("a", ("true",), ready=Tcp("http"))], "'http': add it to `ports`"),
        ([Role("a", ())], "say what to run"),
    ],
)
def test_roles_that_do_not_fit_together_are_refused(tmp_path: Path, roles: list[Role], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", "\\(")):
        Launch(roles, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_port_that_there_is_not_is_refused_and_other_braces_stay(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a has no such port"):  # noqa: SIM117
        with Launch([Role("a", ("echo", "{a.grpc}"), ports=("http",))], tmp_path):
            pass
    told = json.dumps({"x": {"y": 1}})
    with Launch([Role("a", ("echo", told, "{b.c}"), lasts=False)], tmp_path) as launch:
        launch.wait("a", timeout_s=60)
    assert (tmp_path / "a.log").read_text() == f"{told} {{b.c}}\n"


def test_an_interrupted_start_ends_what_had_started(tmp_path: Path) -> None:
    one = Role(
        "one",
        python("import os, time; print(os.getpid(), flush=True); print('up', flush=True); time.sleep(600)"),
        ready=LogLine("up"),
    )
    two = Role("two", python("import time; time.sleep(600)"), needs=("one",), ready=File("never"))
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        until(lambda: (tmp_path / "one.log").exists() and len(pids(tmp_path / "one.log")) == 1)
        time.sleep(0.3)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), Launch([one, two], tmp_path):
        pass
    assert all(map(gone, pids(tmp_path / "one.log")))
