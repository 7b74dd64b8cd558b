"""The process that runs trials for another one: what it keeps, and what becomes of refusals, deaths and hangs."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from harness.trials import TrialStore, hash_of
from harness.worker import Fault, WorkedStore, Worker
from systems.registry import InputError, Trial

TRIAL = Trial("llmstation", "chunked_cost", {"model": "llama-3.1-8b", "tuning_tokens": 512, "chunk_tokens": 128}, "rtx3090x1")


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path, "{}", [])


def test_it_runs_trials_survives_what_is_refused_and_is_replaced_when_it_dies(worker: Worker, tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "trials")
    try:
        worker.prepare([TRIAL])
        worker.run(TRIAL, "a test", 60)
        name = hash_of(store.spec(TRIAL))
        assert store.metrics(name) is not None
        first = worker._process
        assert first is not None
        with pytest.raises(InputError, match="chunk_tokens: '0': give at least 1 token"):
            worker.run(replace(TRIAL, parameters={**TRIAL.parameters, "chunk_tokens": 0}), "a test", 60)
        assert worker._process is first
        with pytest.raises(Fault, match="AssertionError"):  # not what a user could mend
            worker.run(replace(TRIAL, datasets={"nobody checked": tmp_path}), "a test", 60)
        assert first.poll() is not None
        worker.run(TRIAL, "a test", 60)  # a new one
        second = worker._process
        assert second is not None and second.pid != first.pid
        os.kill(second.pid, signal.SIGKILL)
        with pytest.raises(Fault, match="exit code -9"):
            worker.run(TRIAL, "a test", 60)
        with pytest.raises(Fault, match="no answer within 0 s"):
            worker.run(TRIAL, "a test", 0.001)
        assert worker._process is None
    finally:
        worker.close()


def test_a_process_ends_by_itself_when_nothing_more_can_come(worker: Worker) -> None:
    worker.prepare([])
    process = worker._process
    assert process is not None
    worker.close(patience_s=30)
    assert process.returncode == 0


def test_only_measured_trials_go_to_the_worker(tmp_path: Path) -> None:
    store = WorkedStore(tmp_path / "trials")
    assert store.run(TRIAL, "a test").fresh
    with pytest.raises(Fault, match="is not in the store"):
        store.run(replace(TRIAL, backend="measured"), "a test")
