"""LLMStation's measured backend without torch: what is observed, who may tune when, hints, recorded tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import rescale
from harness.config import Config
from harness.figure_file import load_figure
from harness.hint import Hint, saved
from harness.record import record
from harness.reference import Reference
from harness.rescale import Finder, Moved
from harness.rows import About, write_rows
from harness.search import Knob, SearchSpace
from harness.trials import Ran
from systems.common.core import Request, Slo, Trial
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine, serve
from systems.common.engine.sequence import Sequence
from systems.common.errors import InputError
from systems.llmstation.adapters import AdapterLimited
from systems.llmstation.baselines.fineinfer import POLL_S, FineInfer
from systems.llmstation.corun.observed import MOST, Observed, Place, Step, co_run
from systems.llmstation.corun.pace import Exclusive, Planned, Steered, Waiting
from systems.llmstation.experiments import EXPERIMENTS
from systems.llmstation.latency_source import LatencySource, Situation
from systems.llmstation.modes import FeedbackMode, FixedMode, PlannerMode
from systems.llmstation.planner import CoRunLatencies, overlapped_s, plan_overlapped

SECONDS = st.floats(1e-4, 1e-2)
PLACE = Place(8, 1024)


@given(alone=SECONDS, harm=st.floats(1.01, 20), tuning=SECONDS, layers=st.integers(1, 80), tasklets=st.integers(1, 40))
def test_what_an_iteration_took_gives_back_the_latencies(
    alone: float, harm: float, tuning: float, layers: int, tasklets: int
) -> None:
    truth = CoRunLatencies(alone, alone * harm, tuning)
    took_s = overlapped_s(truth, layers, tasklets)
    overlap_s = min(tasklets * tuning, layers * truth.decode_s)
    seen = co_run(layers * alone, took_s, overlap_s, tuning, layers)
    assert seen.decode_alone_s == pytest.approx(alone)
    assert seen.decode_s == pytest.approx(truth.decode_s, rel=1e-3)


def test_on_one_thread_the_bound_is_slack_over_tasklet() -> None:
    seen = co_run(0.010, 0.010 + 0.004, 0.004, 0.002, 10)  # two tasklets of 2 ms after 10 ms of decoding
    assert seen.decode_s == pytest.approx(MOST * 0.001)
    assert plan_overlapped(seen, 10, 0.017, 100) == 3


@given(took=st.lists(st.floats(1e-4, 1.0), min_size=1), overlap=st.lists(st.floats(0, 1.0), min_size=1))
def test_whatever_is_measured_no_latency_is_absurd(took: list[float], overlap: list[float]) -> None:
    observed = Observed(4, 100)
    for seconds, beside in zip(took, overlap, strict=False):
        observed.saw(Step(PLACE, seconds, beside, {"forward": [0.001]} if beside else {}))
    if PLACE in observed.alone_s:
        known = observed.lookup(PLACE, "forward")
        assert 0 < known.decode_alone_s <= known.decode_s < math.inf


def test_the_planner_is_asked_with_what_was_measured() -> None:
    observed = Observed(10, 100)
    pace = Planned(PlannerMode(0.02, fused=False), observed)
    pace.step(PLACE, "backward", 99)
    assert pace.plans == [0]  # the first step in a place runs alone
    observed.saw(Step(PLACE, 0.010))
    observed.saw(Step(PLACE, 0.015, 0.010, {"backward": [0.002] * 5}))
    truth = co_run(0.010, 0.015, 0.010, 0.002, 10)
    assert observed.source.lookup(Situation(8, 1024, 100, "backward")) == truth
    pace.step(PLACE, "backward", 99)
    assert pace.plans[-1] == plan_overlapped(truth, 10, 0.02, 99) > 0
    assert pace.may(0.0, 0, True, 0)
    for _ in range(pace.plans[-1]):
        pace.launched("backward", 1, 0.0)
    assert not pace.may(0.0, 0, serving=True, done_in_sample=1)
    assert pace.may(0.0, 0, serving=False, done_in_sample=1)
    pace.step(None, "backward", 99)  # a prompt
    assert not pace.may(0.0, 0, serving=True, done_in_sample=1)


def test_a_record_becomes_the_profile_and_predicts() -> None:
    source = LatencySource({})
    for decodes in (1, 8, 16):
        source.record(Situation(decodes, 100 * decodes, 500, "forward"), CoRunLatencies(1e-4, 1e-4 + 1e-5 * decodes, 1e-3))
    with pytest.raises(KeyError):
        source.lookup(Situation(4, 400, 500, "forward"))
    source.adopt_record()
    assert source.lookup(Situation(4, 400, 500, "forward")).decode_s == pytest.approx(1.4e-4)
    assert source.answers == {"record": 0, "profile": 0, "regression": 2}


def test_a_record_may_be_a_running_mean() -> None:
    source, where = LatencySource({}), Situation(1, 128, 500, "forward")
    source.record(where, CoRunLatencies(1.0, 2.0, 4.0), 0.25)
    source.record(where, CoRunLatencies(2.0, 4.0, 8.0), 0.25)
    assert source.lookup(where) == CoRunLatencies(1.25, 2.5, 5.0)


def test_waits_pause_after_so_many_tasklets_once_the_gpu_is_idle() -> None:
    pace = Waiting(FixedMode(2, 0.5, 3, 0.1))
    pace.step(PLACE, "forward", 9)
    pace.launched("forward", 1, 0.0)
    assert pace.may(0.0, 1, serving=True, done_in_sample=1)
    pace.step(PLACE, "forward", 8)
    pace.launched("forward", 2, 0.0)
    assert not pace.may(0.1, 2, serving=True, done_in_sample=2)  # two in flight: the pause has not begun
    assert not pace.may(1.0, 0, serving=True, done_in_sample=2)  # now it has
    assert not pace.may(1.49, 0, serving=True, done_in_sample=2)
    assert pace.may(1.5, 0, serving=True, done_in_sample=2)


def test_nothing_waits_while_nothing_is_served() -> None:
    pace = Waiting(FixedMode(1, 0.5, 1, 0.5))
    pace.step(PLACE, "forward", 9)
    pace.launched("forward", 1, 0.0)
    assert not pace.may(0.0, 0, serving=True, done_in_sample=1)
    assert pace.may(0.1, 0, serving=False, done_in_sample=1)
    pace.launched("forward", 2, 0.1)
    assert pace.may(0.1, 1, serving=False, done_in_sample=2)  # no iteration was issued since


def test_feedback_lengthens_the_waits_of_a_run_that_is_late() -> None:
    def ended(index: int) -> Sequence:
        sequence = Sequence(Request(index, 0.0, 5, 11))
        sequence.first_token_s, sequence.finish_s = 2.0, 3.0
        return sequence

    done: list[Sequence] = []
    pace = Steered(FeedbackMode(Slo(ttft_s=1.0, tpot_s=1.0), FixedMode(8, 0.01, 8, 0.01), window=3))
    pace.watch(lambda: done)
    pace.step(PLACE, "forward", 9)
    assert pace.mode.forward_wait_s == 0.01
    done += map(ended, range(3))
    pace.step(PLACE, "forward", 9)
    assert pace.mode.forward_wait_s == pytest.approx(0.015)


@given(st.floats(0, 2), st.floats(0, 1), st.floats(0.001, 0.7), st.floats(0, 0.3))
def test_fineinfer_step_by_step_starts_when_its_window_says(
    idle_from: float, wait: float, sample_s: float, defer_s: float
) -> None:
    arrival, policy = idle_from + wait, FineInfer(defer_s)
    samples, start_s = policy.window(idle_from, arrival, sample_s)
    pace, now, done, busy_until = Exclusive(policy), idle_from, 0, -1.0
    for _ in range(100_000):
        busy = now < busy_until
        at = arrival if now < arrival else pace.start_s(arrival, now, busy)
        if now >= arrival and at <= now:
            break
        if not busy and pace.may(now, 0, serving=False, done_in_sample=0):
            done, busy_until = done + 1, now + sample_s
        now = min(max(at, now + 1e-9), busy_until) if busy_until > now else at
    assert abs(done - samples) <= 1  # a sample may begin in the very instant in which the door closes
    assert now >= busy_until - 1e-9  # none was cut
    if done == samples:
        assert now == pytest.approx(start_s, abs=POLL_S + 1e-6)


def test_fineinfer_never_interrupts_a_sample() -> None:
    pace = Exclusive(FineInfer(0.0))
    assert pace.may(0.0, 0, serving=False, done_in_sample=0)
    assert pace.start_s(1.0, 1.0, busy=True) > 1.0
    assert not pace.may(1.0, 0, serving=False, done_in_sample=0)  # no new one
    assert pace.may(1.0, 0, serving=False, done_in_sample=5)  # but the begun one goes on
    assert pace.start_s(1.0, 1.2, busy=False) == 1.2
    pace.step(PLACE, "forward", 1)
    assert not pace.may(1.2, 0, serving=True, done_in_sample=0)


class Unit:
    """An executor for which everything takes a second."""

    def run(self, batch: object) -> float:
        return 1.0

    def decode_run(self, batch: object):  # type: ignore[no-untyped-def]
        from systems.common.engine.executor import DecodeRun

        return DecodeRun(1.0, 0.0, 1)

    def advanced(self, steps: int) -> None: ...

    def idle(self, now_s: float, until_s: float) -> float:
        return until_s


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.floats(0, 30)), min_size=1, max_size=30), st.integers(1, 4))
def test_never_more_adapters_run_than_fit_and_everybody_ends(asked: list[tuple[int, int, float]], most: int) -> None:
    class Watched(AdapterLimited):
        def form(self, state):  # type: ignore[no-untyped-def]
            batch = super().form(state)
            assert len({s.request.adapter for s in state.running.values()} - {None}) <= most
            return batch

    arrivals = sorted(asked, key=lambda entry: entry[2])
    requests = [Request(i, at, 3, out, f"a{n}" if n else None) for i, (n, out, at) in enumerate(arrivals)]
    done = serve(Engine(EngineConfig(50, "prefill-first", max_num_batched_tokens=64), Unit(), Watched(most)), requests)
    assert all(not math.isnan(sequence.finish_s) for sequence in done)


# ---- harness: measured sections, hints, recorded tables


def test_a_hint_moves_the_start_of_every_knob() -> None:
    space = SearchSpace(maximise="y", knobs={"k": Knob(low=1, high=100)})
    assert Hint({"k": 7.0}, 9).on(space).knobs["k"].start == 7.0
    assert Hint(None, 9).on(space) == space
    assert saved({"a": Hint({"k": 7.0}, 9)}, {"a": 4}, 240.0).startswith("4 probes measured in 4.0 min, 5 fewer (5.0 min)")


def test_a_measured_run_of_a_figure_is_short_and_keeps_some_levels(root: Path) -> None:
    figure = load_figure(root / "figures/llmstation/fig8a.yaml")
    measured = figure.on("measured")
    assert figure.on("simulated") is figure
    assert "seconds" in figure.parameters and "seconds" not in measured.parameters  # null in the measured section
    assert measured.parameters["requests"] < 1000  # type: ignore[operator]
    assert len(measured.points("llmstation")) < len(figure.points("llmstation"))
    assert measured.search is not None and measured.search.budget == figure.measured.budget


def test_limits_and_targets_follow_a_factor_and_trials_do_not(root: Path) -> None:
    figure = load_figure(root / "figures/llmstation/fig9a.yaml")
    first, *_, last = figure.points("llmstation")
    assert "tpot_slo_s" not in first.parameters and first.parameters == last.parameters
    space = figure.space("llmstation", last.at)
    assert space is not None and space.limits == {"ttft_p99_s": 0.5, "tpot_p99_s": 0.14}
    ten = load_figure(root / "figures/llmstation/fig10.yaml")
    target = ten.rules_at({"peft_target": 0.8}).target
    assert target is not None and target.value == 0.8


def test_a_recorded_figure_comes_back_as_it_was(root: Path, tmp_path: Path) -> None:
    path = root / "figures/llmstation/fig8a.yaml"
    figure, config = load_figure(path), Config(hardware="h200x1", backend="measured")
    run = tmp_path / "results" / config.run_name / "llmstation" / "fig8a"
    (run / "series").mkdir(parents=True)
    (run / "rescale.json").write_text("{}")
    written = {}
    for series in figure.series:
        row = {"series": series.name, "rate_rps": 2.0, "peft_samples_per_s": 1.5, "ttft_p99_s": None, "tpot_p99_s": math.inf}
        row |= {f"knob_{name}": 3 if name in series.knobs else None for name in figure.knobs}
        row |= {"feasible": True, "outcome": "precision reached", "probes": 4, "trial": "12345678901234567890"}
        written[series.name] = [row]
        write_rows(run / "series" / f"{series.name}.parquet", [row], About(hardware=["h200x1"], backends=["measured"]))
    folder = record(path, tmp_path / "results", config, tmp_path / "reference")
    assert folder == tmp_path / "reference" / "h200" / "llmstation" / "fig8a"
    reference = Reference.of("llmstation", "fig8a", "h200x1", tmp_path / "reference")
    assert reference.exists and reference.rescale.is_file()
    rows, about = reference.rows("fineinfer", "h200x1")
    assert rows == written["fineinfer"] and about.backends == ["measured"]
    with pytest.raises(InputError, match="recorded on h200x1: use hardware=h200x1"):
        reference.rows("fineinfer", "h200x2")
    version = reference.version()
    (folder / "provenance.json").write_text(json.dumps({"testbed": "h200x1", "about": {}}))
    assert reference.version() != version
    with pytest.raises(InputError, match="was not recorded"):
        reference.rows("fineinfer", "h200x1")


def test_a_smoke_run_is_not_recorded(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="record a run of paper scale"):
        record(root / "figures/llmstation/fig8a.yaml", tmp_path, Config(scale="smoke"), tmp_path / "reference")


def moved_to(hardware: str, root: Path) -> tuple[Moved, list[Trial]]:
    """How Figure 8a is moved to `hardware`, which is a fifth slower than the simulator thinks; and the measured trials."""
    path = root / "figures/llmstation/fig8a.yaml"
    figure, config = load_figure(path), Config(hardware=hardware, backend="measured")
    asked: list[Trial] = []

    class Store:
        def run(self, trial: Trial, _asked_by: str) -> Ran:
            asked.append(trial)
            knee = {"rtx3090x2": 6.0, hardware: 30.0 if trial.backend == "simulated" else 24.0}[trial.hardware]
            late = 10.0 if float(trial.parameters["rate_rps"]) > knee else 0.01  # type: ignore[arg-type]
            return Ran("", {"ttft_p99_s": late, "ttft_p50_s": 0.01, "tpot_p99_s": 0.01, "tpot_p50_s": 0.01}, True)

    assert figure.rescale is not None
    moved = Finder(path, figure, figure.rescale, config, {}, Store()).find()  # type: ignore[arg-type]
    assert moved.saturation_rps[0] == pytest.approx(6, rel=0.03)
    assert {trial.backend for trial in asked if trial.hardware == "rtx3090x2"} == {"simulated"}
    measured = [trial for trial in asked if trial.backend == "measured"]
    assert {trial.hardware for trial in measured} == {hardware}
    return moved, measured


def test_where_the_simulator_is_not_calibrated_the_search_here_is_measured_and_begins_where_it_ended(root: Path) -> None:
    """A measured figure is moved by what is measured here against what the cost model says of the paper's GPUs."""
    moved, measured = moved_to("h100x1", root)
    assert moved.saturation_rps[1] == pytest.approx(24, rel=0.15) and not moved.how
    assert len(measured) < 10
    assert measured[0].parameters["rate_rps"] == pytest.approx(1.0, rel=0.05)  # five times the paper's unloaded rate
    assert measured[1].parameters["rate_rps"] == pytest.approx(30, rel=0.05)


def test_where_the_simulator_is_calibrated_one_measured_run_checks_what_it_found(root: Path, tmp_path: Path) -> None:
    moved, measured = moved_to("h200x1", root)
    assert moved.saturation_rps[1] == pytest.approx(30, rel=0.03)
    (trial,) = measured
    assert trial.parameters["rate_rps"] == moved.saturation_rps[1]
    assert trial.parameters["seconds"] == 8 and "requests" not in trial.parameters
    assert "measured there at 30 req/s: ttft_p99_s 10 (limit 0.5)" in str(moved)
    rescale.write(moved, tmp_path / "rescale.json")
    assert rescale.read(tmp_path / "rescale.json") == moved


def test_the_simulated_cost_of_chunks_falls_to_the_whole_sequence(root: Path) -> None:
    figure = load_figure(root / "figures/llmstation/fig4.yaml")
    asked = [Trial("llmstation", "chunked_cost", point.parameters, figure.testbed) for point in figure.points("short")]
    times = [EXPERIMENTS["chunked_cost"](trial).metrics["times_whole"] for trial in asked]
    assert times == sorted(times, reverse=True) and times[-1] == pytest.approx(1.0)  # type: ignore[type-var]
    with pytest.raises(InputError, match="measured only"):
        EXPERIMENTS["suspension"](Trial("llmstation", "suspension", {}, figure.testbed))
