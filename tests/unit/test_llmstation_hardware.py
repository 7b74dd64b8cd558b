"""LLMStation simulated with what was measured on a GPU: which model of the hardware, measured tasklets, co-located fidelity."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.common.hardware import parse_testbed
from systems.common.hardware.interference import AnalyticInterference, Load, Tenant
from systems.common.hardware.interference_table import read_interference
from systems.common.models import model
from systems.llmstation import colocation_fidelity, tuning_table
from systems.llmstation.experiments import Bench, colocation
from systems.llmstation.hardware_model import HardwareModel, Measured
from systems.llmstation.simulated import SteadyTuning
from systems.llmstation.tuning_table import read_tuning

SHAPE = model("llama-3.1-8b")
KNOBS = {
    "inference_only": {},
    "llmstation": {"decode_target_s": 0.02},
    "fineinfer": {"defer_s": 0.1},
    "mps": {"thread_percentage": 30},
    "chunked": {"chunk_tokens": 128},
}
WAITS = {"mode": "fixed", "forward_tasklets": 8, "forward_wait_s": 0.005, "backward_tasklets": 8, "backward_wait_s": 0.005}
WORKLOAD = {"arrivals": "poisson", "lengths": "fixed", "input_tokens": 215, "output_tokens": 120}


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> Path:
    root: Path = request.getfixturevalue("root")
    return root / "reference"


def trial(policy: str = "llmstation", hardware: str = "h200x1", **more: object) -> Trial:
    told = {"model": "llama-3.1-8b", "policy": policy, "workload": WORKLOAD, "rate_rps": 18, "seconds": 6, "kv_blocks": 8000}
    return Trial("llmstation", "colocation", {**told, **KNOBS[policy], **more}, hardware, seed=0)


def metrics(*args: str, **more: object) -> dict[str, float]:
    return dict(colocation(trial(*args, **more)).metrics)  # type: ignore[arg-type]


# ---- which model


@pytest.mark.parametrize("policy", list(KNOBS))
def test_a_gpu_that_was_measured_is_simulated_with_that(policy: str) -> None:
    outcome = colocation(trial(policy))
    assert outcome.notes[0] == "calibrated on h200"
    assert "tuning tasklets measured" in outcome.notes[1]
    assert policy == "inference_only" or "co-run slowdowns measured" in outcome.notes[2]
    assert outcome.metrics["finished"] == outcome.metrics["requests"]
    assert outcome.metrics["num_gpu_blocks"] == 8000
    again = colocation(trial(policy, hardware_model="roofline"))
    assert again.notes[0].startswith("roofline h200")
    assert again.metrics["tpot_mean_s"] != outcome.metrics["tpot_mean_s"]


@pytest.mark.parametrize("hardware", ["rtx3090x2", "h200x2", "rtx4090x1"])
def test_others_are_simulated_as_ever(hardware: str) -> None:
    outcome = colocation(trial(hardware=hardware))
    assert outcome.notes[0].startswith("roofline")
    assert AnalyticInterference.source in outcome.notes


@pytest.mark.parametrize(
    ("hardware", "parameters", "said"),
    [
        ("h200x1", {"hardware_model": "guess"}, "hardware_model"),
        ("h200x2", {"hardware_model": "calibrated"}, "calibrations are of one GPU"),
        ("rtx4090x1", {"hardware_model": "calibrated"}, "rtx4090"),
        ("h200x1", {"fused": "sometimes"}, "use auto or off"),
    ],
)
def test_what_cannot_be_is_one_line(hardware: str, parameters: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        colocation(trial(hardware=hardware, **parameters))
    assert "\n" not in str(caught.value)


def test_a_calibration_without_corun_or_tuning_still_serves(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "h200" / "calibrated" / "llama-3.1-8b"
    shutil.copytree(reference / "h200" / "calibrated" / "llama-3.1-8b", folder)
    for name in ("corun.csv", "tuning.csv"):
        (folder / name).unlink()
    found = HardwareModel.of({}, SHAPE, parse_testbed("h200x1"), None, tmp_path)
    assert found.tuning is None
    assert isinstance(found.interference, AnalyticInterference)
    assert found.sources == ("calibrated on h200",)
    assert not found.whole_steps


def test_limits_that_were_not_measured_are_analytic(tmp_path: Path) -> None:
    (tmp_path / "corun.csv").write_text(CORUN)
    found = Measured(read_interference(tmp_path / "corun.csv"))
    decode, analytic = Load("decode", 32, Tenant(0.1, 0.9, 2e-5)), AnalyticInterference()
    full, capped = (Load("forward", 500, Tenant(0.9, 0.3, 7e-5, sm_limit=limit)) for limit in (1.0, 0.3))
    assert found.slowdowns(decode, full).serving == pytest.approx(2.0)
    assert found.slowdowns(decode, capped) == analytic.slowdowns(decode, capped)


def test_two_gpus_whose_all_reduces_were_measured_are_simulated_with_those(tmp_path: Path) -> None:
    from systems.common.calibrate.all_reduce import table

    def found(**parameters: object) -> HardwareModel:
        return HardwareModel.of(parameters, SHAPE, parse_testbed("h200x2"), None, tmp_path)

    without = found()
    path = tmp_path / "h200" / "calibrated" / "all_reduce.csv"
    path.parent.mkdir(parents=True)
    path.write_text(table(2, {"8192": 12e-6, "1048576": 40e-6}))
    priced = found().cost.costs
    assert priced.all_reduce_s(8192) == pytest.approx(12e-6) and priced.all_reduce_s(528384) == pytest.approx(26e-6)
    assert "all-reduces measured" in priced.source
    assert found(hardware_model="roofline").cost.costs.source == without.cost.costs.source
    path.write_text(table(4, {"8192": 12e-6}))
    with pytest.raises(InputError, match="num_workers"):
        found()


# ---- ways to share the GPU

CORUN = """serving_phase,tuning_phase,serving_size,tuning_tokens,sm_limit,serving_slowdown,tuning_slowdown,way
decode,forward,32,500,1.0,2.0,1.5,streams
decode,backward,32,500,1.0,2.0,1.5,streams
prefill,forward,512,500,1.0,1.3,2.0,streams
prefill,backward,512,500,1.0,1.3,2.0,streams
"""


@pytest.fixture
def ways(reference: Path, tmp_path: Path) -> Path:
    """A table in which MPS at 30 and 100 % and green contexts of half the SMs were measured too."""
    lines = []
    for way, limit, serving, tuning in (("mps", 0.3, 1.2, 4.0), ("mps", 1.0, 3.0, 1.5), ("green", 0.5, 1.1, 2.5)):
        for phase in ("forward", "backward"):
            lines += [f"{kind},{phase},32,512,{limit},{serving},{tuning},{way}" for kind in ("decode", "prefill")]
            lines.append(f"idle,{phase},0,512,{limit},1.0,{1 / limit},{way}")
    path = tmp_path / "corun.csv"
    path.write_text(CORUN + "\n".join(lines) + "\n")
    return path


def with_table(corun: Path, policy: str = "llmstation", **more: object) -> dict[str, float]:
    told = trial(policy, **more)
    return dict(colocation(Trial(**{**asdict(told), "datasets": {"corun_slowdowns": corun}})).metrics)  # type: ignore[arg-type]


def test_mps_is_simulated_with_what_was_measured_under_mps(ways: Path) -> None:
    alone = with_table(ways, "inference_only", rate_rps=2)
    few = with_table(ways, "mps", thread_percentage=30, rate_rps=2)
    assert few["tpot_p50_s"] == pytest.approx(1.2 * alone["tpot_p50_s"], rel=0.03), "too few requests to slow each other"
    few, some, all_ = (with_table(ways, "mps", thread_percentage=percentage) for percentage in (30, 65, 100))
    assert few["tpot_p50_s"] < some["tpot_p50_s"] < all_["tpot_p50_s"]
    assert few["peft_samples_per_s"] < some["peft_samples_per_s"]
    chunked = with_table(ways, "chunked", chunk_tokens=512)
    assert chunked["tpot_p50_s"] == pytest.approx(all_["tpot_p50_s"], rel=1e-6), "chunks are trained under MPS without a limit"


def test_green_contexts_spare_serving_and_slow_tuning(ways: Path) -> None:
    free, half = with_table(ways, **WAITS), with_table(ways, tuning_sms=66, **WAITS)
    assert half["tpot_p50_s"] < 0.8 * free["tpot_p50_s"]
    alone = with_table(ways, "inference_only")
    assert 1.0 < half["tpot_p50_s"] / alone["tpot_p50_s"] < 1.15
    planned = with_table(ways, tuning_sms=66)
    assert planned["peft_samples_per_s"] < with_table(ways)["peft_samples_per_s"]
    bench = Bench.of(trial(tuning_sms=66))
    assert {phase.tenant.sm_limit for phase in bench.shared_job().phases} == {0.5}
    assert bench.shared_job().pass_s == Bench.of(trial()).shared_job().pass_s, "prices are those of all SMs"


def test_an_idle_gpu_gives_a_limited_tuner_its_share_alone(ways: Path) -> None:
    from systems.llmstation.simulated import limited

    table, bench = Measured(read_interference(ways)), Bench.of(trial("mps"))
    job = bench.sharded_job(512, 0.3)
    assert limited(table, job) == pytest.approx(1 / 0.3)
    assert limited(table, bench.shared_job()) == 1.0
    by_tenant = sum(phase.seconds * phase.tenant.limited_slowdown for phase in job.phases) / job.pass_s
    assert limited(AnalyticInterference(), job) == pytest.approx(by_tenant)


@pytest.mark.parametrize("sms", [-1, 133, 66.0, "many"])
def test_sms_that_there_are_none_of_are_refused(sms: object) -> None:
    with pytest.raises(InputError, match="tuning_sms"):
        colocation(trial(tuning_sms=sms))


# ---- tasklets


def test_tasklets_take_what_they_took(reference: Path) -> None:
    """28.1 ms a sample of 512 tokens (benchmarks/training.json, `1 x 512 graphs`); its tasklets add up to about that."""
    bench = Bench.of(trial(tuning_tokens=512))
    told = json.loads((reference / "h200" / "benchmarks" / "training.json").read_text())["step"]["1 x 512 graphs"]
    assert bench.shared_job().pass_s == pytest.approx(told["ms"] * 1e-3, rel=0.05), "another session's calibration may differ"
    table = read_tuning(reference / "h200" / "calibrated" / "llama-3.1-8b" / "tuning.csv")
    assert bench.shared_job().phases[0].tasklet_s == pytest.approx(table.times_s["forward"][512])
    # the grain of the measured co-run benchmark, of 500 tokens: 0.372 and 0.450 ms
    shorter = Bench.of(trial()).shared_job()
    assert shorter.phases[0].tasklet_s == pytest.approx(0.372e-3, rel=0.05)
    assert bench.sharded_job(512, 1.0).pass_s > bench.shared_job().pass_s * 1.2, "activation checkpointing"


def test_fused_steps_are_priced_as_they_were_measured(reference: Path) -> None:
    """Not fitted: `benchmarks/training.py` timed a fused graph, the simulator adds what it knows of both halves (8 % low)."""
    told = json.loads((reference / "h200" / "benchmarks" / "training.json").read_text())["fused"]
    bench = Bench.of(trial(tuning_tokens=512))
    from systems.llmstation.experiments import POLICIES
    from systems.llmstation.latency_source import Situation
    from systems.llmstation.simulated import FUSED, PlannedTuning

    executor, _ = POLICIES["llmstation"](bench)
    assert isinstance(executor, PlannedTuning)
    for rows in (32, 64):
        latencies = executor._latencies(Situation(rows, rows * 512, 512, FUSED))
        measured_s = told[f"{rows} rows, 512 tokens"]["fused graph"]["ms"] * 1e-3
        assert latencies.decode_s * SHAPE.layers == pytest.approx(measured_s, rel=0.12)


def test_the_benchmark_of_training_gives_a_table_too(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuning.csv"
    command = ["--training", str(reference / "h200" / "benchmarks" / "training.json"), "--out", str(out)]
    assert tuning_table.main(command) == 0
    assert read_tuning(out).times_s["forward"] == {512: pytest.approx(377.92e-6), 1024: pytest.approx(719.584e-6)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("phase,tokens\nforward,512\n", "time_us"),
        ("phase,tokens,time_us\nsideways,512,1\n", "sideways"),
        ("phase,tokens,time_us\nforward,512,0\n", "above 0"),
        ("phase,tokens,time_us\nforward,512,1\n", "backward"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tuning.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_tuning(path)


@pytest.mark.parametrize("text", ["", "{}", '{"step": {}}', '{"step": {"1 x 512 graphs": {"error": "x"}}}'])
def test_a_benchmark_without_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "training.json"
    path.write_text(text)
    assert tuning_table.main(["--training", str(path), "--out", str(tmp_path / "tuning.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "tuning.csv").exists()


# ---- the driver


def test_a_driver_that_gets_few_tasklets_beside_a_step_tunes_less() -> None:
    free, three = metrics(fused="off"), metrics(fused="off", most_beside=3)
    assert three["peft_samples_per_s"] < 0.6 * free["peft_samples_per_s"]
    assert three["tpot_mean_s"] < free["tpot_mean_s"]
    early = metrics(fused="off", most_beside=3, forms_early=True)
    assert early["ttft_p50_s"] > three["ttft_p50_s"] * 1.05, "a prompt that comes early in a step waits for the next one too"
    assert early["tpot_mean_s"] == pytest.approx(three["tpot_mean_s"], rel=0.02)


def test_whole_forward_phases_are_fused_once_the_target_allows_it() -> None:
    tight = metrics(decode_target_s=0.01)["peft_samples_per_s"]
    assert tight == metrics(decode_target_s=0.01, fused="off")["peft_samples_per_s"]
    assert (
        metrics(decode_target_s=0.03)["peft_samples_per_s"]
        > 1.05 * metrics(decode_target_s=0.03, fused="off")["peft_samples_per_s"]
    )


def test_a_pause_needs_an_iteration_since_the_tasklet_before() -> None:
    """Sheet 2.3: a worker yields only where a message came since the last boundary. Iterations long: few."""
    bench = Bench.of(trial(**WAITS))
    job = bench.shared_job()

    class Harmless:
        source = "none"

        def slowdowns(self, serving: Load, tuning: Load):
            from systems.common.hardware.interference import Slowdowns

            return Slowdowns(1.0, 1.0)

        def alone(self, tuning: Load) -> float:
            return 1.0

    from systems.llmstation.modes import FixedMode

    executor = SteadyTuning(bench.cost, bench.layers, job, Harmless(), FixedMode(1, 0.01, 1, 0.01))
    load = Load("decode", 8, Tenant(0.1, 0.5, 1e-5))
    longest = max(phase.tasklet_s for phase in job.phases)
    _, rare = executor._shared(("a", 8, 8), load, 1.0)
    _, often = executor._shared(("b", 8, 8), load, longest / 100)
    pauses = sum(phase.tasklets * 0.01 * phase.tasklet_s for phase in job.phases)
    assert rare == pytest.approx(job.pass_s + pauses)
    assert often == pytest.approx(job.pass_s + 0.01 * sum(phase.tasklets for phase in job.phases))


# ---- judged


def test_recorded_runs_are_simulated_again(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    measured = reference / "h200" / "colocation" / "llama-3.1-8b"
    command = ["compare", "--measured", str(measured), "--model", "llama-3.1-8b", "--hardware", "h200x1", "--out", str(out)]
    assert colocation_fidelity.main(command) == 0
    rows = list(csv.DictReader(out.open()))
    runs = {run.name: run for run in colocation_fidelity.read_runs(measured / "poisson18")}
    assert {row["workload"] for row in rows} == set(runs)
    assert len(runs) == 8
    for row in rows:
        simulated, real = float(row["simulated"]), float(row["measured"])
        assert float(row["error"]) == pytest.approx((simulated - real) / real)
    cells = {(r["workload"], r["hardware_model"], r["metric"], r["statistic"]): float(r["error"]) for r in rows}
    # the planner's own numbers are what calibration and driver limits were meant to explain: held to it
    for planner in ("planner 10 ms", "planner 20 ms"):
        assert abs(cells[planner, "calibrated", "tpot", "p50"]) < 0.03
        assert abs(cells[planner, "calibrated", "peft", "rate"]) < 0.1
    assert abs(cells["inference only", "calibrated", "tpot", "p50"]) < 0.03


def test_what_a_simulated_benchmark_recorded_has_no_error(tmp_path: Path) -> None:
    told = colocation_fidelity.SERVED | {"rate_rps": 6.0, "seconds": 4.0}
    asked = {"policy": "fineinfer", "rate_rps": 6.0, "defer_s": 0.1}
    parameters = {"model": "llama-3.1-8b", "workload": told, "kv_blocks": 8000, **asked}
    datasets = {"sharegpt_lengths": None}
    outcome = colocation(Trial("llmstation", "colocation", parameters, "h200x1", "simulated", 0, datasets))
    benchmark = tmp_path / "llmstation.json"
    runs = [
        {**asked, "metrics": dict(outcome.metrics), "notes": []},
        {"policy": "mps", "rate_rps": 6.0, "left_out": "no time left"},
    ]
    benchmark.write_text(json.dumps({"policies": runs}))
    folder = tmp_path / "measured" / "poisson6"
    record = ["record", "--benchmark", str(benchmark), "--out", str(folder), "--driver", '{"most_beside": 3}']
    assert colocation_fidelity.main([*record, "--seconds", "4"]) == 0
    (run,) = colocation_fidelity.read_runs(folder)
    assert run.driver == {}, "no planner, so nothing that concerns it"
    rows = [
        row
        for row in colocation_fidelity.table(folder.parent, "llama-3.1-8b", "h200x1")
        if row["hardware_model"] == "calibrated"
    ]
    assert max(abs(row["error"]) for row in rows) < 1e-3  # arrivals are rounded to a microsecond
    assert colocation_fidelity.main([*record, "--seconds", "9"]) == 2, "not the workload that was served"
