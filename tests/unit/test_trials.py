"""Trials by content: the name, what is stored, who may write at once, and what is left behind."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import trials
from harness.leftovers import GRACE_S, sweep
from harness.trials import TrialStore, canonical, hash_of
from systems.registry import InputError, Outcome, Scalar, Trial

TRIAL = Trial("fake", "knee", {"rate_rps": 1.5, "model": "m"}, "nothingx1", seed=3)
Fake = Callable[[Callable[[Trial], Outcome]], list[Trial]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Make a function the experiment of every trial; gives the list of the trials that are run."""
    monkeypatch.setattr(trials, "system_version", lambda _system: "v1")

    def use(function: Callable[[Trial], Outcome]) -> list[Trial]:
        ran: list[Trial] = []

        def experiment(_system: str, _name: str) -> Callable[[Trial], Outcome]:
            return lambda trial: (ran.append(trial), function(trial))[1]

        monkeypatch.setattr(trials, "experiment", experiment)
        return ran

    return use


METRICS: Mapping[str, Scalar] = {
    "work": 1.25,
    "count": 3,
    "good": True,
    "name": "x",
    "none": None,
    "inf": math.inf,
    "low": -math.inf,
}


def test_a_trial_runs_once(fake: Fake, tmp_path: Path) -> None:
    ran = fake(lambda _: Outcome(METRICS, {"arrival_s": [0.0, 1.5], "status": ["finished", "failed"]}, ("a note",)))
    first = TrialStore(tmp_path).run(TRIAL, "test")
    again = TrialStore(tmp_path).run(TRIAL, "test")
    assert (first.fresh, again.fresh, len(ran)) == (True, False, 1)
    assert first.metrics == again.metrics == METRICS
    assert {key: type(value) for key, value in again.metrics.items()} == {key: type(value) for key, value in METRICS.items()}
    folder = tmp_path / first.hash
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.json",
        "provenance.json",
        "requests.parquet",
        "spec.json",
    ]
    assert pyarrow.parquet.read_table(folder / "requests.parquet").to_pydict()["status"] == ["finished", "failed"]
    origin = TrialStore(tmp_path).provenance(first.hash)
    assert origin and origin["notes"] == ["a note"] and origin["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == [first.hash]


def test_nan_is_kept_and_the_file_is_strict_json(fake: Fake, tmp_path: Path) -> None:
    fake(lambda _: Outcome({"x": math.nan}))
    first = TrialStore(tmp_path).run(TRIAL, "test")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / first.hash / "metrics.json").read_text(), parse_constant=refuse)
    again = TrialStore(tmp_path).metrics(first.hash)
    assert again is not None and isinstance(again["x"], float) and math.isnan(again["x"])


def test_numbers_of_numpy_are_kept_as_plain_ones(fake: Fake, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    fake(lambda _: Outcome({"x": numpy.float64(1.5), "n": numpy.int64(2)}))
    assert TrialStore(tmp_path).run(TRIAL, "test").metrics == {"x": 1.5, "n": 2}


@pytest.mark.parametrize(
    "other",
    [
        replace(TRIAL, seed=4),
        replace(TRIAL, parameters={"rate_rps": 1.6, "model": "m"}),
        replace(TRIAL, hardware="nothingx2"),
        replace(TRIAL, experiment="other"),
        replace(TRIAL, system="other"),
        replace(TRIAL, backend="measured"),
        replace(TRIAL, datasets={"d": None}),
        replace(TRIAL, datasets={"d": Path("file")}),
    ],
)
def test_everything_that_determines_a_trial_is_in_its_name(fake: Fake, tmp_path: Path, other: Trial) -> None:
    fake(lambda _: Outcome({}))
    store = TrialStore(tmp_path, {"d": "abc"})
    assert hash_of(store.spec(other)) != hash_of(store.spec(TRIAL))


def test_the_code_and_the_bytes_of_a_dataset_are_in_the_name_but_not_where_it_lies(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(lambda _: Outcome({}))
    here, there = replace(TRIAL, datasets={"d": Path("a")}), replace(TRIAL, datasets={"d": Path("b")})
    store = TrialStore(tmp_path, {"d": "abc"})
    name = hash_of(store.spec(here))
    assert hash_of(store.spec(there)) == name
    assert hash_of(TrialStore(tmp_path, {"d": "abd"}).spec(here)) != name
    monkeypatch.setattr(trials, "system_version", lambda _system: "v2")
    assert hash_of(store.spec(here)) != name


def test_names_stay_what_they_are() -> None:
    """A change of the way to name trials throws away everybody's results: it must be meant."""
    assert hash_of({"b": [1, 2.5, None], "a": {"z": True, "y": "ü"}}) == "a1aaeb917a7421d4441a"


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
plain = st.dictionaries(st.text(), scalars | st.lists(scalars) | st.dictionaries(st.text(), scalars))


@given(plain, st.randoms())
def test_the_order_of_keys_does_not_matter(data: dict[str, object], chance: object) -> None:
    items = list(data.items())
    chance.shuffle(items)  # type: ignore[attr-defined]
    assert canonical(dict(items)) == canonical(data)
    assert canonical(json.loads(canonical(data))) == canonical(data)


def test_an_experiment_that_refuses_leaves_nothing_and_is_named(fake: Fake, tmp_path: Path) -> None:
    def refuse(_: Trial) -> Outcome:
        raise InputError("fake", "rate_rps", 0, "use a rate above 0")

    fake(refuse)
    with pytest.raises(InputError, match=r"^figure 1: fake: rate_rps: 0: use a rate above 0$"):
        TrialStore(tmp_path / "trials").run(TRIAL, "figure 1")
    assert not (tmp_path / "trials").exists()


def test_a_stored_trial_that_is_damaged_is_said(fake: Fake, tmp_path: Path) -> None:
    fake(lambda _: Outcome({"x": 1.0}))
    store = TrialStore(tmp_path)
    name = store.run(TRIAL, "test").hash
    (tmp_path / name / "metrics.json").write_text('{"x": ')
    with pytest.raises(InputError, match=f"delete the folder .*{name}"):
        store.run(TRIAL, "test")


def _run_at_once(folder: Path, barrier: object) -> None:
    trials.system_version = lambda _system: "v1"  # type: ignore[assignment]
    trials.experiment = lambda _system, _name: lambda _trial: (barrier.wait(), Outcome({"x": 1.0}))[1]  # type: ignore[assignment, attr-defined]
    TrialStore(folder).run(TRIAL, "test")


def test_two_processes_may_run_the_same_trial_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_run_at_once, args=(tmp_path, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_only_old_leftovers_of_dead_processes_are_swept(tmp_path: Path) -> None:
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    names = {
        f".abc.{dead.pid}.01234567.tmp": False,
        f".abc.{os.getpid()}.01234567.tmp": True,  # its process lives
        ".abc.tmp": True,  # not ours
        "abc": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text("{}")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    sweep(tmp_path, now=time.time() + GRACE_S + 1)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}
