"""Roles on hosts with real SSH servers: where the controller, the network or the host goes away, nothing runs on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.inventory import Inventory, load_inventory
from harness.launch import Http, Launch, LogLine, Over, Role, RoleLostError
from tests.labs import LabUnavailableError
from tests.labs.ssh_lab import SshLab

pytestmark = pytest.mark.slow

LIMIT_S = 15.0
"""What the project promises."""
SERVE = """
import http.server, sys
http.server.HTTPServer(("0.0.0.0", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "stubborn-child"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""
CONTROLLER = """
import sys, threading
from pathlib import Path
from harness.inventory import load_inventory
from harness.launch import Launch, LogLine, Over, Role
hosts = load_inventory(Path(sys.argv[1])).hosts
argv = (sys.executable, "-c", sys.argv[3], "stubborn-role")
roles = [Role(host.name, argv, Over(host), ready=LogLine("up")) for host in hosts]
with Launch(roles, Path(sys.argv[2])):
    print("running", flush=True)
    threading.Event().wait()
"""


@pytest.fixture(scope="module")
def lab(root: Path) -> Iterator[SshLab]:
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"fivefold-launch-{os.getpid()}")
    try:
        with SshLab(folder, hosts=2, hide=[str(root)], keep=[sys.prefix]) as lab:
            yield lab
    except LabUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def inventory(lab: SshLab, tmp_path: Path) -> Inventory:
    return load_inventory(lab.inventory(tmp_path / "lab.yaml"))


def stubborn(lab: SshLab, host: str) -> int:
    """How many of its processes run on the host."""
    lines = lab.on(host, ["ps", "-e", "-o", "args", "-ww"]).stdout.replace("\\n", "\n").splitlines()
    return sum(line.endswith(("stubborn-child", "stubborn-role")) for line in lines)


def until(condition: Callable[[], object], seconds: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.1)
    return time.monotonic() - began


def test_a_client_on_one_host_asks_a_server_on_another(lab: SshLab, inventory: Inventory, tmp_path: Path) -> None:
    one, two = inventory.hosts
    argv = (sys.executable, "-c", SERVE, "{port.http}")
    server = Role("server", argv, Over(one), ports=("http",), ready=Http("http", "/"))
    ask = "import sys, urllib.request as u; open('answer', 'w').write(str(u.urlopen(sys.argv[1]).status))"
    client = Role(
        "client",
        (sys.executable, "-c", ask, "http://{server.http}/"),
        Over(two),
        needs=("server",),
        lasts=False,
        collect=("answer",),
    )
    with lab.inside(), Launch([server, client], tmp_path / "out") as launch:
        launch.wait("client", timeout_s=60)
    assert (tmp_path / "out" / "client" / "answer").read_text() == "200"
    for host in lab.hosts:
        assert not list((host.root / "launch").glob("*/*")), "nothing is left on the hosts"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_runs_on_when_the_controller_is_killed(
    lab: SshLab, inventory: Inventory, root: Path, tmp_path: Path, how: signal.Signals
) -> None:
    argv = [sys.executable, "-c", CONTROLLER, str(tmp_path / "lab.yaml"), str(tmp_path / "out"), STUBBORN]
    controller = subprocess.Popen(lab.command(argv, root), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert controller.stdout is not None and controller.stdout.readline() == "running\n"
    try:
        assert [stubborn(lab, host.name) for host in lab.hosts] == [2, 2]
        controller.send_signal(how)
        until(lambda: not any(stubborn(lab, host.name) for host in lab.hosts), LIMIT_S)
        controller.wait(60)
    finally:
        controller.kill()


def test_nothing_runs_on_when_the_network_is_cut_and_the_controller_says_whom_it_lost(
    lab: SshLab, inventory: Inventory, tmp_path: Path
) -> None:
    role = Role("replica0", (sys.executable, "-c", STUBBORN, "stubborn-role"), Over(inventory.hosts[0]), ready=LogLine("up"))
    with lab.inside(), Launch([role], tmp_path / "out") as launch:
        lab.cut(0)
        try:
            until(lambda: not stubborn(lab, "node01"), LIMIT_S)
            with pytest.raises(RoleLostError, match="replica0 on node01"):
                launch.wait("replica0", timeout_s=60)
        finally:
            lab.join(0)


def test_a_host_that_loses_power_is_reported(lab: SshLab, inventory: Inventory, tmp_path: Path) -> None:
    role = Role("replica0", (sys.executable, "-c", STUBBORN), Over(inventory.hosts[1]), ready=LogLine("up"))
    try:
        with lab.inside(), Launch([role], tmp_path / "out") as launch:
            lab.kill(1)
            with pytest.raises(RoleLostError, match=r"replica0 on node02: .*: is the host up"):
                launch.wait("replica0", timeout_s=60)
    finally:
        lab.boot(1)


def test_a_start_of_forty_seconds_is_waited_for(lab: SshLab, inventory: Inventory, tmp_path: Path) -> None:
    """A probe of 30 s once killed a healthy server while it captured CUDA graphs."""
    slow = f"import time; time.sleep(40)\n{SERVE}"
    server = Role(
        "server",
        (sys.executable, "-c", slow, "{port.http}"),
        Over(inventory.hosts[0]),
        ports=("http",),
        ready=Http("http", "/"),
    )
    began = time.monotonic()
    with lab.inside(), Launch([server], tmp_path / "out"):
        assert time.monotonic() - began >= 40


def test_two_controllers_on_one_host_do_not_disturb_each_other(lab: SshLab, inventory: Inventory, tmp_path: Path) -> None:
    def server() -> Role:
        argv = (sys.executable, "-c", SERVE, "{port.http}")
        return Role("server", argv, Over(inventory.hosts[0]), ports=("http",), ready=Http("http", "/"))

    with lab.inside(), Launch([server()], tmp_path / "b") as other:
        with Launch([server()], tmp_path / "a") as one:
            assert one.ports["server"][1]["http"] != other.ports["server"][1]["http"]
        ask = textwrap.dedent(f"import urllib.request as u; u.urlopen('http://127.0.0.1:{other.ports['server'][1]['http']}/')")
        lab.on("node01", [sys.executable, "-c", ask])


def test_words_that_a_shell_would_obey_arrive_as_they_are(lab: SshLab, inventory: Inventory, tmp_path: Path) -> None:
    nasty = "'; touch PWNED #$(touch PWNED)`touch PWNED`\n\u00fc\u2603"
    show = "import json, os, sys; print(json.dumps([sys.argv[1], os.environ['NASTY']]))"
    role = Role("role", (sys.executable, "-c", show, nasty), Over(inventory.hosts[0]), env={"NASTY": nasty}, lasts=False)
    with lab.inside(), Launch([role], tmp_path / "out") as launch:
        launch.wait("role", timeout_s=60)
    import json

    assert json.loads((tmp_path / "out" / "role.log").read_text()) == [nasty, nasty]
    assert not list(lab.hosts[0].root.rglob("PWNED"))
