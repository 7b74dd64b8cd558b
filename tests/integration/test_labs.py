"""The labs: they come up, they can be used, every fault does what it says, and nothing of them stays.

Needs root on a Debian-like machine; else skips. `FIVEFOLD_LABS=required` makes a machine that can't run them a failure.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.labs import LabError, LabUnavailableError, processes, register
from tests.labs.docker_lab import DockerLab
from tests.labs.fixtures import links, namespaces, running, skipping, traces
from tests.labs.lab import Lab
from tests.labs.machines import WORK_DIR
from tests.labs.slurm_lab import SlurmLab, SshSlurmLab
from tests.labs.ssh_lab import SshLab, main

KINDS = {"ssh": SshLab, "slurm": SlurmLab, "docker": DockerLab}


def ssh(lab, name, *command, options=(), check=True, timeout_s=20):
    """Run a command over SSH as a client would: from the controller, strict about host keys."""
    argv = ["ssh", "-F", lab.ssh_config, "-o", "ConnectTimeout=1", *options, name, *command]
    return lab.run(argv, check=check, timeout_s=timeout_s)


def reaches(lab, name):
    return ssh(lab, name, "true", check=False).returncode == 0


@pytest.fixture(scope="module")
def ssh_lab(tmp_path_factory):
    with running(SshLab(tmp_path_factory.mktemp("ssh"), hosts=2)) as lab:
        yield lab


@pytest.fixture(scope="module")
def slurm_lab(tmp_path_factory):
    with running(SlurmLab(tmp_path_factory.mktemp("slurm"), nodes=2)) as lab:
        yield lab


@pytest.fixture(scope="module")
def docker_lab(tmp_path_factory):
    with running(DockerLab(tmp_path_factory.mktemp("docker"), in_memory=True)) as lab:
        with skipping():
            lab.base_image()
        yield lab


class TestSshLab:
    def test_every_host_is_a_machine_of_its_own(self, ssh_lab):
        hosts = ssh_lab.hosts
        assert [ssh(ssh_lab, host.name, "hostname").stdout.strip() for host in hosts] == ["node01", "node02"]
        assert len({host.address for host in hosts}) == len({host.host_key for host in hosts}) == 2
        assert "room_init" in ssh(ssh_lab, "node01", "cat /proc/1/cmdline").stdout
        ssh(ssh_lab, "node01", f"echo mine > {WORK_DIR}/file")
        assert (hosts[0].root / "file").read_text() == "mine\n"
        assert ssh(ssh_lab, "node02", f"ls {WORK_DIR}").stdout == ""

    def test_no_settings_of_this_machine_are_theirs(self, ssh_lab):
        """Such as a `~/.bashrc`, which bash reads for every command that comes over SSH."""
        told = ssh(ssh_lab, "node01", "cd && pwd && ls -A; cat /etc/bash.bashrc; command -v python3").stdout.splitlines()
        home, prefix = Path.home(), Path(sys.base_prefix)
        below = prefix.relative_to(home).parts[:1] if prefix.is_relative_to(home) else ()
        assert told == [str(home), *below, f"{prefix}/bin/python3"]

    def test_folders_below_hidden_ones_are_hidden_with_them(self, tmp_path):
        (tmp_path / "a" / "b" / "kept").mkdir(parents=True)
        (tmp_path / "a" / "b" / "file").touch()
        hide = [str(tmp_path / "a" / "b"), str(tmp_path / "a")]
        with running(SshLab(tmp_path / "lab", hosts=1, hide=hide, keep=[str(tmp_path / "a" / "b" / "kept")])) as lab:
            assert ssh(lab, "node01", f"cd {tmp_path}/a && find .").stdout.split() == [".", "./b", "./b/kept"]

    def test_a_host_can_have_a_docker_engine(self, tmp_path):
        with running(SshLab(tmp_path / "lab", hosts=2)) as lab:
            engine = lab.start_engine("node02")
            assert lab.on("node02", ["docker", "version", "-f", "{{.Server.Os}}"]).stdout == "linux\n"
            assert engine.info()["Name"] == "node02" and not engine.info()["Containers"]
            assert lab.on("node01", ["docker", "version"], check=False).returncode
        assert traces(tmp_path / "lab") == []

    def test_controller_knows_the_hosts_and_no_way_out(self, ssh_lab):
        assert ssh_lab.python(["-c", "import socket; print(socket.gethostbyname('node02'))"]).stdout.strip() == (
            ssh_lab.hosts[1].address
        )
        assert "default" not in ssh_lab.run(["ip", "route"]).stdout
        assert ssh_lab.run(["pwd"]).stdout.strip() == str(Path.cwd())

    def test_this_process_can_join_the_network(self, ssh_lab):
        def answers():
            try:
                with socket.create_connection((ssh_lab.hosts[0].address, 22), timeout=0.3) as connection:
                    return connection.recv(3) == b"SSH"
            except OSError:
                return False

        before = Path("/proc/thread-self/ns/net").readlink()
        with ssh_lab.inside():
            assert answers()
        assert Path("/proc/thread-self/ns/net").readlink() == before
        with ssh_lab.connect(ssh_lab.hosts[0].address, 22) as connection:
            assert connection.recv(3) == b"SSH"

    def test_inventory_is_what_the_harness_reads(self, ssh_lab, tmp_path):
        inventory = pytest.importorskip("harness.inventory")
        path = ssh_lab.inventory(tmp_path / "lab.yaml", tags=["client"])
        for host, read in zip(ssh_lab.hosts, inventory.load_inventory(path).hosts, strict=True):
            assert (read.name, read.address, read.port, read.user) == (host.name, host.address, host.port, host.user)
            assert (read.host_key, read.key_file) == (host.host_key, str(host.key_file))
            assert (read.work_dir, read.tags) == (str(host.work_dir), ("client",))

    def test_paramiko_accepts_the_pinned_key(self, ssh_lab):
        paramiko = pytest.importorskip("paramiko")
        host = ssh_lab.hosts[0]
        with paramiko.SSHClient() as client, ssh_lab.inside():
            client.load_host_keys(str(ssh_lab.known_hosts))
            client.set_missing_host_key_policy(paramiko.RejectPolicy())
            options = {"allow_agent": False, "look_for_keys": False}
            client.connect(host.address, username=host.user, key_filename=str(host.key_file), **options)
            assert client.exec_command("hostname")[1].read() == b"node01\n"

    def test_cut_is_silent_and_join_mends_it(self, ssh_lab):
        ssh_lab.cut("node02")
        with ssh_lab.inside(), pytest.raises(TimeoutError):
            socket.create_connection((ssh_lab.hosts[1].address, 22), timeout=0.3)
        assert reaches(ssh_lab, "node01")
        ssh_lab.join("node02")
        assert reaches(ssh_lab, "node02")

    def test_kill_ends_every_process_and_boot_keeps_the_disk(self, ssh_lab):
        ssh(ssh_lab, "node02", f"echo kept > {WORK_DIR}/kept; nohup sleep 1000 >/dev/null 2>&1 & ")
        with ssh_lab.connect(ssh_lab.hosts[1].address, 22) as connection:
            assert connection.recv(3) == b"SSH"
            ssh_lab.kill("node02")
            assert told_of_the_end(connection)
        assert not ssh_lab.is_on("node02")
        assert not reaches(ssh_lab, "node02")
        with pytest.raises(LabError, match="node02 is off"):
            ssh_lab.on("node02", ["true"])
        ssh_lab.boot("node02")
        assert ssh(ssh_lab, "node02", f"cat {WORK_DIR}/kept; pgrep -c sleep || true").stdout.split() == ["kept", "0"]

    def test_power_off_tells_nobody(self, ssh_lab):
        with ssh_lab.connect(ssh_lab.hosts[1].address, 22, timeout_s=0.5) as connection:
            connection.recv(100)
            ssh_lab.power_off("node02")
            with pytest.raises(TimeoutError):
                connection.recv(100)
        ssh_lab.boot(1)
        assert reaches(ssh_lab, "node02")

    def test_hung_host_accepts_and_never_answers(self, ssh_lab):
        ssh_lab.hang("node02")
        with ssh_lab.connect(ssh_lab.hosts[1].address, 22, timeout_s=0.3) as connection:
            with pytest.raises(TimeoutError):
                connection.recv(3)
            ssh_lab.thaw("node02")
            connection.settimeout(5)
            assert connection.recv(3) == b"SSH"

    def test_key_is_refused_until_accepted(self, ssh_lab):
        ssh_lab.refuse_key("node02")
        assert "Permission denied" in ssh(ssh_lab, "node02", "true", check=False).stderr
        ssh_lab.accept_key("node02")
        assert reaches(ssh_lab, "node02")

    def test_full_disk(self, ssh_lab):
        ssh_lab.fill_disk("node02", free_bytes=1 << 20)
        write = f"head -c {{}} /dev/zero > {WORK_DIR}/zeros"
        assert ssh(ssh_lab, "node02", write.format(900_000), check=False).returncode == 0
        full = ssh(ssh_lab, "node02", write.format(2_000_000), check=False)
        assert full.returncode != 0
        assert "No space left on device" in full.stderr
        ssh_lab.free_disk("node02")
        assert ssh(ssh_lab, "node02", write.format(2_000_000) + f"; rm {WORK_DIR}/zeros").returncode == 0

    def test_sshd_dies_alone_and_comes_back_slowly(self, ssh_lab):
        pid = ssh(ssh_lab, "node02", "nohup sleep 1000 >/dev/null 2>&1 & echo $!").stdout.strip()
        ssh_lab.kill_sshd("node02")
        with ssh_lab.inside(), pytest.raises(ConnectionRefusedError):
            socket.create_connection((ssh_lab.hosts[1].address, 22), timeout=1)
        ssh_lab.start_slowly("node02", 0.5)
        assert not reaches(ssh_lab, "node02")
        processes.wait_for(lambda: reaches(ssh_lab, "node02"), "slow start")
        assert ssh(ssh_lab, "node02", f"ps -o comm= {pid}; kill {pid}").stdout.strip() == "sleep"

    def test_changed_host_key_is_noticed(self, tmp_path):
        with running(SshLab(tmp_path / "lab", hosts=1)) as lab:
            pinned = lab.hosts[0].host_key
            new = lab.change_host_key("node01")
            assert lab.hosts[0].host_key == pinned != new
            assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in ssh(lab, "node01", "true", check=False).stderr
            lab.known_hosts.write_text(f"{lab.hosts[0].address} {new}\n")
            assert reaches(lab, "node01")

    def test_jump_host_is_the_only_way(self, tmp_path):
        with running(SshLab(tmp_path / "lab", hosts=2, jump=True)) as lab:
            assert ssh(lab, "node02", "hostname").stdout == "node02\n"
            assert lab.jump is not None
            assert [host.name for host in lab.hosts] == ["node01", "node02"]
            with lab.inside(), pytest.raises(OSError, match="unreachable"):
                socket.create_connection((lab.hosts[0].address, 22), timeout=1)
            lab.kill("jump")
            assert not reaches(lab, "node02")
            lab.boot("jump")
            assert reaches(lab, "node02")

    def test_two_labs_side_by_side_and_hidden_folders(self, ssh_lab, root, tmp_path):
        with running(SshLab(tmp_path / "lab", hosts=2, hide=[str(root)], keep=[str(root / "docs")])) as other:
            assert other.hosts[0].address == ssh_lab.hosts[0].address
            other.kill("node01")
            assert reaches(ssh_lab, "node01")
            assert ssh(other, "node02", f"ls -A {root}").stdout == "docs\n"
            assert "labs.md" in ssh(other, "node02", f"ls {root}/docs").stdout
            assert "Read-only" in ssh(other, "node02", f"touch {root}/docs/labs.md", check=False).stderr
        assert ssh(ssh_lab, "node02", f"ls {tmp_path}").stdout == "lab\n"


def told_of_the_end(connection):
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


class TestSlurmLab:
    def submit(self, lab, tmp_path, script, *options):
        """Run a batch job to its end with the environment alone, from outside the lab."""
        out = tmp_path / "out"
        done = subprocess.run(
            ["sbatch", "--wait", "-o", str(out), *options, "--wrap", script],
            env={**os.environ, **lab.env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, out.read_text() if out.exists() else done.stderr

    def test_jobs_get_gpus_on_nodes(self, slurm_lab, tmp_path):
        code, said = self.submit(slurm_lab, tmp_path, "hostname; echo $CUDA_VISIBLE_DEVICES", "--gres=gpu:2", "-w", "node02")
        assert (code, said.split()) == (0, ["node02", "0,1"])
        assert self.submit(slurm_lab, tmp_path, "exit 3")[0] == 3
        refused = slurm_lab.run(["sbatch", "--gres=gpu:3", "--wrap", "true"], check=False)
        assert "not available" in refused.stderr

    def test_job_steps_find_the_cluster_without_its_variables(self, slurm_lab, tmp_path):
        code, said = self.submit(slurm_lab, tmp_path, "unset SLURM_CONF; srun hostname | sort", "-N2", "--ntasks-per-node=1")
        assert (code, said.split()) == (0, ["node01", "node02"])

    def test_partitions(self, slurm_lab):
        said = slurm_lab.run(["sinfo", "-h", "-o", "%P %l %D"]).stdout.split("\n")
        assert said[:2] == ["gpu* infinite 2", "short 10:00 1"]

    def test_drained_node_gets_no_jobs_until_resumed(self, slurm_lab):
        slurm_lab.drain("node01")
        assert slurm_lab.state_of("node01") == "drained"
        assert slurm_lab.run(["srun", "hostname"]).stdout == "node02\n"
        slurm_lab.resume("node01")
        assert slurm_lab.state_of("node01") == "idle"

    def test_killed_node_fails_its_job_and_comes_back(self, slurm_lab):
        job = slurm_lab.run(["sbatch", "--parsable", "-w", "node02", "-o", "/dev/null", "--wrap", "sleep 1000"]).stdout.strip()
        state = ["squeue", "--states=all", "-h", "-j", job, "-o", "%T"]
        processes.wait_for(lambda: slurm_lab.run(state).stdout.strip() == "RUNNING", "the job's start")
        slurm_lab.kill_node("node02")
        processes.wait_for(lambda: slurm_lab.run(state).stdout.strip() == "NODE_FAIL", "the job's failure")
        assert slurm_lab.state_of("node02").startswith("down")
        slurm_lab.resume("node02")
        assert slurm_lab.run(["srun", "-w", "node02", "hostname"]).stdout == "node02\n"

    def test_controller_forgets_nothing(self, slurm_lab):
        job = slurm_lab.run(["sbatch", "--parsable", "--hold", "--wrap", "true"]).stdout.strip()
        slurm_lab.stop_controller()
        slurm_lab.start_controller()
        assert slurm_lab.run(["squeue", "-h", "-j", job, "-o", "%T"]).stdout.strip() == "PENDING"
        slurm_lab.run(["scancel", job])

    def test_nodes_can_be_ssh_hosts(self, tmp_path):
        with running(SshSlurmLab(tmp_path / "lab", nodes=1)) as lab:
            assert ssh(lab, "node01", "hostname").stdout == "node01\n"
            assert "idle" in ssh(lab, "head", "sinfo").stdout
            assert [host.name for host in lab.hosts] == ["node01"]

    @pytest.mark.slow
    def test_snakemake_plugin_finishes_a_job(self, slurm_lab, tmp_path):
        environment = {**os.environ, **slurm_lab.env, **plugin(tmp_path)}
        (tmp_path / "Snakefile").write_text(
            'rule a:\n    output: "a.txt"\n    resources: gres="gpu:1"\n    shell: "hostname > {output}"\n'
        )
        options = ["--executor", "slurm", "--jobs", "1", "--latency-wait", "5", "--slurm-status-command", "squeue"]
        options += ["--slurm-init-seconds-before-status-checks", "3", "--slurm-no-account", "--slurm-no-requeue"]
        defaults = ["--default-resources", "slurm_partition=gpu", "runtime=5", "mem_mb=500"]
        done = processes.run(
            [sys.executable, "-m", "snakemake", *options, *defaults], environment=environment, folder=tmp_path, timeout_s=120
        )
        assert (tmp_path / "a.txt").read_text() in ("node01\n", "node02\n"), done.stderr


def plugin(folder):
    """Variables under which Snakemake has its Slurm plugin: installed for this test where it is not there already."""
    if importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        return {}
    target = folder / "plugin"
    wanted = ["snakemake-executor-plugin-slurm==2.8.0", "snakemake-executor-plugin-slurm-jobstep==0.6.1", "throttler==1.2.2"]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *wanted]
    if processes.run(install, check=False, timeout_s=120).returncode:
        pytest.skip("snakemake-executor-plugin-slurm can't be installed: no package index in reach")
    return {"PYTHONPATH": str(target)}


class TestDockerLab:
    def test_python_and_wheels_run(self, docker_lab):
        wheels = Path(importlib.util.find_spec("numpy").origin).parents[1]
        code = "import sys, numpy, pyarrow, pydantic; print(sys.version_info[:2], int(numpy.arange(4).sum()))"
        mounts = ["-v", f"{wheels}:/wheels:ro", "-e", "PYTHONPATH=/wheels", "--network=none"]
        said = docker_lab.run(["docker", "run", "--rm", *mounts, docker_lab.base_image(), "python", "-c", code]).stdout
        assert said.split("\n")[0] == "(3, 11) 6"

    def test_images_go_to_the_registry_and_back_by_digest(self, docker_lab):
        name = docker_lab.push(docker_lab.base_image())
        assert "@sha256:" in name
        docker_lab.run(["docker", "rmi", name.split("@")[0] + ":3.11"], check=False)
        assert docker_lab.run(["docker", "pull", "-q", name]).stdout.strip() == name

    def test_missing_image(self, docker_lab):
        assert "not found" in docker_lab.run(["docker", "pull", docker_lab.missing_image], check=False).stderr

    def test_out_of_memory_is_said(self, docker_lab):
        if not docker_lab.memory_limits():
            pytest.skip("no memory control group on this machine: a container's memory limit is not enforced")
        run = ["docker", "run", "--name=greedy", "--memory=40m", "--network=none", docker_lab.base_image()]
        assert docker_lab.run([*run, "python", "-c", "bytearray(500 << 20)"], check=False).returncode == 137
        assert docker_lab.run(["docker", "inspect", "-f", "{{.State.OOMKilled}}", "greedy"]).stdout == "true\n"

    def test_daemon_dies_in_the_middle_of_a_build(self, docker_lab, tmp_path):
        (tmp_path / "Dockerfile").write_text(f"FROM {docker_lab.base_image()}\nRUN echo begun && sleep 1000\n")
        build = subprocess.Popen(
            docker_lab.command(["docker", "build", "--network=none", "-t", "never", tmp_path]),
            env={**os.environ, **docker_lab.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert build.stdout is not None
        assert any("begun" in line for line in build.stdout)
        docker_lab.kill_daemon()
        assert build.wait(timeout=20) != 0
        with pytest.raises(LabError, match="Cannot connect"):
            docker_lab.run(["docker", "ps"])
        docker_lab.start_daemon()
        assert docker_lab.run(["docker", "images", "-q", "never"]).stdout == ""
        docker_lab.stop_daemon()
        docker_lab.start_daemon()
        assert docker_lab.run(["docker", "images", "-q", docker_lab.base_image()]).stdout != ""

    def test_sdk(self, docker_lab):
        pytest.importorskip("docker")
        client = docker_lab.client()
        said = client.containers.run(docker_lab.base_image(), ["echo", "hello"], network_mode="none", remove=True)
        client.close()
        assert said == b"hello\n"

    @pytest.mark.slow
    def test_private_network_has_names_and_no_way_out(self, tmp_path):
        before = links()
        with running(DockerLab(tmp_path / "lab", private=True, in_memory=True)) as lab:
            image = lab.base_image()
            lab.run(["docker", "network", "create", "net"])
            lab.run(["docker", "run", "-d", "--network=net", "--name=server", image, "python", "-m", "http.server", "8000"])
            ask = "import urllib.request as u; print(u.urlopen('http://server:8000').status)"
            client = ["docker", "run", "--rm", "--network=net", image, "python", "-c", ask]
            processes.wait_for(lambda: lab.run(client, check=False).stdout == "200\n", "server in a container")
            assert links() == before


@pytest.fixture
def script(root, tmp_path):
    """Starts a process that holds a lab until it is told otherwise; gives the process and the lab's folder."""
    started = []

    def start(kind, end="signal.pause()"):
        folder = tmp_path / "held"
        code = f"""
            import signal
            from tests.labs.{kind}_lab import {KINDS[kind].__name__} as Lab
            with Lab({str(folder)!r}) as lab:
                print("up", flush=True)
                {end}
        """
        argv = [sys.executable, "-c", textwrap.dedent(code)]
        process = subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        if process.stdout.readline() != "up\n":
            error = process.communicate()[1]
            pytest.skip(processes.tail(error, 1)) if "LabUnavailable" in error else pytest.fail(error)
        return process, folder

    yield start
    for process in started:
        process.kill()
        process.communicate()


KIND = pytest.mark.parametrize("kind", ["ssh", "slurm", pytest.param("docker", marks=pytest.mark.slow)])


class TestEnd:
    @KIND
    def test_nothing_is_left(self, kind, tmp_path):
        before, spaces = links(), namespaces()
        lab = KINDS[kind](tmp_path / "lab")
        with running(lab):
            rooms = list(lab.rooms.values())
            assert traces(lab.folder)
            own = {space for room in rooms for space in processes.mounts_of(room.init.pid)}
            assert own and not own & spaces
        assert traces(lab.folder) == []
        assert not any(room.init.alive for room in rooms)
        assert not own & namespaces()
        assert links() == before

    @KIND
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_takes_it_down(self, kind, number, script):
        process, folder = script(kind)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert traces(folder) == []

    def test_an_exception_takes_it_down(self, script):
        process, folder = script("ssh", "raise ValueError('a test failed')")
        assert "a test failed" in process.communicate(timeout=30)[1]
        assert traces(folder) == []

    @KIND
    def test_sigkill_ends_its_processes_and_the_next_lab_clears_its_files(self, kind, script, tmp_path):
        process, folder = script(kind)
        state = register.read(folder)
        assert state is not None
        process.kill()
        process.communicate()
        processes.wait_for(lambda: not any(room.init.alive for room in state.rooms.values()), "end of the rooms", 5)
        assert traces(folder)
        with running(SshLab(tmp_path / "next", hosts=1)):
            assert traces(folder) == []

    def test_clients_end_with_the_process_that_holds_the_lab(self, script):
        process, _ = script("ssh", "print(lab.popen(['sleep', '1000']).pid, flush=True); signal.pause()")
        client = processes.identify(int(process.stdout.readline()))
        process.kill()
        processes.wait_for(lambda: not client.alive, "end of a client", 5)

    def test_start_that_fails_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(*_):
            raise LabError("no sshd today")

        monkeypatch.setattr(SshLab, "_start_sshd", fail)
        lab = SshLab(tmp_path / "lab", hosts=1)
        with pytest.raises(LabError, match="no sshd today"), running(lab):
            pytest.fail("it came up")
        assert traces(lab.folder) == []

    def test_folder_with_other_files_is_refused_and_kept(self, tmp_path):
        (tmp_path / "etc").mkdir()
        with pytest.raises(LabError, match="use an empty folder"), running(SshLab(tmp_path, hosts=1)):
            pytest.fail("it came up")
        assert [path.name for path in tmp_path.iterdir()] == ["etc"]

    def test_a_lab_whose_folder_was_removed_still_goes(self, script, tmp_path):
        process, folder = script("ssh")
        processes.run(["rm", "-rf", folder])
        process.kill()
        process.communicate()
        with running(SshLab(tmp_path / "next", hosts=1)):
            assert traces(folder) == []


class TestCommandLine:
    def run(self, *argv):
        return main([str(word) for word in argv])

    def test_up_stays_until_down(self, tmp_path, root, capfd):
        if os.geteuid():
            pytest.skip("ssh lab: needs root")
        folder = tmp_path / "lab"
        argv = [sys.executable, "-m", "tests.labs.ssh_lab"]
        processes.run([*argv, "up", folder, "--hosts", "1"], folder=root)
        try:
            assert self.run("up", folder) == 2
            assert "take it down first" in capfd.readouterr().err
            with running(SshLab(tmp_path / "other", hosts=1)):  # which sweeps, and must not take this one for stale
                said = processes.run(
                    [*argv, "exec", folder, "--", "ssh", "-F", folder / "ssh_config", "node01", "hostname"], folder=root
                )
            assert said.stdout == "node01\n"
            assert self.run("kill", folder, "0") == self.run("boot", folder, "node01") == 0
            assert self.run("cut", folder, "node07") == 2
            assert "node07" in capfd.readouterr().err
            assert processes.run([*argv, "exec", folder, "--", "false"], folder=root, check=False).returncode == 1
        finally:
            assert self.run("down", folder) == 0
        assert traces(folder) == []
        assert self.run("down", folder) == 2

    def test_up_that_is_killed_half_way_is_swept(self, tmp_path, root):
        if os.geteuid():
            pytest.skip("ssh lab: needs root")
        code = """
            import os, signal, sys
            from tests.labs.ssh_lab import SshLab
            SshLab._start_sshd = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            SshLab(sys.argv[1]).up()
        """
        folder = tmp_path / "lab"
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(folder)], cwd=root, capture_output=True)
        assert done.returncode == -signal.SIGKILL
        assert any("room_init" in trace for trace in traces(folder))
        with running(SshLab(folder, hosts=1)) as lab:
            assert reaches(lab, "node01")
        assert traces(folder) == []

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_root_it_says_so_in_one_line(self, kind, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        lab: Lab = KINDS[kind](tmp_path / "lab")
        with pytest.raises(LabUnavailableError, match=f"^{kind} lab: needs root[^\n]*$"):
            lab.up()
        assert not (tmp_path / "lab").exists()
