"""The simulated driver: checks that must hold in any calibration (sheet 7.3)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from systems.common.core import Trial
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine, serve
from systems.common.engine.executor import DecodeRun
from systems.common.errors import InputError
from systems.common.hardware.interference import AnalyticInterference
from systems.common.workloads.build import build
from systems.llmstation.experiments import Bench, colocation
from systems.llmstation.modes import PlannerMode
from systems.llmstation.simulated import PlannedTuning, bucket, steps_in_bucket
from systems.llmstation.tuning_cost import precise_chunks_s, sharded_job, shared_job

WORKLOAD = {
    "arrivals": "poisson",
    "lengths": "lognormal",
    "mean_input_tokens": 215.2,
    "p50_input_tokens": 120,
    "max_input_tokens": 1024,
    "mean_output_tokens": 198,
    "p50_output_tokens": 150,
    "max_output_tokens": 1024,
}
WAITS = {"forward_tasklets": 8, "forward_wait_s": 0.005, "backward_tasklets": 8, "backward_wait_s": 0.005}
KNOBS = {
    "llmstation": {"decode_target_s": 0.03},
    "fineinfer": {"defer_s": 0.01},
    "mps": {"thread_percentage": 50},
    "chunked": {"chunk_tokens": 128},
}


def trial(policy, rate_rps=2.0, seconds=60, seed=0, **more):
    parameters = {"model": "llama-3.1-8b", "policy": policy, "workload": WORKLOAD, "rate_rps": rate_rps, "seconds": seconds}
    return Trial("llmstation", "colocation", {**parameters, **KNOBS.get(policy, {}), **more}, "rtx3090x2", seed=seed)


def metrics(*args, **more):
    return colocation(trial(*args, **more)).metrics


@pytest.mark.parametrize("policy", ["inference_only", *KNOBS])
def test_every_request_finishes_and_the_same_seed_gives_the_same_run(policy):
    one, two = colocation(trial(policy)), colocation(trial(policy))
    assert one.metrics["finished"] == one.metrics["requests"] > 50
    assert dict(one.metrics) == dict(two.metrics)
    assert one.requests == two.requests
    assert metrics(policy, seed=1)["ttft_p99_s"] != one.metrics["ttft_p99_s"]


@pytest.mark.parametrize("policy", list(KNOBS))
def test_tuning_never_makes_serving_faster(policy):
    alone, shared = metrics("inference_only"), metrics(policy)
    assert shared["ttft_mean_s"] >= alone["ttft_mean_s"] * (1 - 1e-9)
    # FineInfer leaves decoding alone; deferred prompts arrive in larger batches, which may even help by a hair
    slack = 0.01 if policy == "fineinfer" else 1e-9
    assert shared["tpot_mean_s"] >= alone["tpot_mean_s"] * (1 - slack)
    assert shared["peft_samples_per_s"] > 0 == alone["peft_samples_per_s"]


def test_with_next_to_no_tuning_latencies_are_those_of_inference_alone():
    alone = metrics("inference_only", seconds=200)
    planned = metrics("llmstation", seconds=200, decode_target_s=1e-4, fused=False)
    # prompts wait at most for the tasklet under way (2 ms) when they meet an idle engine
    assert planned["ttft_mean_s"] - alone["ttft_mean_s"] < 0.003
    assert planned["tpot_mean_s"] == pytest.approx(alone["tpot_mean_s"], rel=0.02)


@pytest.mark.parametrize(
    ("policy", "job"),
    [
        ("llmstation", lambda b: shared_job(b.layers, 500, 8).samples_per_s),
        ("fineinfer", lambda b: shared_job(b.layers, 500, 8).samples_per_s),
        ("mps", lambda b: sharded_job(b.whole_layers(), b.testbed, 512, 1.0).samples_per_s),
        ("chunked", lambda b: sharded_job(b.whole_layers(), b.testbed, 128, 1.0).samples_per_s),
    ],
)
def test_without_load_tuning_runs_as_fast_as_alone(policy, job):
    few = trial(policy, rate_rps=0.01, seconds=2000, thread_percentage=100)
    assert colocation(few).metrics["peft_samples_per_s"] == pytest.approx(job(Bench.of(few)), rel=0.03)


@pytest.mark.parametrize("policy", list(KNOBS))
def test_each_knob_buys_tuning_with_latency(policy):
    knob, low, high = {
        "llmstation": ("decode_target_s", 0.012, 0.03),
        "fineinfer": ("defer_s", 0.001, 0.4),
        "mps": ("thread_percentage", 10, 100),
        "chunked": ("chunk_tokens", 32, 512),
    }[policy]
    a, b = metrics(policy, 1.0, 200, **{knob: low}), metrics(policy, 1.0, 200, **{knob: high})
    assert b["peft_samples_per_s"] > a["peft_samples_per_s"]
    assert max(b["ttft_p99_s"] / a["ttft_p99_s"], b["tpot_p99_s"] / a["tpot_p99_s"]) > 1.1


class Recording(PlannedTuning):
    """Keeps every decode run that the engine was given, and how far it went."""

    def __init__(self, *args):
        super().__init__(*args)
        self.runs, self.tasklets = [], 0

    def decode_run(self, batch):
        self.run_given = super().decode_run(batch)
        return self.run_given

    def advanced(self, steps):
        self.runs.append((self.run_given, steps))
        self.tasklets += steps * self._tasklets
        super().advanced(steps)


def planned(target_s, one_by_one=False, fused=True):
    bench = Bench.of(trial("llmstation"))
    job = shared_job(bench.layers, 500, 8)
    executor = Recording(bench.cost, bench.layers, job, AnalyticInterference(), PlannerMode(target_s, fused))
    if one_by_one:
        whole = executor.decode_run
        executor.decode_run = lambda batch: (  # the same first step, and never more than it
            DecodeRun(run.first_s, 0.0, 1) if (run := whole(batch)) else run
        )
    engine = Engine(EngineConfig(9000, "prefill-first", watermark=0.01), executor)
    workload = build({**WORKLOAD, "rate_rps": 2.0, "seconds": 60}, {}, 0)
    return executor, serve(engine, workload.requests)


@pytest.mark.parametrize("fused", [True, False])
def test_the_planner_never_exceeds_its_target_when_the_table_is_exact(fused):
    executor, _ = planned(0.025, fused=fused)
    alone_s = executor.cost.decode(40, 40 * 1500).first_s
    assert alone_s < 0.025, "the target must be reachable, or the test says nothing"
    for run, steps in executor.runs:
        last_s = run.first_s + run.increment_s * (steps - 1)
        assert last_s <= 0.025 * (1 + 1e-9)


def test_planned_jumps_equal_planned_steps():
    jumping, ours = planned(0.02)
    stepping, theirs = planned(0.02, one_by_one=True)
    assert len(stepping.runs) > 1.5 * len(jumping.runs)
    assert jumping.samples == pytest.approx(stepping.samples, rel=1e-9)
    np.testing.assert_allclose([s.finish_s for s in ours], [s.finish_s for s in theirs], rtol=1e-9)


def test_the_planner_soon_plans_with_what_it_measured():
    executor, _ = planned(0.02)
    answers = executor.source.answers
    assert answers["regression"] > 0 and answers["record"] > 0
    assert set(executor._plans) <= set(executor.source._record)


@pytest.mark.parametrize(("decodes", "context"), [(1, 0), (1, 1), (3, 384), (3, 385), (7, 7 * 128), (256, 100_000)])
def test_buckets_hold_their_steps(decodes, context):
    steps = steps_in_bucket(decodes, context)
    assert bucket(decodes, context + (steps - 1) * decodes) == bucket(decodes, context)
    assert bucket(decodes, context + steps * decodes) > bucket(decodes, context)


def test_smaller_chunks_cost_more_time_per_sample():
    layers = Bench.of(trial("llmstation")).layers
    times = [precise_chunks_s(layers, 1024, chunk) for chunk in (1024, 512, 256, 128, 64, 32)]
    assert times == sorted(times)


def test_modes_and_policies_that_do_not_exist_are_refused():
    for bad, key in (({"policy": "magic"}, "policy"), ({"policy": "llmstation", "mode": "magic"}, "mode")):
        given = {**trial("llmstation").parameters, **bad}
        with pytest.raises(InputError, match=key):
            colocation(replace(trial("llmstation"), parameters=given))
    with pytest.raises(InputError, match="decode_target_s"):
        colocation(replace(trial("llmstation"), parameters={**trial("inference_only").parameters, "policy": "llmstation"}))
    with pytest.raises(InputError, match="backend"):
        colocation(replace(trial("llmstation"), backend="measured"))


def test_feedback_holds_the_limits_it_is_given():
    limits = {"slo_ttft_s": 0.5, "slo_tpot_s": 0.02}
    free = metrics("llmstation", 3.0, 400, mode="fixed", **{**WAITS, "forward_wait_s": 0.0, "backward_wait_s": 0.0})
    steered = metrics(
        "llmstation", 3.0, 400, mode="feedback", **limits, **{**WAITS, "forward_wait_s": 0.0, "backward_wait_s": 0.0}
    )
    assert free["tpot_p99_s"] > 0.02
    assert steered["tpot_p99_s"] < free["tpot_p99_s"]
    assert steered["peft_samples_per_s"] < free["peft_samples_per_s"]
