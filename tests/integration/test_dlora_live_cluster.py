"""Live replicas in processes of their own, on a CPU: requests are dispatched and moved, none lost, doubled or changed."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext

import pytest

pytest.importorskip("torch")

from benchmarks import dlora_cluster_gpu, dlora_live_cluster, dlora_serving
from benchmarks.dlora_live_cluster import LiveCluster, Moved
from systems.common.core import Request
from systems.dlora.cluster.migration import MigrationRules
from systems.dlora.requests import Place

OFTEN = MigrationRules(interval_s=0.02, load_excess=2.0)
HOSTS = [{0, 2}, {1, 3}]


@pytest.fixture(scope="module")
def cluster():
    with LiveCluster("tiny", 2, 16, dlora_cluster_gpu.SLOTS) as made:
        yield made


def asked(count: int = 60, hot: int = 0) -> list[tuple[Request, int]]:
    """Requests at once nearly, most of them of one adapter."""
    return [(Request(i, 0.001 * i, 5 + i % 7, 6 + i % 5), hot if i % 4 else i % 4 + i % 3) for i in range(count)]


def test_moved_requests_end_once_and_with_the_tokens_that_they_have_where_they_stay(cluster):
    """Every replica holds the same weights and adapters, so a request's tokens do not depend on where it ran."""
    requests = asked()
    still = cluster.serve(requests, HOSTS, "fcfs", "none", OFTEN, 60, keep_answers=True)
    moving = cluster.serve(requests, HOSTS, "credit", "dlora", OFTEN, 60, keep_answers=True)
    for record in (still, moving):
        assert not record.errors and not record.unfinished
        assert sorted(record.ended) == [r.index for r, _ in requests]
    assert sum(moved for moved, _ in moving.moves) > 0 and moving.looks > 0
    assert {e.migrations > 0 for e in moving.ended.values()} == {True, False}
    for request, _ in requests:
        mine, other = still.ended[request.index], moving.ended[request.index]
        assert mine.answer is not None and len(mine.answer) == request.output_tokens
        assert mine.answer == other.answer, request
        assert request.arrival_s <= other.first_token_s <= other.finish_s
    hot_hosts = [e for e, hosted in enumerate(cluster.hosts) if 0 in hosted]
    assert hot_hosts == [0, 1], "the hot adapter was given to the other replica too"


@pytest.mark.parametrize("migration", ["round_robin", "proactive"])
def test_dispatch_alone_moves_nothing(cluster, migration):
    record = cluster.serve(asked(20), HOSTS, "credit", migration, OFTEN, 60)
    assert len(record.ended) == 20 and not record.moves and not record.looks and not record.errors
    by_host = {e.replica for e in record.ended.values()}
    assert by_host == {0, 1}


def test_a_cut_ends_what_is_under_way_and_the_next_run_begins_afresh(cluster):
    requests = [(Request(i, 0.0, 8, 400), i % 4) for i in range(40)]
    record = cluster.serve(requests, HOSTS, "fcfs", "none", OFTEN, 0.1)
    assert 0 < record.unfinished <= 40 and len(record.ended) == 40
    assert max(e.finish_s for e in record.ended.values()) <= record.duration_s
    after = cluster.serve(asked(8), HOSTS, "merge", "none", OFTEN, 60)
    assert len(after.ended) == 8 and not after.unfinished


def test_a_request_that_a_replica_cannot_take_is_told_and_the_cluster_lives_on(cluster):
    record = cluster.serve([(Request(0, 0.0, 5000, 4), 0)], HOSTS, "fcfs", "none", OFTEN, 60)
    assert record.errors and "max_num_batched_tokens" in record.errors[0]
    assert len(cluster.serve(asked(4), HOSTS, "fcfs", "none", OFTEN, 60).ended) == 4


def test_a_moved_request_is_prefilled_with_all_there_is_of_it():
    moved = Moved(Request(3, 1.0, 10, 20), 2, generated=4, tokens=list(range(14)), executed_s=0.5, migrations=1)
    sequence = moved.arrive()
    assert (sequence.prompt_tokens, sequence.generated, sequence.place) == (14, 4, Place.WAITING)
    again = Moved.of(sequence, list(range(14)))
    assert (again.generated, again.migrations, again.executed_s) == (4, 2, 0.5)


def test_replicas_end_with_their_router():
    """A router that is gone, however it went, has closed its pipes, and that ends them."""
    lost = LiveCluster("tiny", 1, 2, 2).__enter__()
    try:
        for pipe in lost.pipes:
            pipe.close()
        for process in lost._processes:
            process.join(30)
            assert process.exitcode == 0
    finally:
        lost.__exit__()


def test_numbers_say_where_requests_waited(cluster):
    requests = asked(30)
    record = cluster.serve(requests, HOSTS, "one_adapter", "none", OFTEN, 60)
    numbers = dlora_cluster_gpu.numbers(record, requests)
    assert sum(replica["requests"] for replica in numbers["replicas"]) == 30
    assert all(0 <= replica["queueing_percent"] <= 100 for replica in numbers["replicas"])
    assert numbers["mean_s_per_token"] > numbers["queueing_s_per_token"] >= 0
    assert dlora_live_cluster.BUDGET == dlora_serving.BUDGET


def test_the_script_writes_every_run_with_its_requests(cluster, tmp_path, monkeypatch, capsys):
    """As on GPUs, with the tiny model and a tenth of a second of arrivals."""
    monkeypatch.setattr(dlora_cluster_gpu, "WINDOW_S", 0.1)
    monkeypatch.setattr(dlora_cluster_gpu, "LiveCluster", lambda *_: nullcontext(cluster))
    out = tmp_path / "cluster.json"
    assert dlora_cluster_gpu.main(["--out", str(out), "--limit-s", "100"]) == 0
    assert "fig13" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert {name: len(runs) for name, runs in written["parts"].items()} == {"ilp": 1, "fig11a": 9, "fig2b": 2, "fig13": 1}
    for runs in written["parts"].values():
        for run in runs:
            assert not {"error", "left_out"} & run.keys(), run
    for run in written["parts"]["fig11a"]:
        asked_of = written["asked"][f"{run['rate']}, 8 adapters"]
        assert run["requests"] == len(asked_of) and all(len(told) == 4 for told in asked_of)


def test_a_run_for_which_there_is_no_time_is_left_out_and_said_to_be(cluster):
    bench = dlora_cluster_gpu.Bench(cluster, 1e6, time.perf_counter(), lambda: None, {})
    report: list[dict] = []
    bench.run(report, "credit", "dlora", 0.9, 4)
    assert "left" in report[0]["left_out"] and "requests" not in report[0]
