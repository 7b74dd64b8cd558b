"""The simulated node: the recursion against the event loop, served against issued, and traces."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.maveriq.configuration import Configuration
from systems.maveriq.controller.queues import GlobalQueue
from systems.maveriq.experiments_serving import serving
from systems.maveriq.serving.outcome import metrics
from systems.maveriq.serving.queueing import HANDOVER_S, POLL_S, Events, Host, Node, Recursion, engine
from systems.maveriq.serving.runs import Deployed, Run
from systems.maveriq.serving.services import Services
from systems.maveriq.serving.workload import (
    Entry,
    Replicated,
    Trace,
    minute_counts,
    model_list,
    poisson,
    replayed,
    replayed_on,
    scaled,
    slo_s,
)  # fmt: skip

HOSTS = {0: Host((0, 1), 0.4), 1: Host((0,), 0.1), 2: Host((1, 2), 0.25)}


def through(node, requests, hosts=HOSTS):
    for deployment, host in hosts.items():
        node.host(deployment, host)
    for arrival_s, deployment in requests:
        node.offer(arrival_s, deployment)
    return node.served()


@st.composite
def workloads(draw):
    gaps = draw(st.lists(st.floats(0.0, 0.6), max_size=60))
    return [(arrival, draw(st.integers(0, 2))) for arrival in np.cumsum([0.0, *gaps]).tolist()]


@settings(deadline=None)
@given(workloads())
def test_the_recursion_is_the_event_loop_under_one_queue(requests):
    closed, stepped = through(Recursion(3), requests), through(Events(3, GlobalQueue()), requests)
    np.testing.assert_allclose(stepped.start_s, closed.start_s, atol=1e-9)
    np.testing.assert_allclose(stepped.finish_s, closed.finish_s, atol=1e-9)


@settings(deadline=None)
@given(workloads(), st.sampled_from(["global", "per_model"]))
def test_no_gpu_runs_two_requests_and_nobody_starts_early(requests, discipline):
    found = through(engine(discipline, 3), requests)
    assert np.isfinite(found.finish_s).all()
    assert (found.start_s >= [arrival for arrival, _ in requests]).all()
    for gpu in range(3):
        mine = sorted(
            (s, f) for s, f, (_, d) in zip(found.start_s, found.finish_s, requests, strict=True) if gpu in HOSTS[d].gpus
        )
        assert all(later[0] >= earlier[1] + HANDOVER_S - 1e-9 for earlier, later in pairwise(mine))
    starts = np.sort(found.start_s)
    assert (np.diff(starts) >= POLL_S - 1e-9).all()


@settings(deadline=None)
@given(workloads())
def test_a_queue_per_model_keeps_the_order_within_a_model(requests):
    found = through(engine("per_model", 3), requests)
    for deployment in HOSTS:
        mine = [start for start, (_, d) in zip(found.start_s, requests, strict=True) if d == deployment]
        assert mine == sorted(mine)


def test_idle_gpus_work_under_a_queue_per_model():
    hosts = {0: Host((0,), 1.0), 1: Host((1,), 1.0)}
    requests = [(0.0, 0), (0.1, 0), (0.2, 1)]
    assert through(engine("global", 2), requests, hosts).start_s[2] > 1.0  # behind the second request for model 0
    assert through(engine("per_model", 2), requests, hosts).start_s[2] == pytest.approx(0.2, abs=0.02)


def test_a_request_for_nobody_is_never_served():
    for discipline in ("global", "per_model"):
        found = through(engine(discipline, 3), [(0.0, 1), (0.1, -1), (0.2, 1)])
        assert np.isnan(found.finish_s).tolist() == [False, True, False]


def test_busy_is_the_share_of_samples():
    node = Node(1)
    node.run((0,), 10.0, 40.0, 40.0)
    assert node.busy(0, 130.0) == pytest.approx(30 / 120, abs=0.02)
    assert node.busy(0, 300.0) == 0


def made_run(finish, deployment, arrival=(0.0, 1.0, 2.0, 3.0)):
    entries = (Entry("llama-2-7b", 0), Entry("llama-2-70b", 0))
    trace = Trace(entries, np.zeros(2), np.array(arrival), np.array([0, 0, 1, 1]))
    deployed = (Deployed(0, "llama-2-7b", Configuration(1, 1), (0,), (32,), 1.0, 4.0, 0.0),)
    deployed += (Deployed(1, "llama-2-70b", Configuration(8, 1), tuple(range(8)), (80,), 2.0, 50.0, 0.0),)
    finish = np.array(finish)
    return Run(trace, deployed, (), np.array(deployment), finish - 1, finish)


def test_served_and_issued_are_told_apart():
    found = metrics(made_run([1.0, 2.0, math.nan, 30.0], [0, 0, 1, 1]), slo_factor=5.0)
    assert (found["issued"], found["served"], found["unserved"], found["served_percent"]) == (4, 3, 1, 75)
    assert found["attainment_served_percent"] == pytest.approx(200 / 3)  # the 70B took 27 s of 25.6
    assert found["attainment_issued_percent"] == 50
    assert found["e2e_p50_s"] == 1.0 and found["memory_p50_gib"] == 4.0
    assert found["gpu_h_sum"] == pytest.approx((1 + 1 + 2 * 8) / 3600)
    assert found["rpm"] == pytest.approx(60 * 3 / 30)


def test_fewer_served_requests_are_charged_the_dearest_one():
    run = made_run([1.0, 2.0, math.nan, 30.0], [0, 0, 1, 1])
    assert metrics(run, pad_to=5)["operation_cost_usd"] == pytest.approx(0.8 * (18 + 2 * 16) / 3600)
    assert metrics(run, pad_to=2)["operation_cost_usd"] == pytest.approx(0.8 * 18 / 3600)


def test_nothing_served_is_not_a_crash():
    found = metrics(made_run([math.nan] * 4, [-1] * 4), slo_factor=5.0, pad_to=3)
    assert found["served"] == 0 and found["rpm"] == 0 and found["attainment_issued_percent"] == 0
    assert math.isnan(found["e2e_p50_s"]) and math.isnan(found["operation_cost_usd"])


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=25), st.sampled_from(["large", "regular", "twentyone"]))
def test_a_trace_only_asks_for_what_has_been_deployed(counts, name):
    trace = replayed(counts, model_list(name))
    assert len(trace.arrival_s) == sum(counts)
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert (trace.deploy_s[trace.target] < trace.arrival_s).all()


def test_replicas_share_the_traffic_of_their_entry_and_dropped_ones_keep_theirs():
    entries = (Entry("a", 0), Entry("b", 0))
    found = replayed_on([2000], Replicated(entries, ((), (0, 1))))
    dropped = found.replica[found.trace.target == 0]
    shared = found.replica[found.trace.target == 1]
    assert (dropped == -1).all() and len(dropped) == pytest.approx(1000, abs=100)
    assert set(shared.tolist()) == {0, 1} and (shared == 0).mean() == pytest.approx(0.5, abs=0.06)


def test_poisson_requests_go_to_models_that_are_ready():
    trace = poisson(0.2, model_list("regular"), 180.0, seed=3)
    assert (trace.deploy_s[trace.target] + 90 <= trace.arrival_s + 1e-9).all()
    assert set(trace.target.tolist()) == set(range(8))


def test_slo_is_the_unloaded_latency_times_k():
    assert slo_s("llama-2-70b", 5) == pytest.approx(25.59, abs=0.01)
    assert (slo_s("falcon-40b", 5), slo_s("llama-2-7b", 5)) == (pytest.approx(15.54, abs=0.01), pytest.approx(2.85, abs=0.01))
    with pytest.raises(InputError, match="no unloaded latency"):
        slo_s("m", 5)


def test_service_times_come_from_the_best_source_there_is():
    class Says:
        def estimate(self, _model, _configuration, **_asked):
            return type("E", (), {"latency_s": 9.0, "memory_gib": 7.0})()

    found = Services(Says())
    assert found.service_s("llama-2-70b", Configuration(8, 1, "int4", True)) == 0.402  # the authors' mean
    assert found.service_s("llama-2-70b", Configuration(8, 1, "int4", True), 50) == 9.0
    assert found.service_s("m", Configuration(1, 1)) == 9.0 and found.memory_gib("m", Configuration(1, 1)) == 7.0


def test_an_azure_trace_with_something_else_in_it(tmp_path):
    for text in ("A,B\n1,2\n", "TIMESTAMP\n", "TIMESTAMP\nyesterday\n", ""):
        file = tmp_path / f"{len(text)}.csv"
        file.write_text(text)
        with pytest.raises(InputError) as error:
            minute_counts(file)
        assert "\n" not in str(error.value)
    good = tmp_path / "good.csv"
    good.write_text("TIMESTAMP,x\n2023-11-16 18:17:03.97,1\n2023-11-16 18:17:29.9,1\n2023-11-16 18:18:31,1\n")
    assert minute_counts(good) == (2, 0, 1)
    assert scaled((3, 10), 0.35) == [1, 3]


@pytest.mark.parametrize(
    ("parameters", "key"),
    [({"system": "maveriq"}, "datasets"), ({"system": "maveriq", "mode": "guess"}, "mode")],
)
def test_experiments_refuse_in_one_line(tmp_path, parameters, key):
    datasets = {"maveriq_a6000": tmp_path} if key != "datasets" else {}
    with pytest.raises(InputError, match=f"maveriq: {key}: "):
        serving(Trial("maveriq", "serving", {"rate_scale": 0.1, **parameters}, "a6000x8", datasets=datasets))
