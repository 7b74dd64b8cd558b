"""Tuning beside serving on a CPU with the tiny model: neither side notices the other in its results; every policy runs."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from systems.common.core import Request, Trial  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.metrics import CUT  # noqa: E402
from systems.llmstation.baselines.fineinfer import FineInfer  # noqa: E402
from systems.llmstation.corun import driver, pair  # noqa: E402
from systems.llmstation.corun.beside import Beside  # noqa: E402
from systems.llmstation.corun.measure import Served, censored, serve, wanted_of  # noqa: E402
from systems.llmstation.corun.observed import Step  # noqa: E402
from systems.llmstation.corun.pace import Counted, Exclusive, Pace, Planned, Waiting  # noqa: E402
from systems.llmstation.corun.pair import Child  # noqa: E402
from systems.llmstation.corun.session import Session, make_trainer, samples  # noqa: E402
from systems.llmstation.experiments import EXPERIMENTS, colocation  # noqa: E402
from systems.llmstation.measured import _known  # noqa: E402
from systems.llmstation.modes import FixedMode, PlannerMode  # noqa: E402
from systems.llmstation.training_cost import sample_s  # noqa: E402

torch.set_num_threads(1)
WORKLOAD = {"arrivals": "poisson", "lengths": "fixed", "input_tokens": 160, "output_tokens": 160}


def trial(hardware: str = "cpux1", **parameters: object) -> Trial:
    told = {"model": "llama-3.1-8b", "seconds": 0.4, "rate_rps": 10, "workload": WORKLOAD, **parameters}
    return Trial("llmstation", "colocation", told, hardware, "measured", 0, {})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def held() -> Session:
    return Session.start(wanted_of(trial(kv_blocks=64)))


def requests(spread_s: float = 0.0) -> list[Request]:
    return [Request(i, spread_s * i, 3 + 5 * i % 17, 4 + 7 * i % 23) for i in range(10)]


def run(held: Session, beside: Beside, asked: list[Request]) -> tuple[list[list[int]], Served]:
    served = serve(held, beside, asked)
    return [list(held.executor.outputs[request.index]) for request in asked], served


def paces(held: Session) -> dict[str, Pace]:
    return {
        "counted": Counted(3, pause=3),
        "planner": Planned(PlannerMode(1.0, fused=False), _known(held)),
        "waits": Waiting(FixedMode(2, 0.001, 2, 0.001)),
        "fineinfer": Exclusive(FineInfer(0.005)),
    }


@pytest.mark.parametrize("name", ["counted", "planner", "waits", "fineinfer"])
@pytest.mark.parametrize("spread_s", [0.0, 0.02])
def test_what_is_served_and_what_is_tuned_are_as_if_alone(held: Session, name: str, spread_s: float) -> None:
    pace = paces(held)[name]
    alone, _ = run(held, Beside(held.lanes), requests(spread_s))
    held.trainer = make_trainer(held.wanted.shape, held.weights, held.wanted)
    tuner = held.tuner(seed=3)
    beside = Beside(held.lanes, tuner, pace, getattr(pace, "observed", None))
    tokens, served = run(held, beside, requests(spread_s))
    assert tokens == alone
    assert tuner.launched == sum(beside.tasklets.values())
    assert tuner.launched > 0
    while tuner.done_in_sample:  # to the end of the sample
        tuner.launch()
    losses = tuner.losses()
    lonely = make_trainer(held.wanted.shape, held.weights, held.wanted)
    for _, batch in zip(losses, samples(held.wanted.shape, held.wanted.tuning_tokens, 3, "cpu"), strict=False):
        for _ in lonely.steps(batch):
            pass
    assert losses == [float(loss) for loss in lonely.losses]
    assert held.executor.tables.free_blocks == held.config.num_gpu_blocks
    assert bool((served.records.finish_s > 0).all())


def test_steps_and_tasklets_are_told_as_they_were(held: Session) -> None:
    steps: list[Step] = []
    beside = Beside(held.lanes, held.tuner(), Counted(2))
    beside.seen.append(steps.append)
    run(held, beside, requests())
    assert any(step.place is None for step in steps)
    decodes = [step for step in steps if step.place is not None]
    assert len(decodes) > 10
    for step in decodes:
        assert sum(map(len, step.tasklets_s.values())) in (1, 2)  # fewer where a phase ends
        assert 0 < step.overlap_s <= step.took_s
        assert step.overlap_s == pytest.approx(sum(map(sum, step.tasklets_s.values())))


def test_the_planner_keeps_decode_steps_near_its_target(held: Session) -> None:
    known = _known(held)
    steps: list[Step] = []
    beside = Beside(held.lanes, held.tuner(), Planned(PlannerMode(1e-9, fused=False), known), known)
    beside.seen.append(steps.append)
    run(held, beside, requests())
    assert steps and all(step.overlap_s == 0 for step in steps)  # a target that nothing meets: no tasklet beside a step
    assert sum(known.source.answers.values()) > 0


def test_fineinfer_serves_only_between_samples(held: Session) -> None:
    tuner = held.tuner()
    done: list[int] = []

    class Seen(Exclusive):
        def step(self, place: object, phase: str, left: int) -> None:
            super().step(place, phase, left)  # type: ignore[arg-type]
            done.append(tuner.done_in_sample)

    run(held, Beside(held.lanes, tuner, Seen(FineInfer(0.01))), requests(0.03))
    assert tuner.launched >= tuner.length
    assert set(done) == {0}


def test_an_overload_is_cut_and_counts_as_late(held: Session) -> None:
    beside = Beside(held.lanes)
    colocated = held.colocated(beside)
    sequences = colocated.serve([Request(0, 0.0, 4, 4), Request(1, 0.0, 40, 40), Request(2, 5.0, 4, 4)], until_s=1e-9)
    assert [sequence.finish_s != sequence.finish_s for sequence in sequences] == [True, True, True]
    tokens, served = run(held, beside, requests())  # and the session is as good as new
    assert all(len(out) == request.output_tokens for out, request in zip(tokens, requests(), strict=True))
    assert censored(served.records) == {}


def test_a_run_that_does_not_wait_counts_what_its_requests_had_done(held: Session) -> None:
    requests = [Request(0, 0.0, 4, 4), Request(1, 0.0, 4, 40), Request(2, 0.0, 4, 40)]
    records = run(held, Beside(held.lanes), requests)[1].records
    columns = {name: getattr(records, name).copy() for name in ("finish_s", "status", "first_token_s")}
    cut = replace(records, **columns)
    cut.finish_s[1:], cut.status[1:] = math.nan, CUT
    assert censored(cut)["tpot_p99_s"] == math.inf  # nothing known: as late as can be
    assert censored(cut, {})["tpot_p99_s"] == pytest.approx(records.tpot_s[0])  # hardly begun: says nothing
    assert censored(cut, {1: 0.5, 2: 0.5})["tpot_p99_s"] == pytest.approx(0.5, rel=0.05)
    assert math.isfinite(censored(cut, {})["ttft_p99_s"])
    cut.first_token_s[1:] = math.nan  # not even begun
    assert censored(cut, {})["ttft_p99_s"] == censored(cut, {})["tpot_p99_s"] == math.inf


def test_what_is_cut_off_while_it_decodes_has_a_time_per_token(held: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "TELLING_S", 0.0)
    colocated = held.colocated(Beside(held.lanes))
    asked = [Request(i, 0.0, 4, 90) for i in range(3)]
    step, engine = colocated.engine.step, colocated.engine

    def slow(now_s: float) -> float:  # so that no machine is fast enough to be done in time
        time.sleep(0.01)
        return step(now_s)

    engine.step = slow  # type: ignore[method-assign, assignment]
    sequences = colocated.serve(asked, until_s=0.4)
    assert all(math.isnan(sequence.finish_s) for sequence in sequences)
    assert set(colocated.tpot_so_far_s) == {0, 1, 2}
    assert min(colocated.tpot_so_far_s.values()) >= 0.009
    assert held.executor.tables.free_blocks == held.config.num_gpu_blocks


POLICIES = [
    {"policy": "inference_only"},
    {"policy": "llmstation", "decode_target_s": 0.01},
    {"policy": "llmstation", "decode_target_s": 0.01, "adapters": 3, "rank": 4},
    {
        "policy": "llmstation", "mode": "feedback", "slo_ttft_s": 0.1, "slo_tpot_s": 0.1,
        "forward_tasklets": 2, "forward_wait_s": 0.01, "backward_tasklets": 2, "backward_wait_s": 0.01,
    },
    {"policy": "fineinfer", "defer_s": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("parameters", POLICIES, ids=lambda p: "-".join(map(str, p.values()))[:30])
def test_every_policy_gives_what_the_simulated_one_gives(parameters: dict[str, object]) -> None:
    outcome = colocation(trial(**parameters))
    simulated = colocation(Trial("llmstation", "colocation", {**trial(**parameters).parameters, "seconds": 20}, "h200x1"))
    assert set(simulated.metrics) <= set(outcome.metrics)
    assert set(simulated.requests) == set(outcome.requests)
    assert outcome.metrics["finished"] == outcome.metrics["requests"] > 0
    tuned = outcome.metrics["peft_samples_per_s"]
    assert isinstance(tuned, float) and (tuned > 0) == (parameters["policy"] != "inference_only")
    assert any("not the paper's experiment" in note for note in outcome.notes)


@pytest.mark.slow
def test_strangers_run_as_two_processes() -> None:
    outcome = colocation(trial(policy="mps", thread_percentage=50))
    pair.release()
    assert outcome.metrics["finished"] == outcome.metrics["requests"] > 0
    assert outcome.metrics["peft_samples_per_s"] > 0  # type: ignore[operator]
    assert "two processes without MPS" in outcome.notes


@pytest.mark.slow
def test_the_two_processes_serve_trial_after_trial() -> None:
    pair.release()
    try:
        pids = set()
        for tokens in (128, 256):
            assert colocation(trial(policy="chunked", chunk_tokens=tokens)).metrics["peft_samples_per_s"] > 0  # type: ignore[operator]
            (kept,) = pair._KEPT
            assert kept._serving is not None
            pids.add((kept._serving._process.pid, kept._tuners[None]._process.pid))
        assert len(pids) == 1
        os.kill(kept._serving._process.pid, signal.SIGKILL)
        with pytest.raises(InputError, match="serve process"):
            colocation(trial(policy="chunked", chunk_tokens=128))
        assert not pair._KEPT  # and nothing of it is left
        for pid in pids.pop():
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    finally:
        pair.release()


class FakeChild:
    """Says `ready` to every order."""

    def __init__(self, side: str, _environment: object) -> None:
        self.side, self.closed = side, False
        self.orders: list[dict[str, object]] = []

    def order(self, **order: object) -> None:
        self.orders.append(order)

    def answer(self, _timeout_s: float, _watch: object = None) -> dict[str, object]:
        return {"notes": [self.side], "samples": 1, "seconds": 2.0}

    def close(self) -> None:
        self.closed = True


def test_tuners_are_kept_by_their_thread_percentage_and_spares_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "Child", FakeChild)
    kept = pair.Processes("cpu")
    wanted = [pair.Tuning(512, 100), pair.Tuning(128), pair.Tuning(512, 30), pair.Tuning(512, 50)]
    assert [tuning.limit for tuning in wanted] == [None, None, 30, 50]
    kept.foresee([(trial(), tuning) for tuning in wanted])
    assert len(kept._spares) == pair.MOST_SPARES and list(kept._tuners) == [None, 30]
    whole, spare = kept._tuners[None], kept._spares[0]
    assert len(kept._awaited) == 3  # serving, and the first tuners
    assert kept.run(trial(), wanted[0], 1.0)["tuned"]["samples"] == 1
    assert not kept._awaited
    kept.run(trial(), wanted[1], 1.0)
    assert kept._tuners[None] is whole and [o.get("tuning_tokens") for o in whole.orders][-3] == 128  # prepare, begin, end
    kept.run(trial(), wanted[2], 1.0)
    kept.run(trial(), wanted[3], 1.0)
    assert kept._tuners[50] is spare and len(kept._spares) == pair.MOST_SPARES
    assert list(kept._tuners) == [30, 50] and whole.closed and not spare.closed  # two copies of the weights at most
    everyone = [*kept._tuners.values(), *kept._spares, kept._serving]
    kept.close()
    assert all(child.closed for child in everyone)  # type: ignore[union-attr]


def test_a_child_that_dies_is_one_line_and_leaves_nothing() -> None:
    child = Child("tune", {})
    os.kill(child._process.pid, signal.SIGKILL)
    with pytest.raises(InputError, match="tune process: 'exit code -9': it died"):
        child.answer(30.0)
    child.close()


def test_a_child_ends_with_its_owner() -> None:
    child = Child("tune", {})
    assert child._process.stdin is not None
    child._process.stdin.close()  # what the kernel does when the owner is killed
    until = time.monotonic() + 30
    while child._process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert child._process.poll() == 3
    child.close()


@pytest.mark.parametrize(
    ("hardware", "parameters", "said"),
    [
        ("h200x2", {"policy": "inference_only"}, "hardware: 'h200x2': the measured backend co-runs on one GPU"),
        ("h200x1", {"policy": "inference_only"}, "no GPU here"),
        ("cpux1", {"policy": "nobody"}, "policy: 'nobody': use one of"),
        ("cpux1", {"policy": "mps"}, "thread_percentage: None: policy mps needs this"),
        ("cpux1", {"policy": "mps", "thread_percentage": 0}, "give 1 to 100"),
        ("cpux1", {"policy": "chunked", "chunk_tokens": 0}, "give at least 1 token"),
        ("cpux1", {"policy": "fineinfer", "defer_s": -1}, "give 0 or more seconds"),
        ("cpux1", {"policy": "llmstation", "mode": "wild"}, "use planner, fixed or feedback"),
        ("cpux1", {"policy": "llmstation", "decode_target_s": "fast"}, "decode_target_s: 'fast': give a number"),
        ("cpux1", {"policy": "llmstation", "decode_target_s": 0}, "give a positive number of seconds"),
    ],
)
def test_bad_knobs_are_one_line(hardware: str, parameters: dict[str, object], said: str) -> None:
    if hardware == "h200x1" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError) as refused:
        colocation(trial(hardware, **parameters))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_simulated_path_imports_no_torch(root: Path) -> None:
    import subprocess
    import sys

    code = "import sys, systems.llmstation.experiments, harness.series, harness.record; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


FIGURE = """
title: a small measured figure
paper: {figure: none}
experiment: colocation
testbed: rtx3090x2
backends: [simulated, measured, recorded]
parameters:
  {model: llama-3.1-8b, seconds: 20, workload: {arrivals: poisson, lengths: fixed, input_tokens: 160, output_tokens: 96}}
measured: {parameters: {seconds: 0.5}, levels: {rate_rps: [4]}, tolerance: 0.3, repeats: 1, budget: 3}
factors: {rate_rps: {levels: [1, 4]}}
search:
  {maximise: peft_samples_per_s, limits: {ttft_p99_s: 0.5, tpot_p99_s: 0.05}, tolerance: 0.3, repeats: 1, budget: 8}
columns: [ttft_p99_s]
rescale:
  experiment: colocation
  parameters: {policy: inference_only}
  rate: rate_rps
  low: 20
  high: 3000
  within: {ttft_p99_s: 5}
  latencies: {ttft_p99_s: ttft_p50_s}
  rates: [rate_rps]
series:
  - name: llmstation
    label: LLMStation
    parameters: {policy: llmstation}
    knobs: {decode_target_s: {low: 0.001, high: 1}}
plot: {kind: grouped_bars, y: peft_samples_per_s}
"""


def test_a_figure_is_measured_recorded_and_shown(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import record, rescale, series
    from harness.rows import read_rows

    path = tmp_path / "llmstation" / "small.yaml"
    path.parent.mkdir()
    path.write_text(FIGURE)
    results = tmp_path / "results"
    run = results / "cpux1-measured" / "llmstation" / "small"
    (run / "series").mkdir(parents=True)
    config = '{"hardware": "cpux1", "backend": "measured"}'
    common = ["--figure", str(path), "--results", str(results), "--config-json", config]
    moved = {"testbed": "rtx3090x2", "hardware": "cpux1", "saturation_rps": [8.0, 40.0], "unloaded": {"ttft_p99_s": [0.1, 0.2]}}
    (run / "rescale.json").write_text(json.dumps(moved))  # found by search in real life: a matter of a machine's speed
    out = run / "series" / "llmstation.parquet"
    one = ["--series", "llmstation", "--rescale", str(run / "rescale.json")]
    assert series.main([*common, *one, "--out", str(out)]) == 0
    ((row,), about) = read_rows(out)
    assert row["feasible"] in (True, False) and 1 <= row["probes"] <= 3  # type: ignore[operator]
    assert about.backends == ["measured"] and any("probes measured in" in note for note in about.notes)

    monkeypatch.chdir(tmp_path)
    assert record.main(["--figure", str(path), "--results", str(results), "--config-json", config]) == 0
    shown = tmp_path / "shown.parquet"
    recorded = config.replace("measured", "recorded")
    assert series.main([*common[:-1], recorded, *one, "--out", str(shown)]) == 0
    assert read_rows(shown) == ([row], about)
    assert shown.with_suffix(".history.jsonl").read_bytes() == out.with_suffix(".history.jsonl").read_bytes()
    assert rescale.main([*common[:-1], recorded, "--out", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == (run / "rescale.json").read_bytes()


@pytest.mark.parametrize("suspends", [0, 3, 80])
def test_suspending_is_measured_against_not_suspending(suspends: int) -> None:
    outcome = measured_of("suspension", tuning_tokens=256, suspends=suspends)
    assert outcome["sample_s"] > 0 and outcome["straight_s"] > 0
    assert outcome["overhead_percent"] == pytest.approx(100 * (outcome["sample_s"] / outcome["straight_s"] - 1))
    assert outcome["tasklets"] == 2 * 2 * 2 + 2  # attention and MLP of two layers each way, the loss, the step


def test_chunks_are_measured_against_the_whole() -> None:
    outcome = measured_of("chunked_cost", tuning_tokens=512, chunk_tokens=128)
    assert outcome["times_whole"] == pytest.approx(outcome["sample_s"] / outcome["whole_s"])


def measured_of(experiment: str, **parameters: object) -> dict[str, float]:
    told = trial(**parameters)
    return dict(EXPERIMENTS[experiment](replace(told, experiment=experiment)).metrics)  # type: ignore[arg-type]


def test_a_sample_is_suspended_where_it_should_be() -> None:
    held = Session.start(wanted_of(trial(kv_blocks=64)))
    asked: list[int] = []
    assert held.trainer is not None
    once = sample_s(held.trainer, held.wanted, lambda done: bool(asked.append(done)))  # type: ignore[func-returns-value]
    assert once() > 0
    assert asked == list(range(1, len(held.trainer.plan(1, held.wanted.tuning_tokens)) + 1))
