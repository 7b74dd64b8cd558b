"""A job on its way to a host and back, without any host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.dispatch import slots
from harness.dispatch.cargo import Cargo
from harness.dispatch.here import only_here
from harness.dispatch.job import inside, job_of, without
from harness.dispatch.run import able
from harness.inventory import Gpu, Host
from systems.registry import InputError

COMMAND = (
    *("python", "-m", "harness.series", "--figure", "figures/fake/knee.yaml", "--series", "ours", "--results", "results"),
    *("--config-json", '{"seed": 3}', "--datasets", "results/datasets/a.json", "/else/b.json", "--rescale"),
    *("--out", "results/run/fake/knee/series/ours.parquet"),
)
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJlZ2Zm9vYmFyYmF6cXV1eHF1dXV1eGNvcmdlZ3JhdWx0"


def host(name: str, **more: Any) -> Host:
    return Host.model_construct(name=name, address=name, user="me", port=22, local=False, gpus=(), **more)


def test_a_command_is_known_by_its_parts_and_called_in_its_folder() -> None:
    job = job_of(COMMAND)
    assert (job.module, job.figure, job.rescale) == ("harness.series", Path("figures/fake/knee.yaml"), ())
    assert job.datasets == (Path("results/datasets/a.json"), Path("/else/b.json"))
    assert job.config == '{"seed": 3}'
    argv = job.argv("/elsewhere/python")
    assert argv[:3] == ["/elsewhere/python", "-m", "harness.series"]
    assert argv[argv.index("--datasets") + 1 :][:2] == ["results/datasets/a.json", "outside/else/b.json"]
    assert argv[argv.index("--config-json") + 1] == '{"seed": 3}'


def test_two_controllers_and_two_series_have_folders_of_their_own() -> None:
    job = job_of(COMMAND)
    other = job_of([word.replace("ours", "theirs") for word in COMMAND])
    assert len({job.name("a:/x"), job.name("b:/x"), job.name("a:/y"), other.name("a:/x")}) == 4
    assert job.name("a:/x") == job_of(COMMAND).name("a:/x")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], "command: '(none)'"),
        (["rm", "-rf", "/"], "command: 'rm -rf /'"),
        (["python", "-m", "http.server"], "one of harness.series"),
        (["python", "-m", "harness.series", "--figure", "a.yaml"], "--results: '(absent)': name one path"),
    ],
)
def test_what_is_no_job_is_refused(command: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        job_of(command)
    assert said in str(error.value)


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=30))
def test_no_path_leads_out_of_the_folder(text: str) -> None:
    there = inside(Path(text))
    assert not there.startswith("/") and ".." not in there.split("/")


def test_paths_that_differ_here_differ_there() -> None:
    paths = ["a", "b/a", "../a", "/a", "b/../../a"]
    assert len({inside(Path(path)) for path in paths}) == len({str(Path(os.path.normpath(path))) for path in paths})


def test_without_an_option() -> None:
    assert without(["a", "--log", "x", "b"], "--log") == ["a", "b"]
    assert without(["a", "--log"], "--log") == ["a", "--log"]


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("hosts: [{name: local, local: true}]", True),
        ("hosts: [{name: local, local: true}, {name: far, address: far, user: me}]", False),
        ("hosts: [{name: local, local: true, runner: {kind: container, image: a}}]", False),
        ("hosts: [{name: local, local: true}]\ninclude: [other.yaml]", False),
        ("hosts: [", False),
        ("[]", False),
        ("", False),
    ],
)
def test_an_inventory_of_this_machine_alone(tmp_path: Path, text: str, here: bool) -> None:
    (tmp_path / "hosts.yaml").write_text(text)
    assert only_here(tmp_path / "hosts.yaml") is here


def test_on_this_machine_the_command_takes_the_place_of_dispatch(root: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts.yaml").write_text("hosts: [{name: local, local: true}]")
    show = "import os, sys; print(os.getpid(), [m for m in sys.modules if m in ('fabric', 'paramiko')])"
    argv = [
        sys.executable,
        "-m",
        "harness.dispatch",
        "--inventory",
        str(tmp_path / "hosts.yaml"),
        "--",
        sys.executable,
        "-c",
        show,
    ]
    process = subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=60)[0] == f"{process.pid} []\n"


def test_slots_are_taken_once_and_spread_over_hosts(tmp_path: Path) -> None:
    hosts = [host("one"), host("two")]
    said: list[str] = []
    with slots.taken(hosts, 2, said.append, tmp_path) as a, slots.taken(hosts, 2, said.append, tmp_path) as b:
        assert {a.name, b.name} == {"one", "two"}, "the first slots of all before the second of any"
        with slots.taken(hosts, 2, said.append, tmp_path) as c, slots.taken(hosts, 2, said.append, tmp_path) as d:
            assert {c.name, d.name} == {"one", "two"}
            assert slots._free(hosts, 2, tmp_path) is None
    assert not said
    with slots.taken(hosts, 1, said.append, tmp_path):
        assert slots._free(hosts, 1, tmp_path) is not None


def test_a_measured_job_goes_to_a_host_with_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.figure_file.SYSTEMS", {"fake": "A fake"})
    figure = Path(__file__).resolve().parent.parent / "fakes" / "knee.yaml"
    (tmp_path / "fake").mkdir()
    text = figure.read_text().replace("testbed: nothingx1", "backends: [measured]\ntestbed: t4x2")
    (tmp_path / "fake" / "knee.yaml").write_text(text)
    words = [str(tmp_path / "fake" / "knee.yaml") if word.endswith("knee.yaml") else word for word in COMMAND]
    bare, small = host("bare"), host("small").model_copy(update={"gpus": (Gpu(model="t4", count=1),)})
    fits = small.model_copy(update={"name": "fits", "gpus": (Gpu(model="t4", count=2),)})
    hosts = [bare, small, fits]
    assert able(job_of(words), hosts, Path("x.yaml")) == hosts
    measured = job_of([word.replace('"seed": 3', '"backend": "measured"') for word in words])
    assert able(measured, hosts, Path("x.yaml")) == [fits]
    with pytest.raises(InputError, match="t4x2"):
        able(measured, [bare, small], Path("x.yaml"))


# -- what comes back -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cargo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cargo:
    monkeypatch.chdir(tmp_path)
    return Cargo(job_of(COMMAND), "jobs/ours-1", {})


def arrived(cargo: Cargo, staging: Path, files: dict[str, str]) -> list[str]:
    batch = []
    for name, text in files.items():
        path = staging / cargo.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        batch.append(f"{cargo.folder}/{name}")
    return batch


TRIAL = "results/trials/abc/"
WHOLE = {TRIAL + name: "{}" for name in ("spec.json", "metrics.json", "provenance.json", "requests.parquet")}
SERIES = "results/run/fake/knee/series/ours"


def test_trials_come_back_whole_or_not_at_all(cargo: Cargo, tmp_path: Path) -> None:
    cargo.publish(tmp_path / "s", arrived(cargo, tmp_path / "s", {TRIAL + "requests.parquet": ""}))
    assert not list(tmp_path.glob("results/trials/*"))
    cargo.publish(tmp_path / "t", arrived(cargo, tmp_path / "t", WHOLE))
    assert sorted(path.name for path in tmp_path.glob("results/trials/abc/*")) == sorted(name[len(TRIAL) :] for name in WHOLE)
    again = dict.fromkeys(WHOLE, "other")
    cargo.publish(tmp_path / "u", arrived(cargo, tmp_path / "u", again))
    assert (tmp_path / TRIAL / "metrics.json").read_text() == "{}", "what is here stays"


def test_a_history_never_stands_beside_the_key_of_another(cargo: Cargo, tmp_path: Path) -> None:
    arrive = arrived(cargo, tmp_path / "s", {SERIES + ".key": "one", SERIES + ".history.jsonl": "1\n"})
    cargo.publish(tmp_path / "s", arrive)
    assert (tmp_path / (SERIES + ".history.jsonl")).read_text() == "1\n"
    cargo.publish(tmp_path / "t", arrived(cargo, tmp_path / "t", {SERIES + ".key": "two"}))
    assert not (tmp_path / (SERIES + ".history.jsonl")).exists()
    cargo.publish(tmp_path / "u", arrived(cargo, tmp_path / "u", {SERIES + ".key": "two", SERIES + ".history.jsonl": "2\n"}))
    assert (tmp_path / (SERIES + ".history.jsonl")).read_text() == "2\n"


def test_what_an_earlier_run_left_is_taken_home_once(cargo: Cargo, tmp_path: Path) -> None:
    found = {f"{cargo.folder}/{name}": "" for name in WHOLE} | {f"{cargo.folder}/results/trials/half/spec.json": ""}
    assert sorted(cargo.left_behind(found)) == sorted(f"{cargo.folder}/{name}" for name in WHOLE)
    (tmp_path / TRIAL).mkdir(parents=True)
    assert not cargo.left_behind(found)


def test_only_trials_of_this_code_travel(cargo: Cargo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.dispatch.cargo.system_of", lambda figure: "fake")
    monkeypatch.setattr("harness.dispatch.cargo.system_version", lambda system: f"{system}-now")
    for name, spec in {
        "mine": {"system": "fake", "code": "fake-now"},
        "old": {"system": "fake", "code": "fake-then"},
        "others": {"system": "sirius", "code": "fake-now"},
    }.items():
        folder = tmp_path / "results" / "trials" / name
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "results" / "trials" / "torn").mkdir()
    (tmp_path / "results" / "trials" / "torn" / "spec.json").write_text("{")
    assert [path.name for path in cargo._trials()] == ["mine"]
