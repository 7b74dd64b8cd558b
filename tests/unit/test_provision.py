"""Facts of hosts and what follows from them; which files a host gets."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.inventory import Gpu, Host, load_inventory
from harness.provision import code, facts, image, smoke, status
from harness.provision.facts import Python
from harness.provision.far import State
from harness.provision.steps import _differences
from harness.remote import Ran, RemoteError

SAID = """\
time=1700000010.5
made=/scratch/me
hostname=gpu1
system=Linux 6.1
machine=x86_64
os=Debian GNU/Linux 12
cpu=AMD EPYC = fast
cpus=64
memory_kib=263192576
free_kib=104857600
clock_synchronised=yes
python=python3 3.9.2 venv /usr/bin/python3
python=python3.12 3.12.1 venv /usr/bin/python3.12
engine=docker
nvidia_smi=yes
cuda=12.4
gpu=NVIDIA GeForce RTX 3090, 24576, 550.54, 2100, 9751
gpu=NVIDIA GeForce RTX 3090, 24576, 550.54, 2100, 9751
state={"made":"/scratch","keys":{"sync":"x"},"files":{}}
end=yes
"""


def found(**changes: Any) -> facts.Facts:
    return replace(facts.parse(SAID, 1700000000.0, 1700000001.0).facts, **changes)


def host(**changes: Any) -> Host:
    return Host.model_validate({"name": "gpu1", "address": "gpu1", "user": "me", **changes})


def test_what_the_script_says_is_read() -> None:
    answer = facts.parse(SAID, 1700000000.0, 1700000001.0)
    assert (answer.made, answer.taken, answer.state) == (
        "/scratch/me",
        False,
        {"made": "/scratch", "keys": {"sync": "x"}, "files": {}},
    )
    told = answer.facts
    assert (told.cpu, told.cpus, told.memory_gib, told.free_gib, told.cuda) == ("AMD EPYC = fast", 64, 251.0, 100.0, "12.4")
    assert told.python == Python("python3.12", "3.12.1", True, "/usr/bin/python3.12")
    assert [gpu.memory_mib for gpu in told.gpus] == [24576.0, 24576.0]
    assert told.clock_offset_s == 10.0 and told.clock_error_s == 0.5
    assert facts.summary(told) == "2 x NVIDIA GeForce RTX 3090, 64 CPUs, 251 GiB memory, 100 GiB disk free, Python 3.12.1"
    assert State.of(answer) == State("/scratch", {}, {"sync": "x"})


def test_the_script_runs_here_and_its_answer_is_read(tmp_path: Path) -> None:
    work = tmp_path / "a" / "b"

    def run(argv: list[str]) -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    look = facts.ask(run, str(work), make=False)
    assert not (tmp_path / "a").exists() and look.made == "" and look.facts.cpus > 0 and look.facts.free_gib > 0
    assert abs(look.facts.clock_offset_s) <= look.facts.clock_error_s + 0.01
    assert look.facts.python is not None
    made = facts.ask(run, str(work), make=True)
    assert made.made == str(tmp_path / "a") and work.is_dir() and not made.taken and made.state is None
    (work / "checkout").mkdir()
    (work / ".fivefold.json").write_text(State("x", {"é\n": "1"}, {"sync": "k"}).text())
    again = facts.ask(run, str(work), make=True)
    assert again.taken and State.of(again) == State("x", {"é\n": "1"}, {"sync": "k"})


@pytest.mark.parametrize("text", ["", "state={\n", "cpus=many\ngpu=a\npython=x\n", "=\n\n==\n"])
def test_nonsense_is_no_facts_but_no_crash_either(text: str) -> None:
    answer = facts.parse(text, 0, 0)
    assert answer.state is None and answer.facts.cpus == 0 and answer.facts.python is None and answer.facts.gpus == ()


@pytest.mark.parametrize(
    ("model", "name", "same"),
    [
        ("rtx3090", "NVIDIA GeForce RTX 3090", True),
        ("a100-80", "NVIDIA A100-SXM4-80GB", True),
        ("a100-40", "NVIDIA A100-SXM4-80GB", False),
        ("v100-16", "Tesla V100-SXM2-16GB", True),
        ("t4", "Tesla T4", True),
        ("a6000", "NVIDIA RTX A6000", True),
        ("h200", "NVIDIA H200", True),
        ("h100", "NVIDIA H200", False),
    ],
)
def test_gpus_are_known_by_both_their_names(model: str, name: str, same: bool) -> None:
    assert facts.is_model(model, name) is same


@pytest.mark.parametrize(
    ("told", "here", "what"),
    [
        ({}, {}, None),
        ({"gpus": [{"model": "rtx3090", "count": 2, "memory_gib": 24}]}, {}, None),
        ({"gpus": [{"model": "rtx3090", "count": 3}]}, {}, "2 of 3 x rtx3090 (NVIDIA GeForce RTX 3090)"),
        ({"gpus": [{"model": "rtx3090", "memory_gib": 48}]}, {}, "rtx3090 has 24 GiB, not 48"),
        ({"gpus": [{"model": "t4"}]}, {"gpus": ()}, "0 of 1 x t4 (no GPU that nvidia-smi lists)"),
        ({}, {"free_gib": 1.0}, "1.0 GiB free at work_dir"),
        ({}, {"pythons": ()}, "no Python at all"),
        ({}, {"pythons": (Python("python3", "3.11.2", False, "/p"),)}, "3.11.2 without venv"),
        ({"runner": {"kind": "container", "image": "i"}}, {"engines": ()}, "no container engine"),
        ({"runner": {"kind": "container", "image": "i"}}, {"pythons": ()}, None),
    ],
)
def test_what_is_missing_is_said_with_the_mend(told: dict[str, Any], here: dict[str, Any], what: str | None) -> None:
    problems = list(facts.problems(host(**told), found(**here)))
    assert [mend for _, mend in problems if not mend] == []
    assert (what is None) == (problems == []) and all(what in problem for problem, _ in problems if what)


def test_a_host_that_has_its_environment_needs_less_space() -> None:
    assert not list(facts.problems(host(), found(free_gib=0.5), needs_space=False))


def test_a_clock_that_is_off_is_noted() -> None:
    assert list(facts.notes(found())) == ["its clock is +10.0 s off"]
    assert not list(facts.notes(found(clock_offset_s=1.4)))  # within what asking took


def test_facts_are_kept_once_until_they_change(tmp_path: Path) -> None:
    assert facts.keep(tmp_path, host(), found()) and not facts.keep(tmp_path, host(), found(free_gib=3.0, clock_offset_s=1.0))
    told = facts.read(tmp_path, "gpu1")
    assert told is not None and told["host"] == "gpu1" and told["free_gib"] == 100.0
    assert facts.keep(tmp_path, host(), found(cuda="13.0")) and facts.read(tmp_path, "gpu2") is None


def test_git_decides_which_files_are_the_projects(tmp_path: Path) -> None:
    for name, text in {"a.py": "1", "b/é x.txt": "2", "new.py": "3", ".gitignore": "ignored\n", "ignored": "4"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    names, notes = code.tracked(tmp_path)
    assert "new.py" in names and "no git checkout" in notes[0]
    for words in (["init", "-q"], ["add", "a.py", "b", ".gitignore"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    names, notes = code.tracked(tmp_path)
    assert (
        names == [".gitignore", "a.py", "b/é x.txt"] and "1 files that git does not know are not sent, such as new.py" in notes
    )
    cargo = code.load(tmp_path, None, datasets=False)
    (tmp_path / "a.py").write_text("changed")
    assert cargo.digest != code.load(tmp_path, None, datasets=False).digest and set(cargo.files) == {
        f"checkout/{n}" for n in names
    }
    inside = tmp_path / "b"
    assert "no git checkout" in code.tracked(inside)[1][0]  # only a folder in somebody's checkout


def test_datasets_that_figures_need_come_along_where_they_are_looked_for(root: Path, mirror: Path) -> None:
    files = code.load(root, mirror).files
    data = [name for name in files if name.startswith("shared/data/")]
    assert data and all(files[name].path.is_file() for name in data)
    assert "checkout/requirements.lock" in files and not any(
        "/.venv/" in name or name.startswith("checkout/results/") for name in files
    )


def test_what_differs_is_what_is_lacking_or_other() -> None:
    assert code.differing({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == ["b", "c"]


def test_numbers_may_differ_in_the_last_digits_alone() -> None:
    assert _differences('{"a":1.0,"b":"x"}', '{"a":1.0000000000001,"b":"x"}') == ""
    assert _differences('{"a":1.0}', '{"a":1.001}') == "a is 1.0 there and 1.001 here"
    assert _differences('{"a":1.0}', '{"a":1.0,"c":2}') == "c is None there and 2 here"
    assert _differences("oops", "{}") == "it printed no metrics"


def test_the_smoke_trial_gives_the_same_twice() -> None:
    assert smoke.metrics() == smoke.metrics() and '"requests":' in smoke.metrics()


class FakeEngine:
    """A host with a container engine: which images it has, and which it could pull."""

    def __init__(self, has: set[str], pulls: set[str], answers: bool = True) -> None:
        self.has, self.pulls, self.answers = has, pulls, answers
        self.asked: list[list[str]] = []

    def run(self, argv: list[str], *, timeout_s: Any = None, on_line: Any = None, check: bool = True) -> Ran:
        self.asked.append(argv[1:2])
        name = argv[-1]
        if argv[1] == "version":
            return Ran(0 if self.answers else 1, "1", "noise\nno daemon")
        if argv[1] == "pull" and name in self.pulls:
            self.has.add(name)
        missing = name not in self.has
        return Ran(int(missing), "" if missing else f"sha256:of-{name}\n", "no such image")


def contained(image: str) -> Host:
    return host(runner={"kind": "container", "image": image})


def test_an_image_that_is_there_is_not_pulled() -> None:
    engine = FakeEngine({"i:1"}, set())
    assert image.ensure(engine, contained("i:1"), "docker", print) == "sha256:of-i:1" and ["pull"] not in engine.asked


def test_an_image_that_is_not_there_is_pulled() -> None:
    engine = FakeEngine(set(), {"i:1"})
    assert image.ensure(engine, contained("i:1"), "docker", print) == "sha256:of-i:1"


@pytest.mark.parametrize(
    ("answers", "said"), [(False, "docker does not answer .no daemon."), (True, "image i:1 cannot be had .no such")]
)
def test_an_image_that_cannot_be_had_is_said(answers: bool, said: str) -> None:
    with pytest.raises(RemoteError, match=f"gpu1: {said}"):
        image.ensure(FakeEngine(set(), set(), answers), contained("i:1"), "docker", print)


def test_placeholders_are_explained_and_not_called(root: Path) -> None:
    figures = status.wanted({"spotserve_table1": "t4x16", "llmstation_fig8a": "rtx3090x2"})
    inventory = load_inventory(root / "hosts" / "examples" / "spotserve-t4x48.yaml")
    gate, nodes, testbed = status.findings(inventory, figures)
    assert gate.what == "host gate" and "jump host" in gate.found and "placeholder" in gate.found
    assert nodes.what == "host node01 ... node12 (12)" and "4 x t4 (16 GiB)" in nodes.found and "copy the file" in nodes.mend
    assert testbed.found == "48 x t4: the testbed of spotserve_table1"


@pytest.mark.parametrize(
    ("name", "gpus", "testbed", "figure"),
    [
        ("sirius-v100x4", "4 x v100-16", "v100-16x4", "sirius_fig"),
        ("llmstation-rtx3090x2", "2 x rtx3090", "rtx3090x2", "llmstation_fig8a"),
        ("spotserve-t4x48", "48 x t4", "t4x48", "spotserve_fig"),
        ("maveriq-a6000x8", "8 x a6000", "a6000x8", "maveriq_fig"),
        ("dlora-a100x32", "32 x a100-80", "a100-80x32", "dlora_fig"),
    ],
)
def test_doctor_explains_the_testbed_of_every_paper(root: Path, name: str, gpus: str, testbed: str, figure: str) -> None:
    from harness import checks

    place = Path("hosts", "examples", f"{name}.yaml")
    *hosts, whole = status.findings(load_inventory(root / place), status.wanted({figure: testbed, "other_fig": "h200x1"}))
    assert all(found.mend and "placeholder" in found.found for found in hosts)
    assert whole.found.startswith(gpus) and whole.found.endswith(f": the testbed of {figure}")
    told = list(checks.check_inventory(root / place, root))
    assert not [found for found in told if found.level is checks.Level.MISSING], told


def test_gpus_in_words() -> None:
    assert status.gpus_text([Gpu(model="t4", count=4, memory_gib=16), Gpu(model="h200")]) == "4 x t4 (16 GiB), 1 x h200"
