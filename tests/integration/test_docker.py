"""Containers on a real Docker Engine: what runs in them, what stops them, and what is left of them.

Needs root on Linux; the engine is the docker lab's. Every fault is brought about for real.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.containers import Limits, Mount, owner, registry, run
from harness.containers.build import Built, Outcome, build
from harness.containers.engine import connect
from harness.containers.models import ImageFile, Site
from harness.containers.recipe import recipe
from harness.containers.runner import digest, inspect
from systems.registry import InputError
from tests.labs.docker_lab import DockerLab
from tests.labs.errors import LabUnavailableError

MIB = 2**20
LEFT_ALONE_S = 15
"""No container may outlive its controller by more."""


@pytest.fixture(scope="module")
def lab() -> Iterator[DockerLab]:
    folder = Path(tempfile.mkdtemp(prefix="fivefold-docker-", dir="/tmp"))  # sockets need a short path
    folder.chmod(0o755)  # one test asks as another user
    try:
        with DockerLab(folder) as found:
            found.base_image()
            yield found
    except LabUnavailableError as reason:
        pytest.skip(str(reason))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def image(lab: DockerLab) -> str:
    return lab.base_image()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


class Said:
    """What a container said, on either stream."""

    def __init__(self) -> None:
        self.out, self.err = io.BytesIO(), io.BytesIO()


def ran(lab: DockerLab, image: str, *argv: str, mounts: Sequence[Mount] = (), **options: Any) -> tuple[int, str, str]:
    said = Said()
    status = run(image, argv, mounts, engine=lab.docker_host, stdout=said.out, stderr=said.err, **options)
    return status, said.out.getvalue().decode(), said.err.getvalue().decode()


def containers(lab: DockerLab, *, running: bool = False) -> list[str]:
    words = ["docker", "ps", "-q", *([] if running else ["-a"])]
    return lab.run(words).stdout.split()


def wait_until(true: Callable[[], object], within_s: float, what: str) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        threading.Event().wait(0.05)


def python(lab: DockerLab, root: Path, *argv: str, **options: Any) -> subprocess.Popen[str]:
    """`python -m harness.containers ...` on the lab's engine."""
    environment = {**os.environ, "DOCKER_HOST": lab.docker_host, "PYTHONPATH": str(root)}
    words = [sys.executable, "-m", "harness.containers", *argv]
    return subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


# -- what runs ------------------------------------------------------------------------------------------------------------


def test_a_command_runs_as_the_caller_and_its_results_are_the_callers(lab: DockerLab, image: str, results: Path) -> None:
    script = "id -u; id -g; pwd; echo two >&2; echo $A_VALUE; echo made > made; exit 7"
    mounts = [Mount(results, writable=True)]
    status, out, err = ran(lab, image, "sh", "-c", script, mounts=mounts, env={"A_VALUE": "x y"}, folder=str(results))
    assert (status, out.split("\n")) == (7, [str(os.getuid()), str(os.getgid()), str(results), "x y", ""])
    assert err == "two\n"
    made = (results / "made").stat()
    assert (made.st_uid, made.st_gid) == (os.getuid(), os.getgid())
    assert containers(lab) == []


def test_it_sees_and_changes_only_what_it_was_given(lab: DockerLab, image: str, results: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("data")
    script = (
        f"cat {tmp_path}/a; echo x > {tmp_path}/b; echo x > /etc/x; cat /proc/self/status; ls /sys/class/net; ls /root /home"
    )
    _, out, err = ran(lab, image, "sh", "-c", script, mounts=[Mount(tmp_path), Mount(results, writable=True)])
    assert out.startswith("data") and err.count("Read-only file system") == 2
    assert re.search(r"CapEff:\s+0+\n", out) and re.search(r"NoNewPrivs:\s+1\n", out)
    assert "eth" not in out and not (tmp_path / "b").exists()


def test_limits_hold(lab: DockerLab, image: str) -> None:
    script = "cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; df -k /dev/shm /tmp | tail -n 2"
    limits = Limits(memory_bytes=200 * MIB, cpus=0.5, processes=77, shared_memory_bytes=8 * MIB, scratch_bytes=16 * MIB)
    _, out, _ = ran(lab, image, "sh", "-c", script, limits=limits)
    assert out.split()[0] == "77" and {"8192", "16384"} <= set(out.split())


def test_the_image_is_known_inside_for_provenance(lab: DockerLab, image: str) -> None:
    _, out, _ = ran(lab, image, "sh", "-c", "echo $FIVEFOLD_IMAGE")
    with connect(lab.docker_host) as engine:
        assert out.strip() == digest(engine, image)
    assert re.fullmatch(re.escape(image) + r"@sha256:[0-9a-f]{64}\n", out)


def test_much_output_arrives_whole(lab: DockerLab, image: str) -> None:
    _, out, err = ran(lab, image, "sh", "-c", "seq 200000; seq 1000 >&2")
    assert out.split() == [str(number) for number in range(1, 200001)] and len(err.split()) == 1000


@pytest.mark.parametrize("text", ["'; touch PWNED #", "$(touch PWNED)", "`touch PWNED`", "a\nb", "é ü", "-x", "--"])
def test_words_and_values_are_only_that(lab: DockerLab, image: str, results: Path, text: str) -> None:
    mounts = [Mount(results, writable=True)]
    code = "import os, sys; print(repr(sys.argv[1]), repr(os.environ['A']))"
    status, out, _ = ran(lab, image, "python", "-c", code, text, mounts=mounts, env={"A": text}, folder=str(results))
    assert (status, out) == (0, f"{text!r} {text!r}\n")
    assert not any(path.name == "PWNED" for path in [*results.iterdir(), *Path.cwd().iterdir()])
    with pytest.raises(InputError):
        ran(lab, text, "true")


def test_values_are_in_no_command_line(lab: DockerLab, root: Path, image: str) -> None:
    secret = "a-value-that-nobody-may-see"
    environment = {**os.environ, "DOCKER_HOST": lab.docker_host, "A_SECRET": secret, "PYTHONPATH": str(root)}
    words = [sys.executable, "-m", "harness.containers", "run", "--env", "A_SECRET", image, "--"]
    code = "import os; print(len(os.environ['A_SECRET'])); import time; time.sleep(60)"
    with subprocess.Popen([*words, "python", "-u", "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == f"{len(secret)}\n"
            everything = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
            assert "A_SECRET" in everything and secret not in everything
        finally:
            process.terminate()
    assert containers(lab) == []


def test_gpus_are_asked_for_or_missed_in_one_line(lab: DockerLab, image: str) -> None:
    with pytest.raises(InputError, match="nvidia-container-toolkit"):
        ran(lab, image, "true", limits=Limits(gpus=(0,)))
    assert containers(lab) == []


def test_the_gpus_that_were_asked_for_are_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for NVIDIA's hook, which is all that the engine looks for before it accepts a request."""
    hook = tmp_path / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\nexit 0\n")
    hook.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    folder = Path(tempfile.mkdtemp(prefix="fivefold-gpu-", dir="/tmp"))
    try:
        with DockerLab(folder) as lab:
            show = ("sh", "-c", "echo $NVIDIA_VISIBLE_DEVICES")
            assert ran(lab, lab.base_image(), *show, limits=Limits(gpus=(1, 3)))[1] == "1,3\n"
            assert ran(lab, lab.base_image(), *show, limits=Limits(gpus="all"))[1] == "all\n"
    except LabUnavailableError as reason:
        pytest.skip(str(reason))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- what goes wrong ---------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_said_with_the_limit_and_the_mend(lab: DockerLab, image: str) -> None:
    if not lab.memory_limits():
        pytest.skip("this kernel does not limit the memory of containers")
    for argv in (("python", "-c", "bytearray(2**28)"), ("sh", "-c", "python -c 'bytearray(2**28)'; echo went on")):
        with pytest.raises(InputError) as caught:
            ran(lab, image, *argv, limits=Limits(memory_bytes=64 * MIB))
        assert "64 MiB" in str(caught.value) and "raise the limit" in str(caught.value)
    assert containers(lab) == []


def test_a_missing_image_is_one_line(lab: DockerLab) -> None:
    for name in ("no-such-image:1", lab.missing_image):
        with pytest.raises(InputError, match="not there: run `snakemake containers`"):
            ran(lab, name, "true")


def test_a_missing_folder_is_one_line_and_is_not_made(lab: DockerLab, image: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        ran(lab, image, "true", mounts=[Mount(tmp_path / "none")])
    assert not (tmp_path / "none").exists() and containers(lab) == []


def test_an_engine_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/none.sock", "tcp://127.0.0.1:9"):
        with pytest.raises(InputError, match="no engine answers there: start it"):
            run("image:1", ["true"], engine=url)


def test_a_socket_that_we_may_not_use_is_one_line(lab: DockerLab, image: str) -> None:
    (lab.folder / "docker.sock").chmod(0o600)
    with connect(lab.docker_host):  # the modules that this needs are then there
        pass
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # another user, who may not be able to start Python from our folders
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            run(image, ["true"], engine=lab.docker_host)
        except InputError as error:
            os.write(writing, str(error).encode())
        except BaseException as error:
            os.write(writing, f"no line, but {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as said:
        line = said.read()
    os.waitpid(child, 0)
    assert "Permission denied" in line and "group `docker`" in line and "\n" not in line


def test_what_ignores_sigterm_is_killed(lab: DockerLab, root: Path, image: str) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    with python(lab, root, "run", image, "--", "python", "-c", code) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert process.stderr and process.stderr.read() == "terminated; what is finished is kept\n"
    assert containers(lab) == []


def test_sigint_reaches_the_command_which_may_put_its_things_away(
    lab: DockerLab, root: Path, image: str, results: Path
) -> None:
    script = f"trap 'echo put away > {results}/made; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    with python(lab, root, "run", "--results", str(results), image, "--", "sh", "-c", script) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT
    assert (results / "made").read_text() == "put away\n" and containers(lab) == []


def test_time_is_limited(lab: DockerLab, image: str) -> None:
    with pytest.raises(InputError, match=r"wall_s: 0\.5"):
        ran(lab, image, "sleep", "600", limits=Limits(wall_s=0.5))
    assert containers(lab) == []


def test_nothing_outlives_a_killed_controller(lab: DockerLab, root: Path, image: str) -> None:
    script = "trap '' TERM HUP INT; (trap '' TERM HUP; sleep 600) & echo ready; sleep 600"
    with python(lab, root, "run", image, "--", "sh", "-c", script) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        assert len(containers(lab, running=True)) == 1
        process.kill()
    wait_until(lambda: not containers(lab, running=True), LEFT_ALONE_S, "end of the container")
    assert ran(lab, image, "true")[0] == 0
    assert containers(lab) == [], "the next run takes away what lay there"


def test_nothing_outlives_a_stopped_controller(lab: DockerLab, root: Path, image: str) -> None:
    """A machine or a link that is gone looks like this: the connection stands, and nobody says a word."""
    with python(lab, root, "run", image, "--", "sh", "-c", "echo ready; exec sleep 600") as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: not containers(lab, running=True), LEFT_ALONE_S, "end of the container")
        finally:
            process.kill()
    assert ran(lab, image, "true")[0] == 0 and containers(lab) == []


def test_containers_of_others_are_left_alone(lab: DockerLab, image: str) -> None:
    label = f"{owner.CONTROLLER}=elsewhere/boot 1 1"
    other = lab.run(["docker", "run", "-d", "--network=none", "--label", label, image, "sleep", "600"]).stdout.strip()
    try:
        assert ran(lab, image, "true")[0] == 0
        assert other.startswith(containers(lab, running=True)[0])
    finally:
        lab.run(["docker", "rm", "-f", other])


# -- builds -------------------------------------------------------------------------------------------------------------------

TEMPLATE = """FROM {{ base | reference }} AS system
LABEL {{ label_stage | word }}="system"
RUN {{ options['a.lock'] | shell }}
COPY packages/ /packages/
COPY code/ /code/
{% for label, value in labels.items() %}
LABEL {{ label | word }}="{{ value | quoted }}"
{% endfor %}
LABEL {{ label_stage | word }}="whole"

USER 10001:10001
"""


class Builder:
    """A small project with one image, whose one step is the shell command `step`."""

    def __init__(self, lab: DockerLab, root: Path, base: str) -> None:
        self.lab, self.root, self.base, self.name = lab, root, base, "small"
        self.logs = root.parent / "logs"
        (root / "containers").mkdir()
        (root / "code").mkdir()
        (root / "code" / "a.py").write_text("a = 1\n")
        (root / "a.lock").write_text("")
        self.step("true")
        for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"]):
            subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)

    def step(self, command: str) -> None:
        text = TEMPLATE.replace("{{ options['a.lock'] | shell }}", command)
        (self.root / "containers" / "small.Dockerfile.j2").write_text(text)

    def make(self, **options: Any) -> Built:
        images = ImageFile.model_validate(
            {
                "bases": {"b": {"image": self.base, "python": "3.11"}},
                "images": {
                    "small": {
                        "title": "t",
                        "template": "small.Dockerfile.j2",
                        "base": "b",
                        "locks": ["a.lock"],
                        "code": ["code"],
                    }
                },
            }
        )
        entry = images.image("small")
        wanted = recipe(self.root, self.name, entry, images.bases["b"], Site(network="none"))
        with connect(self.lab.docker_host) as engine:
            return build(engine, wanted, self.logs, **options)

    def names(self) -> list[str]:
        words = ["docker", "images", "--format", "{{.Repository}}:{{.Tag}}", f"fivefold/{self.name}"]
        return self.lab.run(words).stdout.split()


@pytest.fixture
def builder(lab: DockerLab, image: str, tmp_path: Path) -> Iterator[Builder]:
    (tmp_path / "project").mkdir()
    found = Builder(lab, tmp_path / "project", image)
    yield found
    for name in found.names():
        lab.run(["docker", "rmi", "-f", name])


def test_an_image_is_built_once_labelled_and_not_for_root(builder: Builder, lab: DockerLab) -> None:
    first = builder.make()
    assert first.outcome == Outcome.BUILT and builder.names() == [first.reference]
    assert builder.make().outcome == Outcome.UP_TO_DATE
    with connect(lab.docker_host) as engine:
        told = (inspect(engine, first.reference) or {})["Config"]
    commit = subprocess.run(
        ["git", "-C", str(builder.root), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert told["User"] == "10001:10001" and told["Labels"]["org.fivefold.commit"] == commit
    assert told["Labels"]["org.fivefold.dirty"] == "false" and len(told["Labels"]["org.fivefold.lock"]) == 64
    (builder.root / "code" / "a.py").write_text("a = 2\n")
    second = builder.make()
    assert second.outcome == Outcome.BUILT and second.reference != first.reference
    _, out, _ = ran(lab, second.reference, "cat", "/code/code/a.py")
    assert out == "a = 2\n"


def test_a_base_that_changed_under_its_name_is_noticed(builder: Builder, lab: DockerLab, image: str) -> None:
    builder.base = "local/base:1"
    lab.run(["docker", "tag", image, builder.base])
    assert builder.make().outcome == Outcome.BUILT and builder.make().outcome == Outcome.UP_TO_DATE
    changed = lab.run(["docker", "create", "--network=none", image, "true"]).stdout.strip()
    lab.run(["docker", "commit", "-c", "ENV X=1", changed, builder.base])
    lab.run(["docker", "rm", changed])
    assert builder.make().outcome == Outcome.BUILT


def test_a_base_out_of_reach_is_not_buildable_here(builder: Builder, lab: DockerLab) -> None:
    builder.base = lab.missing_image
    built = builder.make()
    assert built.outcome == Outcome.NOT_BUILDABLE and "containers/site.yaml" in built.why and "\n" not in built.why


def test_a_step_that_fails_is_one_line_with_its_log(builder: Builder, lab: DockerLab) -> None:
    builder.step("echo the reason; exit 3")
    built = builder.make()
    assert built.outcome == Outcome.FAILED and "code: 3" in built.why and "\n" not in built.why
    assert "the reason" in (builder.logs / "small.log").read_text()
    assert builder.names() == [] and containers(lab) == []
    builder.step("true")
    assert builder.make().outcome == Outcome.BUILT


@pytest.mark.parametrize("how", ["stop_daemon", "kill_daemon"])
def test_an_engine_that_stops_during_a_build(builder: Builder, lab: DockerLab, how: str) -> None:
    builder.step("echo begun; sleep 600")
    caught: list[BaseException] = []

    def make() -> None:
        try:
            builder.make()
        except InputError as error:
            caught.append(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    log = builder.logs / "small.log"
    wait_until(lambda: log.exists() and "begun" in log.read_text().replace("echo begun", ""), 30, "start of the step")
    try:
        getattr(lab, how)()
        thread.join(60)
    finally:
        lab.start_daemon()
    assert not thread.is_alive() and len(caught) == 1
    assert re.search(r"engine (?:stopped|is not there).*(?:start it|run the same command again)", str(caught[0])), caught[0]
    assert "\n" not in str(caught[0])
    assert builder.names() == []
    for left in containers(lab):
        lab.run(["docker", "rm", "-f", left])  # a killed engine forgets it; ours are taken away once they are ten minutes old
    builder.step("true")
    assert builder.make().outcome == Outcome.BUILT


def test_what_a_cut_off_build_left_goes_when_it_is_old(
    builder: Builder, lab: DockerLab, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = lab.run(["docker", "create", "--network=none", "--label", f"{owner.STAGE}=system", image, "true"]).stdout.strip()
    builder.make()
    assert [each for each in containers(lab) if left.startswith(each)], "another build may be at it"
    monkeypatch.setattr(owner, "OLD_S", -1e9)
    builder.make()
    assert containers(lab) == []


def test_to_a_registry_and_back_by_digest(builder: Builder, lab: DockerLab) -> None:
    built = builder.make()
    with connect(lab.docker_host) as engine:
        there = registry.push(engine, built.reference, f"{lab.registry}/group")
        assert re.fullmatch(rf"{re.escape(lab.registry)}/group/fivefold/small@sha256:[0-9a-f]{{64}}", there)
        for name in (built.reference, f"{lab.registry}/group/{built.reference}"):
            lab.run(["docker", "rmi", "-f", name])
        assert inspect(engine, there) is None
        assert registry.pull(engine, there) == there
        assert digest(engine, there) == there
        assert ran(lab, there, "cat", "/code/code/a.py")[1] == "a = 1\n"
        with pytest.raises(InputError, match=r"not found|unknown"):
            registry.pull(engine, lab.missing_image)
        with pytest.raises(InputError, match="build it first"):
            registry.push(engine, "no-such:1", lab.registry)
        lab.run(["docker", "rmi", "-f", there])


def test_a_bad_template_ends_the_command_with_one_line(builder: Builder, lab: DockerLab, root: Path) -> None:
    (builder.root / "containers" / "small.Dockerfile.j2").write_text("FROM {{ bsae | reference }}\n")
    (builder.root / "containers" / "images.yaml").write_text(
        "bases: {b: {image: 'x:1', python: '3.11'}}\n"
        "images: {small: {title: t, template: small.Dockerfile.j2, base: b, locks: [a.lock]}}\n"
    )
    with python(lab, root, "--root", str(builder.root), "build", "--logs", str(builder.logs)) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and err.count("\n") == 1
    assert "small.Dockerfile.j2: line 1" in err and "'bsae' is undefined" in err
