"""Provisioning hosts of the SSH lab: from bare to ready, again, after faults, and back to bare."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.inventory import Host, load_inventory
from harness.provision import code, facts
from harness.provision.__main__ import main
from harness.provision.far import Far, StepError
from harness.provision.layout import Layout
from harness.provision.steps import Plan, deprovision, provision
from harness.remote import LostError, TransferError, connect
from tests.integration.ssh_hosts import QUICK
from tests.labs.ssh_lab import SshLab

pytest_plugins = ["tests.integration.ssh_hosts"]

# A project whose environment takes no time: a link to this Python, and the marker that a complete one has.
ENVIRONMENT = """
import hashlib, os, pathlib, sys
root = pathlib.Path(__file__).resolve().parent.parent
told = {name: os.environ.get(name) for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "MY_TOKEN")}
(root / "told").write_text(repr(told))
wheels = pathlib.Path(told["PIP_FIND_LINKS"] or "/nowhere")
print("wheels:", *sorted(path.name for path in wheels.glob("*")), "token:", told["MY_TOKEN"], flush=True)
if (root / "broken").exists():
    sys.exit("no such package: nonesuch==1")
(root / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
(root / ".venv" / "bin" / "python").unlink(missing_ok=True)
(root / ".venv" / "bin" / "python").symlink_to(sys.executable)
key = hashlib.sha256((root / "requirements.lock").read_bytes() + b"\\0" + os.fsencode(root)).hexdigest()
(root / ".venv" / ".fivefold-ready-runtime").write_text(key + "\\n")
"""
METRICS = '{"a":1.5,"b":"x"}'


class Project:
    """A tiny checkout, and the plan to provision hosts with it."""

    def __init__(self, root: Path, results: Path) -> None:
        self.root, self.results, self.fetched = root, results, 0
        self.write("harness/environment.py", ENVIRONMENT)
        self.write("harness/provision/smoke.py", f"print('{METRICS}')\n")
        self.write("harness/__init__.py", "")
        self.write("harness/provision/__init__.py", "")
        self.write("requirements.lock", "a==1\n")
        self.write("data/é 'x'.txt", "data\n")
        self.git("init", "-q")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def git(self, *words: str) -> None:
        subprocess.run(["git", "-C", str(self.root), *words], check=True, capture_output=True)

    def wheels(self, lock: Path) -> Path:
        self.fetched += 1
        folder = self.results / "wheels"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a-1.whl").write_text("wheel")
        return folder

    def plan(self, until: str = "smoke") -> Plan:
        self.git("add", "-A")
        cargo = code.load(self.root, None, datasets=False)
        return Plan(cargo, lambda: METRICS, self.results, until, self.wheels, QUICK)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project", tmp_path / "results")


@pytest.fixture
def host(hosts: tuple[Host, ...], lab: SshLab) -> Iterator[Host]:
    """A host that is bare before and after."""
    yield hosts[0].model_copy(update={"work_dir": "/srv/fivefold/deep/er"})
    lab.on(0, ["rm", "-rf", "/srv/fivefold/deep"])


@pytest.fixture
def said() -> list[str]:
    return []


def there(lab: SshLab, name: str = "") -> Path:
    return lab.hosts[0].root / "deep" / "er" / name


def test_from_bare_to_ready_and_back(lab: SshLab, host: Host, project: Project, said: list[str]) -> None:
    done = provision(host, project.plan(), said.append)
    assert done.line.startswith("ready: facts written; 6 files sent; environment made") and "smoke trial as here" in done.line
    assert there(lab, "checkout/data/é 'x'.txt").read_text() == "data\n"
    assert not there(lab, "wheels").exists() and project.fetched == 1
    told = facts.read(project.results, "node01")
    assert told is not None and told["hostname"] == "node01" and told["gpus"] == [] and told["free_gib"] > 0
    before = (project.results / "hosts" / "node01.json").read_bytes()
    again = provision(host, project.plan(), said.append)
    assert again.changes == () and project.fetched == 1
    assert (project.results / "hosts" / "node01.json").read_bytes() == before
    assert deprovision(host, project.results, QUICK) == "removed"
    assert not list(lab.hosts[0].root.glob("deep")) and not (project.results / "hosts" / "node01.json").exists()
    assert deprovision(host, project.results, QUICK) == "nothing to remove"


def test_a_host_without_a_network_gets_its_packages_from_here(
    lab: SshLab, host: Host, project: Project, said: list[str]
) -> None:
    provision(host, project.plan("environment"), said.append)
    told = eval(there(lab, "checkout/told").read_text())
    assert told["PIP_NO_INDEX"] == "1" and told["PIP_FIND_LINKS"] == "/srv/fivefold/deep/er/wheels"
    assert any(line.startswith("wheels: a-1.whl") for line in said)


def test_only_what_differs_is_sent(lab: SshLab, host: Host, project: Project, said: list[str]) -> None:
    provision(host, project.plan("sync"), said.append)
    project.write("data/new", "new")
    project.write("requirements.lock", "a==2\n")
    (project.root / "data" / "é 'x'.txt").unlink()
    there(lab, "checkout/mine").write_text("not ours")
    assert provision(host, project.plan("sync"), said.append).changes == ("2 files sent, 1 removed",)
    found = {path.name for path in there(lab, "checkout").rglob("*") if path.is_file()}
    assert {"new", "mine"} <= found and "é 'x'.txt" not in found
    there(lab, "checkout/data/new").write_text("damaged")
    there(lab, "checkout/requirements.lock").unlink()
    assert provision(host, project.plan("sync"), said.append).changes == ("2 files sent",)
    assert there(lab, "checkout/data/new").read_text() == "new"


def test_a_changed_lock_file_means_a_new_environment(host: Host, project: Project, said: list[str]) -> None:
    provision(host, project.plan(), said.append)
    project.write("requirements.lock", "a==2\n")
    line = provision(host, project.plan(), said.append).line
    assert "1 files sent; environment made" in line and "smoke trial" in line
    project.write("data/new", "x")
    line = provision(host, project.plan(), said.append).line
    assert "1 files sent; smoke trial" in line and "environment" not in line


def test_a_damaged_environment_is_made_again(lab: SshLab, host: Host, project: Project, said: list[str]) -> None:
    provision(host, project.plan(), said.append)
    there(lab, "checkout/.venv/.fivefold-ready-runtime").unlink()
    assert "environment made" in provision(host, project.plan(), said.append).line


def test_a_failed_environment_is_said_and_tried_again(lab: SshLab, host: Host, project: Project, said: list[str]) -> None:
    project.write("broken", "")
    for _ in range(2):
        with pytest.raises(StepError, match="node01: environment: no such package: nonesuch==1: see above"):
            provision(host, project.plan(), said.append)
    assert not there(lab, "wheels").exists()
    project.git("rm", "-qf", "broken")
    assert "environment made" in provision(host, project.plan(), said.append).line


def test_other_numbers_than_here_are_a_failure(host: Host, project: Project, said: list[str]) -> None:
    project.write("harness/provision/smoke.py", 'print(\'{"a":1.6,"b":"x"}\')\n')
    with pytest.raises(StepError, match=r"smoke trial: a is 1\.6 there and 1\.5 here"):
        provision(host, project.plan(), said.append)


def test_a_folder_that_is_not_ours_is_left_alone(lab: SshLab, host: Host, project: Project, said: list[str]) -> None:
    there(lab, "checkout").mkdir(parents=True)
    there(lab, "checkout/mine").write_text("mine")
    with pytest.raises(StepError, match="is there and not ours"):
        provision(host, project.plan(), said.append)
    assert deprovision(host, project.results, QUICK) == "nothing to remove"
    assert there(lab, "checkout/mine").read_text() == "mine"


def test_what_others_left_stays_when_ours_goes(lab: SshLab, host: Host, project: Project, said: list[str]) -> None:
    provision(host, project.plan("sync"), said.append)
    there(lab, "notes.txt").write_text("mine")
    assert "notes.txt" in deprovision(host, project.results, QUICK)
    assert [path.name for path in there(lab).iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("work_dir", ["/dev/null/x", "/proc/x"])
def test_a_work_folder_that_cannot_be(hosts: tuple[Host, ...], project: Project, said: list[str], work_dir: str) -> None:
    with pytest.raises(StepError, match=f"work_dir {work_dir}: .*name a folder that can be written"):
        provision(hosts[0].model_copy(update={"work_dir": work_dir}), project.plan(), said.append)


def test_gpus_that_are_not_there_are_said(host: Host, project: Project, said: list[str]) -> None:
    from harness.inventory import Gpu

    with pytest.raises(StepError, match=r"0 of 2 x rtx3090 \(no GPU that nvidia-smi lists\): mend `gpus`"):
        provision(host.model_copy(update={"gpus": (Gpu(model="rtx3090", count=2),)}), project.plan(), said.append)


def test_two_controllers_do_not_meet(host: Host, project: Project, said: list[str]) -> None:
    provision(host, project.plan("facts"), said.append)
    blocked = pytest.raises(StepError, match="another controller provisions it")
    with connect(host, timing=QUICK) as other, Far(other).alone(), blocked:
        provision(host, project.plan("sync"), said.append)
    assert provision(host, project.plan("sync"), said.append).changes


def test_a_controller_that_vanished_blocks_nobody(host: Host, project: Project, said: list[str]) -> None:
    provision(host, project.plan("facts"), said.append)
    other = connect(host, timing=QUICK)
    with Far(other).alone():
        other.close()
        _eventually(lambda: provision(host, project.plan("sync"), said.append))


def _eventually(work: Callable[[], object], times: int = 20) -> None:
    import threading

    for _ in range(times):
        try:
            work()
            return
        except StepError:
            threading.Event().wait(0.2)
    work()


def test_a_full_disk_is_said_and_the_next_run_goes_on(lab: SshLab, host: Host, project: Project, said: list[str]) -> None:
    lab.fill_disk(0, 500_000)
    try:
        with pytest.raises(StepError, match=r"0\.0 GiB free at work_dir: free some space"):
            provision(host, project.plan(), said.append)
        lab.free_disk(0)
        provision(host, project.plan(), said.append)
        project.write("data/big", "x" * 5_000_000)
        lab.fill_disk(0, 500_000)
        with pytest.raises(TransferError, match="disk full: free some space there"):
            provision(host, project.plan(), said.append)
    finally:
        lab.free_disk(0)
    assert provision(host, project.plan(), said.append).changes == ("1 files sent", "smoke trial as here")


def test_a_host_that_dies_while_files_are_sent(lab: SshLab, host: Host, project: Project) -> None:
    project.write("data/big", "x" * 60_000_000)
    with pytest.raises(LostError):
        provision(host, project.plan("sync"), lambda line: lab.kill_sshd(0))  # it says "sending" just before it sends
    lab.start_sshd(0)
    _eventually(lambda: provision(host, project.plan("sync"), print))
    assert there(lab, "checkout/data/big").stat().st_size == 60_000_000


def test_a_secret_goes_to_pip_and_nowhere_else(
    lab: SshLab, host: Host, project: Project, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", "t0ps3cr3t-value")
    told = host.model_copy(update={"environment": {"MY_TOKEN": "env:SECRET_OF_TEST"}})
    provision(told, project.plan(), said.append)
    assert "t0ps3cr3t-value" in there(lab, "checkout/told").read_text()  # it was there
    there(lab, "checkout/told").unlink()
    places = [*project.results.rglob("*"), *lab.logs.rglob("*"), *there(lab).rglob("*"), *there(lab).glob(".*")]
    assert not [path for path in places if path.is_file() and b"t0ps3cr3t" in path.read_bytes()]
    assert any("token: (hidden)" in line for line in said) and not any("t0ps3cr3t" in line for line in said)


def test_a_host_that_fails_does_not_stop_the_others(lab: SshLab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = lab.inventory(tmp_path / "hosts.yaml")
    lab.kill_sshd(0)
    try:
        argv = ["--inventory", str(inventory), "--results", str(tmp_path / "results"), "--until", "facts"]
        assert main(argv) == 1
    finally:
        lab.start_sshd(0)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("node01  FAILED: root@10.77.0.11:22: ") and "is it on" in first
    assert second.startswith("node02  done up to facts: facts written")
    assert main(["--inventory", str(inventory), "--results", str(tmp_path / "results"), "--remove"]) == 0


def test_doctor_says_how_hosts_stand(lab: SshLab, tmp_path: Path, host: Host, project: Project, said: list[str]) -> None:
    from harness.provision import status

    inventory = load_inventory(lab.inventory(tmp_path / "hosts.yaml", work_dir="/srv/fivefold/deep/er"))
    provision(host, project.plan(), said.append)
    lab.kill_sshd(1)
    try:
        ready, gone = status.findings(inventory, [])
    finally:
        lab.start_sshd(1)
    assert (ready.level, ready.what) == ("ok", "host node01") and ready.found.startswith("ready; no GPU")
    assert (gone.level, gone.what) == ("missing", "host node02") and "is it on" in gone.mend
    deprovision(host, project.results, QUICK)
    bare = next(iter(status.findings(inventory, [])))
    assert bare.level == "optional" and "not provisioned" in bare.found and "snakemake provision" in bare.mend


@pytest.mark.slow
def test_four_hosts_with_the_real_project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything as a user does it: the project's own lock file, from wheels, and a trial on each host."""
    secret = "-".join(["not", "to", "be", "found"])  # in pieces: this file is copied too
    monkeypatch.setenv("SECRET_OF_TEST", secret)
    from harness.provision import wheelhouse
    from tests.labs.fixtures import running

    wheelhouse.ensure(root / "requirements.lock")  # where there is a network; the lab's controller has none
    checkout = tmp_path / "checkout"
    names = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((root / name).read_bytes())
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    with running(SshLab(tmp_path / "lab", hosts=4, hide=[str(root)])) as lab:
        inventory = lab.inventory(tmp_path / "hosts.yaml", environment={"MY_TOKEN": "env:SECRET_OF_TEST"})
        command = ["-m", "snakemake", "--config", f"inventory={inventory}", "offline=true", "--"]

        def snakemake(target: str) -> str:
            done = lab.run(["env", f"--chdir={checkout}", sys.executable, *command, target], timeout_s=580, check=False)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert secret not in done.stdout + done.stderr
            return done.stdout

        first = snakemake("provision")
        assert first.count("ready: facts written") == 4 and first.count("smoke trial as here") == 4
        assert snakemake("provision").count("ready: nothing to do") == 4
        told = json.loads((checkout / "results" / "hosts" / "node03.json").read_text())
        assert told["hostname"] == "node03" and told["pythons"]
        python = Layout("/srv/fivefold").python
        assert lab.on(2, [python, "-c", "import snakemake, harness; print(harness.__file__)"]).stdout.startswith(
            "/srv/fivefold"
        )
        # neither Snakemake's records nor logs nor results nor the hosts hold what the inventory refers to
        kept = [*checkout.rglob("*"), *lab.logs.rglob("*"), *(host.root / ".fivefold.json" for host in lab.hosts)]
        assert len(kept) > 300
        assert not [path for path in kept if path.is_file() and secret.encode() in path.read_bytes()]
        assert snakemake("deprovision").count("removed") == 4
        for host in lab.hosts:
            assert not list(host.root.iterdir())
