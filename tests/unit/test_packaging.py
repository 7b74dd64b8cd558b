"""What is shipped: lock files, the Makefile's decisions about the environment, licence, and no trace of one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness import environment
from harness.checks import Pin, pins
from harness.environment import State, Step, step

PYTHONS = ("3.11.7", "3.12.1", "3.13.0")
MACHINES: tuple[dict[str, str], ...] = (
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
)
LOCKS = ("requirements.lock", "requirements-test.lock")


def project(root: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return found


def wanted(root: Path, lock: str) -> list[Requirement]:
    said = project(root)
    tests = said["optional-dependencies"]["test"] if lock == "requirements-test.lock" else []
    return [Requirement(text) for text in [*said["dependencies"], *tests]]


def on(found: Iterable[Pin], machine: Mapping[str, str], python: str) -> list[Pin]:
    about = {**machine, "python_full_version": python, "python_version": python.rpartition(".")[0]}
    about["platform_python_implementation"] = "CPython"
    return [pin for pin in found if not pin.marker or Marker(pin.marker).evaluate(dict(about))]


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_file_holds_one_right_version_of_everything_on_every_machine(root: Path, lock: str, python: str) -> None:
    found = pins((root / lock).read_text())
    for machine in MACHINES:
        here = on(found, machine, python)
        versions = {canonicalize_name(pin.name): pin.version for pin in here}
        assert len(versions) == len(here), "two versions of one package"
        for requirement in wanted(root, lock):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None and requirement.specifier.contains(version), (requirement, version)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_is_complete_for_what_is_installed_here(root: Path, lock: str) -> None:
    """pip runs with --no-deps: whatever a locked package needs must be locked too."""
    import importlib.metadata

    here = [pin for pin in pins((root / lock).read_text()) if pin.applies()]
    names = {canonicalize_name(pin.name) for pin in here}
    for pin in here:
        try:
            needs = importlib.metadata.requires(pin.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a test tool that is not installed here says nothing about its needs
        for requirement in map(Requirement, needs):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in names, f"{pin.name} needs {requirement}"


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_has_hashes_and_neither_torch_nor_addresses(root: Path, lock: str) -> None:
    text = (root / lock).read_text()
    found = pins(text)
    assert not {pin.name for pin in found} & {"torch", "triton"} and not any(pin.name.startswith("nvidia") for pin in found)
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(found)
    assert all("--hash=sha256:" in block for block in blocks)


def test_the_test_lock_is_the_runtime_lock_and_more(root: Path) -> None:
    runtime, test = (set(pins((root / lock).read_text())) for lock in LOCKS)
    assert runtime < test


def test_the_makefile_and_the_extra_agree_on_torch(root: Path) -> None:
    pinned = dict(re.findall(r"\b([a-z]+)==([\d.]+)", (root / "Makefile").read_text()))
    extra = list(map(Requirement, project(root)["optional-dependencies"]["torch"]))
    assert "torch" in {wanted.name for wanted in extra}
    for wanted in extra:
        assert wanted.specifier.contains(pinned[wanted.name]), wanted


TRACES = re.compile(r"(?<![\w.~}-])/(?:work|root)/(?!\.\.\.)|/home/(?!\.\.\.|fivefold/)[a-z]|pyenv|/opt/wheels|/opt/pypi")


def test_no_file_names_a_machine(root: Path) -> None:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are ours")
    names = [name.decode() for name in listed.stdout.split(b"\0") if name]
    assert len(names) > 50
    here = Path(__file__).resolve()
    for path in (root / name for name in names):
        if not path.is_file() or path.resolve() == here or path.is_relative_to(root / "reference"):
            continue  # recorded measurements keep their command as it was: nobody edits them
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            assert not (found := TRACES.search(data.decode("utf-8", "replace"))), (path, found)


def test_licence_citation_and_catalogue_are_what_their_readers_expect(root: Path) -> None:
    assert "Apache License" in (root / "LICENSE").read_text()[:200] and project(root)["license"] == "Apache-2.0"
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and len(citation["references"]) == 5
    assert citation["version"] == project(root)["version"] and citation["license"] == "Apache-2.0"
    assert set(yaml.safe_load((root / ".snakemake-workflow-catalog.yml").read_text())["usage"]) >= {"mandatory-flags", "report"}


PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "hosts/README.md"),
    *("docs/adding-a-figure.md", "docs/adding-a-system.md"),
)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_our_pages_lead_somewhere(root: Path, page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", (root / page).read_text()):
        assert ((root / page).parent / target).exists(), f"{page}: {target}"


def test_systems_that_are_not_built_say_so(root: Path) -> None:
    import importlib

    from systems.registry import SYSTEMS

    for name in SYSTEMS:
        experiments = importlib.import_module(f"systems.{name}.experiments").EXPERIMENTS
        said = "Not built yet" in (root / "systems" / name / "README.md").read_text()
        assert said is (not experiments), name


# the environment: harness/environment.py

KEYS = {"runtime": "r1", "test": "t1"}
FRESH = State(exists=True, python=(3, 11), building=False, ready={})


@pytest.mark.parametrize(
    ("state", "kind", "python", "expected"),
    [
        (State(False, None, False, {}), "runtime", None, Step.BUILD),
        (State(True, (3, 11), True, {}), "runtime", None, Step.BUILD),
        (State(True, (3, 11), True, KEYS), "test", None, Step.BUILD),
        (State(True, None, False, KEYS), "runtime", None, Step.BUILD),
        (State(True, (3, 11), False, KEYS), "test", None, Step.NOTHING),
        (State(True, (3, 11), False, KEYS), "test", (3, 11), Step.NOTHING),
        (State(True, (3, 11), False, KEYS), "test", (3, 12), Step.BUILD),
        (State(True, (3, 11), False, {"runtime": "r1"}), "test", None, Step.ADD),
        (State(True, (3, 11), False, {"runtime": "r0"}), "test", None, Step.BUILD),
        (State(True, (3, 11), False, {"runtime": "r0"}), "runtime", None, Step.BUILD),
        (State(True, (3, 11), False, {"runtime": "r1", "test": "t0"}), "runtime", None, Step.NOTHING),
        (FRESH, "runtime", None, Step.ADD),
    ],
)
def test_what_has_to_be_done_to_an_environment(state: State, kind: str, python: tuple[int, int] | None, expected: Step) -> None:
    assert step(state, kind, KEYS, python) is expected


markers = st.dictionaries(st.sampled_from(["runtime", "test"]), st.sampled_from(["r1", "t1", "old"]))
states = st.builds(State, st.booleans(), st.none() | st.just((3, 11)), st.booleans(), markers)


@given(states, st.sampled_from(["runtime", "test"]))
def test_nothing_is_done_only_for_a_whole_environment_with_the_right_marker(state: State, kind: str) -> None:
    done = step(state, kind, KEYS) is Step.NOTHING
    assert done == (state.exists and state.python is not None and not state.building and state.ready.get(kind) == KEYS[kind])


def test_the_key_depends_on_the_lock_and_on_the_folder(tmp_path: Path) -> None:
    keys = []
    for folder, text in (("a", "x"), ("a", "y"), ("b", "y")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "requirements.lock").write_text(text)
        keys.append(environment.key(tmp_path / folder, "runtime"))
    assert len(set(keys)) == 3


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A folder, with a space in its name, where an environment takes no package: empty lock files."""
    clone = tmp_path / "a clone"
    (clone / "harness").mkdir(parents=True)
    shutil.copy(root / "harness" / "environment.py", clone / "harness")
    shutil.copy(root / "Makefile", clone)
    for lock in LOCKS:
        (clone / lock).write_text("")
    return clone


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be run, instead of running it; making a bare environment is quick and real."""
    ran: list[list[str]] = []

    def do(command: list[str], failure: str) -> None:
        ran.append([str(word) for word in command])
        if "venv" in command:
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", command[-1]], check=True)

    monkeypatch.setattr(environment, "_do", do)
    return ran


def made(ran: list[list[str]]) -> list[str]:
    return ["venv" if "venv" in command else "pip" if "pip" in command else "warm up" for command in ran]


def test_an_environment_is_made_once_and_added_to(clone: Path, installs: list[list[str]]) -> None:
    assert environment.ensure(clone, "runtime") is Step.BUILD
    assert made(installs) == ["venv", "pip", "warm up"]
    assert installs[1][-1] == str(clone / "requirements.lock") and "--require-hashes" in installs[1]
    assert environment.ensure(clone, "runtime") is Step.NOTHING
    assert environment.ensure(clone, "test") is Step.ADD
    assert environment.ensure(clone, "test") is environment.ensure(clone, "runtime") is Step.NOTHING
    assert made(installs) == ["venv", "pip", "warm up", "pip", "warm up"]
    python = clone / ".venv" / "bin" / "python"
    found = subprocess.run([python, "-I", "-c", "import sys; print(sys.path)"], capture_output=True, text=True, check=True)
    assert repr(str(clone)) in found.stdout


def test_one_that_was_cut_off_or_is_outdated_is_made_anew(
    clone: Path, installs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = environment._do

    def cut_off(command: list[str], failure: str) -> None:
        if "pip" in command:
            (clone / ".venv" / "half").write_text("")
            raise environment.BuildError(failure)
        good(command, failure)

    monkeypatch.setattr(environment, "_do", cut_off)
    with pytest.raises(environment.BuildError, match=r"requirements.lock: pip failed.*run the same command again"):
        environment.ensure(clone, "runtime")
    monkeypatch.setattr(environment, "_do", good)
    assert environment.ensure(clone, "runtime") is Step.BUILD
    assert not (clone / ".venv" / "half").exists()
    (clone / "requirements.lock").write_text("# another\n")
    assert environment.ensure(clone, "runtime") is Step.BUILD
    moved = clone.rename(clone.parent / "moved")
    assert environment.ensure(moved, "runtime") is Step.BUILD


def test_an_environment_that_is_not_ours_is_never_deleted(clone: Path, installs: list[list[str]]) -> None:
    theirs = clone / ".venv"
    theirs.mkdir()
    (theirs / "precious").write_text("")
    with pytest.raises(environment.BuildError, match="not made by make and not usable: remove it"):
        environment.ensure(clone, "runtime")
    assert (theirs / "precious").exists() and installs == []


def test_one_that_a_user_made_is_added_to(clone: Path, installs: list[list[str]]) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clone / ".venv")], check=True)
    (clone / ".venv" / "precious").write_text("")
    assert environment.ensure(clone, "runtime") is Step.ADD
    assert (clone / ".venv" / "precious").exists()


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(clone), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_make_refuses_a_python_that_is_too_old_in_one_line(clone: Path) -> None:
    old = clone.parent / "old python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), "no-such-python"):
        done = make(clone, f"PYTHON={python}", "environment")
        assert done.returncode != 0 and not (clone / ".venv").exists()
        lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert lines == [
            f"Makefile: PYTHON: {python}: needs Python 3.11 or newer: name one, for example make PYTHON=python3.12 ..."
        ]


def test_make_says_in_one_line_what_pip_could_not_do(clone: Path) -> None:
    (clone / "requirements.lock").write_text("this is no lock file\n")
    done = make(clone, f"PYTHON={sys.executable}", "environment")
    assert done.returncode != 0 and "requirements.lock: pip failed" in done.stderr
    assert (clone / ".venv" / environment.BUILDING).exists()
