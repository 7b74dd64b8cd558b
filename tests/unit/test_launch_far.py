"""What runs beside a role: frames, files by checksum, and the names of Slurm's nodes."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.launch.far import files, wire
from harness.launch.places import Contained, Here, Step, allocated_nodes, expand


@given(st.lists(st.tuples(st.sampled_from(["out", "err"]), st.binary(max_size=2000)), max_size=20))
def test_frames_come_out_as_they_went_in(said: list[tuple[str, bytes]]) -> None:
    stream = io.BytesIO(b"".join(wire.encode(kind, data) for kind, data in said))
    for kind, data in said:
        frame = wire.read_frame(stream)
        assert frame is not None and frame["k"] == kind
        assert wire.read_data(stream, frame) == data
    assert wire.read_frame(stream) is None


@pytest.mark.parametrize("data", [b"{", b"hello\n", b"[]\n", b'{"k": 1}\n', b'{"k": "out"}'])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(wire.Broken):
        wire.read_frame(io.BytesIO(data))


def sent(root: Path, path: str, size: int | None = None) -> io.BytesIO:
    stream = io.BytesIO()
    files.send(root, path, stream.write, size)
    stream.seek(0)
    return stream


@given(content=st.binary(max_size=5000))
def test_a_file_arrives_with_its_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    (one / "a").write_bytes(content)
    stream = sent(one, "a")
    frame = wire.read_frame(stream)
    assert frame is not None
    files.receive(other, stream, frame)
    assert (other / "a").read_bytes() == content and len(list(other.iterdir())) == 1


@pytest.mark.parametrize("where", [10, -1])
def test_a_file_that_is_damaged_on_the_way_does_not_arrive(tmp_path: Path, where: int) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    stream = sent(tmp_path, "a")
    frame = wire.read_frame(stream)
    assert frame is not None
    rest = bytearray(stream.read())
    rest[where] ^= 1
    with pytest.raises(wire.Broken, match="damaged"):
        files.receive(tmp_path / "other", io.BytesIO(bytes(rest)), frame)
    with pytest.raises(wire.Broken, match="ended within"):
        files.receive(tmp_path / "other", io.BytesIO(bytes(rest[:50])), frame)
    assert not list((tmp_path / "other").iterdir())


def test_a_file_that_shrinks_while_it_is_sent_is_not_taken_for_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    stream = sent(tmp_path, "a", size=200)
    frame = wire.read_frame(stream)
    assert frame is not None
    with pytest.raises(wire.Broken, match="damaged"):
        files.receive(tmp_path / "other", stream, frame)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../a", "a/../../b", "a//b", "./a", "a\0b", ".."])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(wire.Broken):
        files.inside(tmp_path, path)


def test_what_appears_is_sent_once_and_again_when_it_changes(tmp_path: Path) -> None:
    (tmp_path / "t" / "1").mkdir(parents=True)
    (tmp_path / "t" / "1" / "m").write_text("1")
    (tmp_path / "t" / ".half.tmp").mkdir()
    (tmp_path / "t" / ".half.tmp" / "m").write_text("?")
    collector = files.Collector(tmp_path, ["t/*/*", "history"])

    def batch() -> list[str]:
        stream = io.BytesIO()
        collector.send_new(stream.write)
        stream.seek(0)
        names = []
        while (frame := wire.read_frame(stream)) is not None:
            names.append(frame.get("path", frame["k"]))
            for _ in wire.chunks(stream, frame.get("size", 0) + (64 if frame["k"] == "file" else 0)):
                pass
        return names

    assert batch() == ["t/1/m", "collected"]
    assert batch() == []
    (tmp_path / "history").write_text("refers to 2")
    (tmp_path / "t" / "2").mkdir()
    (tmp_path / "t" / "2" / "m").write_text("2")
    assert batch() == ["t/2/m", "history", "collected"], "what is referred to comes first"


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07],login", ["node01", "node02", "node03", "node07", "login"]),
        ("a,b[9-11]x,c", ["a", "b9x", "b10x", "b11x", "c"]),
    ],
)
def test_the_nodes_of_an_allocation(short: str, names: list[str]) -> None:
    assert expand(short) == names
    assert allocated_nodes({"SLURM_JOB_NODELIST": short}) == names
    assert allocated_nodes({}) == []


def test_a_step_shares_the_allocation_and_asks_for_its_gpus() -> None:
    line = Step("node01", gpus=2, cpus=4).command(["true"])
    assert line[0] == "srun" and line[-1] == "true"
    assert {"--nodelist=node01", "--gres=gpu:2", "--cpus-per-task=4", "--overlap"} <= set(line)


def test_a_container_runs_as_the_user_of_its_machine_without_privileges() -> None:
    place = Contained("image:1", Here(), mounts={"~/fivefold; touch PWNED": "/fivefold"}, memory_bytes=1 << 30, network="none")
    shell, option, script = place.command(["python3", "-c", "print('$HOME')"])
    assert (shell, option) == ("sh", "-c")
    assert "--cap-drop=ALL" in script and "no-new-privileges" in script and f"--memory={1 << 30}" in script
    assert """source='"$HOME"'/fivefold; touch PWNED,target=/fivefold'""" in script
    assert script.endswith("""'print('"'"'$HOME'"'"')'""")


# an engine that has no image until it was pulled, unless `here` is there; what it says an image is, is in `identity`
ENGINE = """#!/bin/sh
cd "$(dirname "$0")"
case "$1" in
image) [ -e here ] && cat identity;;
pull) [ -e reachable ] && touch here && echo pulled || { echo "no such image: $3" >&2; exit 1; };;
run) echo "$FIVEFOLD_IMAGE"; echo "$@";;
esac
"""


@pytest.mark.parametrize(
    ("there", "identity", "known_as"),
    [
        ("here", "reg.example/a@sha256:1", "reg.example/a@sha256:1"),
        ("here", "@sha256:2", "a:1@sha256:2"),
        ("reachable", "@sha256:3", "a:1@sha256:3"),
    ],
)
def test_what_runs_in_a_container_is_told_its_image(tmp_path: Path, there: str, identity: str, known_as: str) -> None:
    engine = tmp_path / "engine"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    (tmp_path / "identity").write_text(identity)
    (tmp_path / there).touch()
    command = Contained("a:1", Here(), engine=str(engine)).command(["true"])
    said, words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == known_as and "--env=FIVEFOLD_IMAGE" in words.split()


def test_an_image_that_cannot_be_had_is_the_engines_last_word(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    command = Contained("a:1", Here(), engine=str(engine)).command(["true"])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (125, "", "no such image: a:1\n")


def test_no_text_of_a_containers_place_is_ever_run(tmp_path: Path) -> None:
    engine = tmp_path / "an engine"
    engine.write_text('#!/bin/sh\n[ "$1" != run ] || printf \'%s\\0\' "$@"\n')
    engine.chmod(0o755)
    for number, text in enumerate(
        ["'; touch PWNED #", "$(touch PWNED)", "a\ntouch PWNED\n", "`touch PWNED`é漢", '"; touch PWNED #']
    ):
        source = tmp_path / str(number) / text
        place = Contained(text, Here(), engine=str(engine), mounts={str(source): "/fivefold"})
        command = place.command([text, f"--source=~/{text}"])
        words = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split("\0")
        assert words[-4:] == [text, text, f"--source=~/{text}", ""]
        assert f"--mount=type=bind,source={source},target=/fivefold" in words and source.is_dir()
        assert not list(tmp_path.rglob("PWNED"))
