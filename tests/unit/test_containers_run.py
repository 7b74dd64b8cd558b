"""What a container is told: decided without any engine."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.containers import __main__ as commands
from harness.containers import leash, owner
from harness.containers.build import Built, Outcome
from harness.containers.context import checksum, tracked, write_tar
from harness.containers.forward import command
from harness.containers.models import Base, Image, Site
from harness.containers.recipe import recipe
from harness.containers.specification import GIB, Limits, Mount, Run, check, create_arguments, host_options, memory, shown
from harness.containers.wheelhouse import pins, wheels
from systems.registry import InputError

INJECTIONS = ["'; touch PWNED #", "$(touch PWNED)", "`touch PWNED`", "a\nb", "-x", "", "é"]


class Api:
    """The part of the SDK that only arranges."""

    def create_host_config(self, **options: Any) -> dict[str, Any]:
        return options


def test_a_container_may_do_nothing_that_it_was_not_given() -> None:
    options = host_options([], Limits(), "none")
    assert options["cap_drop"] == ["ALL"] and options["read_only"] and options["network_mode"] == "none"
    assert options["security_opt"] == ["no-new-privileges"] and options["pids_limit"] > 0
    assert not {"privileged", "cap_add", "devices", "pid_mode", "ipc_mode", "device_requests"} & set(options)


def test_limits_become_what_the_engine_calls_them() -> None:
    options = host_options([], Limits(memory_bytes=GIB, cpus=1.5, gpus=(0, 3)), "host")
    assert options["mem_limit"] == options["memswap_limit"] == GIB
    assert options["nano_cpus"] == 1_500_000_000
    assert options["device_requests"][0]["DeviceIDs"] == ["0", "3"]
    assert host_options([], Limits(gpus="all"), "none")["device_requests"][0]["Count"] == -1


def test_mounts_are_read_only_unless_said_and_outer_ones_come_first() -> None:
    results, code = Path("/w/code/results"), Path("/w/code")
    options = host_options(
        [Mount(results, writable=True), Mount(code), Mount(Path("/d"), target="/w/code/d")], Limits(), "none"
    )
    told = [(mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in options["mounts"]]
    assert told == [("/w/code", "/w/code", True), ("/w/code/results", "/w/code/results", False), ("/d", "/w/code/d", True)]


def test_a_path_with_colons_is_one_path() -> None:
    mount = host_options([Mount(Path("/a:b:rw"))], Limits(), "none")["mounts"][0]
    assert (mount["Source"], mount["Target"], mount["ReadOnly"]) == ("/a:b:rw", "/a:b:rw", True)


@pytest.mark.parametrize("text", INJECTIONS)
def test_words_stay_words_and_values_stay_out_of_the_command(text: str) -> None:
    run = Run("image:1", ("echo", text), variables={"A": text})
    check(run)
    told = create_arguments(Api(), run)
    assert told["command"] == ["echo", text] and isinstance(told["entrypoint"], list)
    assert told["environment"]["A"] == text
    assert told["stdin_open"] and "tty" not in told


@pytest.mark.parametrize("name", [*INJECTIONS, "UPPER", "a" * 256])
def test_what_is_no_image_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"container: image"):
        check(Run(name, ("true",)))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (Run("i:1", ()), "command"),
        (Run("i:1", ("a\0b",)), "zero byte"),
        (Run("i:1", ("a",), variables={"A B": "x"}), "environment"),
        (Run("i:1", ("a",), variables={"A=B": "x"}), "environment"),
        *(
            (Run("i:1", ("a",), (Mount(Path(path)),)), "mount")
            for path in ("/", "/etc", "/usr/lib", "/proc", "rel", "/a/../etc")
        ),
    ],
)
def test_what_would_not_do_what_it_says_is_refused(run: Run, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check(run)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("64m", 2**26), ("1.5g", 3 * 2**29), ("8GiB", 2**33), ("2kb", 2048)])
def test_sizes(text: str, size: int) -> None:
    assert memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1g", "8x", "nan", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="512m"):
        memory(text)


@given(st.integers(min_value=1, max_value=2**60))
def test_a_shown_size_is_close_to_the_size(size: int) -> None:
    number, unit = shown(size).split()
    factor = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
    assert abs(float(number) * factor - size) <= 0.006 * size


# -- the leash, as a process of this machine -------------------------------------------------------------------------------


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def start(*argv: str, silence_s: float = 60) -> subprocess.Popen[str]:
    words = [sys.executable, "-I", leash.__file__, str(silence_s), "--", *argv]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 137),
        (["no-such-command"], 127),
        (["/"], 126),
        (["sh", "-c", "sleep 0.01 & sleep 0.02 & wait; exit 3"], 3),
    ],
)
def test_the_leash_ends_as_its_command_does(argv: list[str], status: int) -> None:
    with start(*argv) as process:
        assert process.wait(20) == status


def test_the_leash_ends_its_command_when_its_input_ends() -> None:
    with start("sh", "-c", "trap '' TERM HUP INT; echo $$; exec sleep 600") as process:
        assert process.stdin and process.stdout
        child = int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(20) == leash.LOST
        for _ in range(1000):  # process 1 of this machine may take its time to take it in
            if not running(child):
                break
            threading.Event().wait(0.01)
        assert not running(child)


def test_the_leash_ends_its_command_when_its_input_falls_silent() -> None:
    with start("sleep", "600", silence_s=0.2) as process:
        assert process.wait(20) == leash.LOST


def test_a_sign_of_life_keeps_the_command_alive() -> None:
    with start("sh", "-c", "read line; echo got=$line; sleep 1.5; echo done", silence_s=1) as process:
        assert process.stdin and process.stdout
        while process.poll() is None and process.stdin:
            process.stdin.write("\n")
            process.stdin.flush()
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        assert process.stdout.read() == "got=\ndone\n", "and the command's own input is empty"
        assert process.returncode == 0


def test_the_leash_passes_signals_on_to_the_whole_group() -> None:
    script = "trap 'echo caught; exit 5' TERM; sh -c 'echo ready; exec sleep 600' & wait"
    with start("sh", "-c", script) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(20) == 5 and process.stdout.read() == "caught\n"


# -- owners ----------------------------------------------------------------------------------------------------------------


def test_a_process_is_known_by_its_start_too() -> None:
    mine = owner.this_process()
    assert owner.gone(mine) is False
    machine, pid, start_time = mine.rsplit(" ", 2)
    assert owner.gone(f"{machine} {pid} {int(start_time) + 1}") is True
    assert owner.gone(f"elsewhere/boot {pid} {start_time}") is None
    assert owner.gone("") is None


def test_an_ended_process_is_gone() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        named = f"{owner.this_process().rsplit(' ', 2)[0]} {process.pid} {fields[19]}"
        assert owner.gone(named) is False
        process.kill()
    assert owner.gone(named) is True


# -- contexts and recipes ----------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers" / "a.Dockerfile.j2").write_text("FROM {{ base | reference }}\n")
    (tmp_path / "a.lock").write_text("six==1.17.0 \\\n    --hash=sha256:00\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    return tmp_path


ENTRY = Image(title="t", template="a.Dockerfile.j2", base="b", locks=("a.lock",), code=("code",))
BASE = Base(image="x:1", python="3.11")


def test_only_tracked_files_go_in(project: Path) -> None:
    (project / "code" / ".env").write_text("TOKEN=1")
    (project / "code" / "new.py").write_text("")
    assert tracked(project, ["code", "a.lock"]) == [Path("a.lock"), Path("code/a.py")]
    (project / "code" / "a.py").unlink()
    assert tracked(project, ["code"]) == []


def test_untracked_parts_and_folders_without_git_are_refused(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (project / "more").mkdir()
    assert tracked(project, ["more"]) == []
    (project / "more" / "x").write_text("")
    with pytest.raises(InputError, match="git tracks nothing there"):
        tracked(project, ["more"])
    with pytest.raises(InputError, match="tracks nothing"):
        tracked(project, ["*"])
    with pytest.raises(InputError, match="git checkout"):
        tracked(tmp_path_factory.mktemp("bare"), ["x"])


def test_the_recipe_changes_with_all_that_matters_and_with_nothing_else(project: Path) -> None:
    def key(entry: Image = ENTRY, base: Base = BASE, site: Site | None = None) -> str:
        return recipe(project, "a", entry, base, site or Site()).key

    first = key()
    git(project, "commit", "-qm", "one")
    os.utime(project / "code" / "a.py", (1, 1))
    (project / "code" / "untracked").write_text("x")
    assert key() == first
    assert key(base=Base(image="x:2", python="3.11")) != first
    assert key(site=Site(bases={"b": "local:1"})) != first
    (project / "code" / "a.py").write_text("a = 2\n")
    second = key()
    assert second != first
    (project / "a.lock").write_text("six==1.16.0\n")
    assert key() != second


def test_a_missing_lock_is_one_line(project: Path) -> None:
    (project / "a.lock").unlink()
    with pytest.raises(InputError, match=r"a\.lock: lock"):
        recipe(project, "a", ENTRY, BASE, Site())


def test_the_same_content_gives_the_same_bytes(project: Path) -> None:
    def tar() -> bytes:
        out = io.BytesIO()
        write_tar({"b": project / "code" / "a.py", "a": b"x"}, out)
        return out.getvalue()

    first = tar()
    os.utime(project / "code" / "a.py", (5, 5))
    (project / "code" / "a.py").chmod(0o600)
    assert tar() == first
    with tarfile.open(fileobj=io.BytesIO(first)) as read:
        assert read.getnames() == ["a", "b"] and {entry.uid for entry in read} == {0}
    (project / "code" / "a.py").chmod(0o700)
    assert tar() != first


@given(st.dictionaries(st.text("abc/.", min_size=1), st.binary(max_size=20), max_size=4))
def test_a_checksum_tells_files_apart(files: dict[str, bytes]) -> None:
    assert checksum(files) == checksum(dict(reversed(files.items())))
    assert checksum({**files, "zz": b""}) != checksum(files)


def test_pins_keep_versions_and_markers() -> None:
    lock = 'a==1 ; python_version < "3.12" \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\nb==2 \\\n    --hash=sha256:22\n'
    assert pins(lock) == 'a==1 ; python_version < "3.12"\nb==2\n'


def test_wheels_for_another_python_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wheels for Python 3\.7 are made by Python 3\.7"):
        wheels([], "3.7", cache=tmp_path)


def test_a_package_with_another_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    package = tmp_path / "six-1.0-py3-none-any.whl"
    package.write_bytes(b"not what was pinned")
    lock = tmp_path / "a.lock"
    lock.write_text(f"six @ file://{package} --hash=sha256:{'0' * 64}\n")
    with pytest.raises(InputError, match="pip wheel"):
        wheels([lock], f"3.{sys.version_info.minor}", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# -- engines over SSH, and the command line ------------------------------------------------------------------------------------


def test_an_engine_over_ssh_is_strict_about_its_host() -> None:
    words = command("ssh://me@gpu1:2222/run/podman.sock", "/tmp/local")
    assert words[0] == "ssh" and words[words.index("--") + 1] == "gpu1"
    assert {"-oStrictHostKeyChecking=yes", "-oBatchMode=yes"} <= set(words)
    assert words[words.index("-L") + 1] == "/tmp/local:/run/podman.sock"
    assert words[words.index("-l") + 1] == "me" and words[words.index("-p") + 1] == "2222"


@pytest.mark.parametrize("url", ["ssh://", "ssh://-oProxyCommand=x", "ssh://me:pw@h", "ssh://h:x", "ssh://-l@h", "ssh://a b"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="engine: address"):
        command(url, "/tmp/local")


def test_values_stay_out_of_command_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def variables(*words: str) -> dict[str, str]:
        args = commands._parser().parse_args(["run", *words, "image:1"])
        return commands._variables(args)

    monkeypatch.setenv("A_VALUE", "x y")
    file = tmp_path / "env"
    file.write_text("# comment\n\nB=1=2\n")
    assert variables("--env", "A_VALUE", "--env-file", str(file)) == {"A_VALUE": "x y", "B": "1=2"}
    with pytest.raises(InputError) as caught:
        variables("--env", "KEY=hidden")
    assert "hidden" not in str(caught.value)
    with pytest.raises(InputError, match="set it"):
        variables("--env", "NOT_SET_ANYWHERE")
    file.write_text("hidden")
    with pytest.raises(InputError) as caught:
        variables("--env-file", str(file))
    assert "hidden" not in str(caught.value) and "line 1" in str(caught.value)


@pytest.mark.parametrize(("text", "gpus"), [("all", "all"), ("", ()), ("0,2", (0, 2))])
def test_gpus(text: str, gpus: object) -> None:
    assert commands._gpus(text) == gpus


def test_a_line_says_what_became_of_an_image() -> None:
    assert "not buildable here  no base" in commands.line(Built("a", Outcome.NOT_BUILDABLE, "", 0, "no base"))
    assert commands.line(Built("a", Outcome.BUILT, "fivefold/a:1", 2.0)).endswith("fivefold/a:1  2.0 s")


def test_importing_needs_no_docker(root: Path) -> None:
    names = ("docker", "requests", "pandas")
    code = f"import sys; import harness.containers.__main__; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
