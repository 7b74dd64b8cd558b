"""AlpaServe's placement search with its fast simulator, the published placements, Accelerate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.maveriq.baselines.accelerate import balanced_map, replay, request_s
from systems.maveriq.baselines.alpaserve import AlpaServe, Groups, Job, factorisations
from systems.maveriq.baselines.published import published_placement
from systems.maveriq.configuration import Configuration, known_models
from systems.maveriq.serving.workload import Entry, Trace, model_list


def latency(model, one):
    """`big` needs four GPUs; TP makes faster."""
    return {"big": 2.0, "small": 0.2}[model] / one.tp**0.5 if model != "big" or one.gpus >= 4 else math.inf


def memory(model, one):
    return {"big": 120.0, "small": 14.0}[model] / one.gpus


def job(rate, models=("big", "small"), seconds=60, slo=(10.0, 1.0)):
    requests = tuple((place / rate, place % len(models)) for place in range(int(rate * seconds)))
    return Job(models, slo, requests)


def search(**more):
    return AlpaServe(latency, memory, gpus=8, free_gib=47.0, **more)


def test_all_powers_of_two():
    assert list(factorisations(4)) == [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]


@settings(deadline=None)
@given(st.floats(0.2, 20))
def test_a_placement_fits_and_alpaserve_star_hosts_everybody(rate):
    for keep_all in (False, True):
        groups, judged = search(keep_all=keep_all).place(job(rate, seconds=10))
        one = Configuration(groups.tp, groups.pp)
        for group in range(groups.count):
            held = sum(
                memory(model, one) for model, hosts in zip(("big", "small"), groups.hosts, strict=True) if group in hosts
            )
            assert held <= 47.0
        assert all(len(set(hosts)) == len(hosts) for hosts in groups.hosts)
        assert 0 <= judged.goodput <= 1
        assert not keep_all or all(groups.hosts)


def test_light_load_meets_every_slo():
    groups, judged = search().place(job(0.5))
    assert judged.goodput == 1.0 and all(groups.hosts)


def test_a_model_that_fits_nowhere_is_dropped_or_nothing_is_placed():
    huge = AlpaServe(latency, lambda model, _one: 100.0 if model == "big" else 1.0, gpus=8, free_gib=47.0)
    groups, _ = huge.place(job(1.0))
    assert groups.hosts[0] == () and groups.hosts[1]
    star = AlpaServe(latency, lambda model, _one: 100.0 if model == "big" else 1.0, gpus=8, free_gib=47.0, keep_all=True)
    assert star.place(job(1.0)) is None


def test_the_simulator_refuses_what_would_be_late_and_pipelines():
    alone = Job(("small",), (0.5,), ((0.0, 0), (0.0, 0), (0.0, 0), (0.0, 0)))
    single = search().judge(alone, Groups(1, 1, 1, ((0,),)))
    assert single.goodput == 0.5 and single.missed == (2,)  # 0.2, 0.4, then 0.6 is late
    piped = search().judge(alone, Groups(1, 4, 1, ((0,),)))
    assert piped.goodput == 1.0  # a stage of 0.05: 0.2, 0.25, 0.3, 0.35
    assert piped.score(1) < piped.score(2)


def test_a_second_group_halves_the_queue():
    two = Job(("small",), (0.5,), ((0.0, 0),) * 4)
    assert search().judge(two, Groups(1, 1, 2, ((0, 1),))).goodput == 1.0


def test_published_placements_fit_their_lists():
    for which in ("alpaserve", "alpaserve_star"):
        for name in ("large", "regular", "twentyone"):
            for rate in (0.1, 0.15, 0.2, 0.4):
                groups = published_placement(which, name, rate)
                if groups is None:
                    assert (which, name) == ("alpaserve_star", "twentyone")
                    continue
                assert len(groups.hosts) == len(model_list(name)) and groups.tp * groups.pp * groups.count == 8
                assert all(0 <= group < groups.count for hosts in groups.hosts for group in hosts)
    assert sum(map(bool, published_placement("alpaserve", "twentyone", 0.4).hosts)) == 13
    assert published_placement("alpaserve", "large", 0.15).hosts[0] == ()
    assert published_placement("alpaserve", "large", 0.2).gpus(0) == tuple(range(8))
    with pytest.raises(InputError, match="no published placement"):
        published_placement("alpaserve", "huge", 0.1)


def test_a_balanced_map_is_even():
    assert balanced_map(80, 8) == (10,) * 8
    assert balanced_map(28, 8) == (4, 4, 4, 4, 3, 3, 3, 3)


def test_accelerate_takes_known_times_and_fits_the_rest():
    known = {"llama-2-70b": 4.47, "falcon-40b": 3.5, "llama-2-7b": 0.63}
    facts = known_models()
    assert request_s("llama-2-7b", facts, known) == 0.63
    assert 0.3 < request_s("gptj-6b", facts, known) < request_s("llama-2-13b", facts, known) < 3.5


def test_accelerate_is_one_thread_for_loads_and_requests():
    entries = (Entry("a", 0), Entry("b", 1))
    trace = Trace(entries, np.array([0.0, 12.0]), np.array([1.0, 2.0, 13.0]), np.array([0, 0, 1]))
    found = replay(trace, [5.0, 1.0], [10.0, 20.0])
    assert found.start_s.tolist() == [10.0, 15.0, 40.0]  # the load of b waits for both requests, and its request for the load
    assert found.finish_s.tolist() == [15.0, 20.0, 41.0]
