"""dLoRA's experiments: baselines, prices, what a trial gives, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.common.hardware import parse_testbed
from systems.common.models import model
from systems.dlora.baselines.peft import PeftCosts
from systems.dlora.baselines.slora import SloraCosts
from systems.dlora.baselines.whole_model import LruSlots, WholeModelCosts
from systems.dlora.bench import Bench
from systems.dlora.costs import ArtifactCosts, Iteration, artifact_costs, modelled_costs
from systems.dlora.experiments import EXPERIMENTS, MEASURES, longer, serving, slo_rate, workload_of
from systems.dlora.published import MAF1_BINS
from systems.dlora.sizes import adapted_bytes, adapter_bytes, adapter_parameters, kv_block_bytes

LLAMA = model("llama-2-7b")
DATA = {"azure_functions_2021": None, "azure_functions_2019": None, "sharegpt_turns": None}
WORKLOAD = {
    "arrivals": "functions", "trace": "azure_functions_2021", "window_hours": 2, "lengths": "sharegpt_turns",
    "lengths_filter": "vllm-sharegpt",
}  # fmt: skip


def trial(hardware="a100-80x1", **parameters):
    told = {"workload": WORKLOAD, "adapters": 8, "rate_rps": 3.0, "requests": 60, **parameters}
    return Trial("dlora", "serving", told, hardware, datasets=DATA)


# ---- sizes, as the artifact has them


def test_sizes_of_llama_2_7b():
    assert adapter_parameters(LLAMA) == 50_462_720
    assert adapter_bytes(LLAMA) == 100_925_440
    assert kv_block_bytes(LLAMA) == 8 * 2**20
    assert adapted_bytes(LLAMA) == pytest.approx(12.95e9, rel=0.001)


# ---- prices


def test_the_artifacts_constants():
    costs = ArtifactCosts(LLAMA)
    assert costs.run(Iteration(True, (), 16, 4000)).first_s == 0.015
    assert costs.run(Iteration(False, (), 16, 4000)).first_s == 0.027
    assert costs.run(Iteration(False, (100,), 3, 0)).first_s == pytest.approx(0.027 + 100 * 1.8e-4)
    assert costs.load_s(1) == pytest.approx(0.00294, rel=0.01)
    assert (costs.rules.merged_s, costs.rules.unmerged_s, costs.rules.switch_s) == (0.015, 0.027, 0.020)
    bigger = artifact_costs(model("llama-2-13b"), LLAMA)
    assert bigger.run(Iteration(True, (), 1, 1)).first_s == pytest.approx(0.015 * 1.93, rel=0.01)
    assert "scaled" in bigger.source and "scaled" not in costs.source


def test_the_modelled_branch_grows_as_its_back_end_says():
    einsum, gather = (modelled_costs(LLAMA, parse_testbed("a100-80"), back_end=name) for name in ("einsum", "gather"))

    def extra(costs, resident, distinct):
        shape = (), 16, 6400
        return costs.run(Iteration(False, *shape, resident, distinct)).first_s - costs.run(Iteration(True, *shape)).first_s

    assert extra(einsum, 128, 1) > 2 * extra(einsum, 8, 1) > 0  # resident ones count
    assert extra(gather, 128, 2) == extra(gather, 8, 2)  # only those in the batch
    assert extra(gather, 8, 8) > extra(gather, 8, 1)
    assert einsum.switch_s() == pytest.approx(2 * 12.95e9 / (0.8 * 2.039e12), rel=0.01)
    rules = einsum.rules
    assert rules.merged_s < rules.unmerged_s
    with pytest.raises(InputError, match="back_end"):
        modelled_costs(LLAMA, parse_testbed("a100-80"), back_end="magic")


def test_baseline_prices():
    base, step = ArtifactCosts(LLAMA), Iteration(False, (), 16, 4000)
    vllm, kinder = WholeModelCosts(base, 13.5e9), WholeModelCosts(base, 13.5e9, kinder=True)
    assert vllm.run(step).first_s == 0.015 and vllm.switch_s() == 0
    assert vllm.load_s(1) == pytest.approx(4.5) and kinder.load_s(1) < 1
    assert PeftCosts(base).run(step).first_s == pytest.approx(0.015 + 0.012 * 7 / 4)
    assert SloraCosts(base).run(step).first_s == pytest.approx(0.015 + 0.006)
    for costs in (vllm, PeftCosts(base), SloraCosts(base)):
        assert costs.swap_s(10) == base.swap_s(10) and costs.rules == base.rules and "assumed" in costs.source


def test_whole_models_leave_by_lru_whoever_waits():
    slots = LruSlots(2, [0, 1])
    slots.take([0], {})
    assert slots.take([2], {0: 0, 1: 99}) == [2]
    assert set(slots.resident) == {0, 2}


# ---- trials


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"policy": "fcfs"},
        {"policy": "merge"},
        {"system": "vllm"},
        {"system": "vllm", "kinder": True},
        {"system": "peft"},
        {"system": "peft", "kinder": True},
        {"system": "slora"},
        {"system": "slora", "kinder": True},
        {"source": "modelled"},
        {"source": "modelled", "back_end": "gather"},
        {"source": "modelled", "system": "slora"},
        {"credit_scale": 2.0, "slots": 2},
        {"replicas": 2, "hardware": "a100-80x2", "migration": "round_robin"},
        {"replicas": 2, "hardware": "a100-80x2", "migration": "proactive"},
        {"replicas": 2, "hardware": "a100-80x2", "scope": "cluster", "copy_kv": True, "interval_s": 1.0, "load_excess": 2.0},
        {"model": "llama-2-70b", "tp": 4, "replicas": 1, "hardware": "a100-80x4"},
    ],
    ids=str,
)
def test_every_system_serves(parameters):
    outcome = serving(trial(**parameters))
    assert tuple(outcome.metrics) == MEASURES
    assert all(np.isfinite(value) for value in outcome.metrics.values())
    assert len(outcome.requests["finish_s"]) == 60
    assert outcome.notes
    again = serving(trial(**parameters))
    assert (again.metrics, again.requests) == (outcome.metrics, outcome.requests)


def test_dlora_is_the_fastest_under_load():
    latency = {
        name: serving(trial(rate_rps=6.0, requests=200, map_stride=4, **told)).metrics["latency_s_per_token"]
        for name, told in (
            ("dlora", {}),
            ("fcfs", {"policy": "fcfs"}),
            ("merge", {"policy": "merge"}),
            ("peft", {"system": "peft"}),
        )
    }
    assert min(latency, key=latency.get) == "dlora"
    assert latency["peft"] > latency["fcfs"]


def test_kinder_baselines_are_no_slower():
    for system in ("vllm", "peft"):
        strict, kinder = (serving(trial(system=system, kinder=kind, requests=150)) for kind in (False, True))
        assert kinder.metrics["throughput_rps"] > strict.metrics["throughput_rps"]


def test_rates_that_were_not_run_are_left_out():
    outcome = serving(trial(rates_rps=[1, 2], rate_rps=3))
    assert set(outcome.metrics.values()) == {None} and tuple(outcome.metrics) == MEASURES


def test_seeds_are_averaged():
    one, other = (serving(trial(seeds=1)), serving(trial(seeds=2)))
    assert one.metrics != other.metrics
    assert any("2 workloads" in note for note in other.notes)


def test_requests_follow_the_rate_and_answers_the_ratio():
    made = workload_of(trial(requests_per_rps=50, rate_rps=4.0), 0)
    assert len(made) == 200
    double = longer(made, 2.0)
    assert (double.input_tokens == made.input_tokens).all()
    whole = np.minimum(2 * (made.input_tokens + made.output_tokens), 4096)
    assert double.output_tokens.sum() == pytest.approx(
        (whole * made.output_tokens / (made.input_tokens + made.output_tokens)).sum(), rel=0.01
    )
    assert (longer(made, 100.0).input_tokens + longer(made, 100.0).output_tokens).max() <= 4096
    with pytest.raises(InputError, match="length_ratio"):
        longer(made, 0.5)


def test_the_rate_at_the_limit_lies_on_the_curve():
    told = {"requests": 300, "policy": "fcfs", "curve_rps": [1, 2, 4, 8]}
    outcome = slo_rate(trial(**told))
    assert 1 < outcome.metrics["slo_rate_rps"] < 8 and outcome.metrics["beyond"] is False
    idle = slo_rate(trial(**{**told, "curve_rps": [0.1]}))
    assert idle.metrics == {"slo_rate_rps": 0.1, "beyond": True}


def test_queueing_per_replica_and_overhead():
    told = {"system": "vllm", "replicas": 2, "hardware": "a100-80x2"}
    one = EXPERIMENTS["queueing_share"](trial(replica=1, **told)).metrics
    other = EXPERIMENTS["queueing_share"](trial(replica=2, **told)).metrics
    assert one["requests"] + other["requests"] == 60
    assert one["highest_pct"] == max(one["queueing_pct"], other["queueing_pct"])
    shares = [
        EXPERIMENTS["overhead"](trial(share=share)).metrics["share_pct"] for share in ("solver", "switching", "inference")
    ]
    assert sum(shares) == pytest.approx(100)


def test_figures_of_published_numbers():
    bins = [EXPERIMENTS["load_profile"](trial("anyx1", bin=b, day=d)).metrics for d in (1, 2, 3) for b in (0, 35)]
    assert bins[0]["relative_load"] == MAF1_BINS[0] / max(MAF1_BINS)
    assert [round(found["correlation_next_day"], 2) for found in bins[::2]] == [0.92, 0.85, 0.78]
    assert round(bins[0]["minimum"], 2) == 0.68 and len(MAF1_BINS) == 108
    base, lora = (EXPERIMENTS["branch_cost"](trial(batch=8, product=p)).metrics["product_us"] for p in ("base", "lora"))
    assert lora < base
    for wrong in ({"bin": 36, "day": 1}, {"bin": 0, "day": 0}):
        with pytest.raises(InputError):
            EXPERIMENTS["load_profile"](trial(**wrong))
    with pytest.raises(InputError, match="product"):
        EXPERIMENTS["branch_cost"](trial(batch=8, product="both"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"system": "vllm2"}, "system"),
        ({"policy": "lifo"}, "policy"),
        ({"source": "guess"}, "source"),
        ({"migration": "never"}, "migration"),
        ({"scope": "moon"}, "scope"),
        ({"model": "llama"}, "model"),
        ({"replicas": 2}, "replicas"),
        ({"replicas": 0}, "replicas"),
        ({"adapters": 0}, "adapters"),
        ({"adapters": 700}, "adapters"),
        ({"batch": 0}, "batch"),
        ({"slots": 0}, "slots"),
        ({"credit_scale": 0}, "scale"),
        ({"credit_scale": "much"}, "credit_scale"),
        ({"model": "llama-2-70b"}, "model"),
        ({"workload": None}, "workload"),
        ({"workload": {**WORKLOAD, "trace": "azure_conv"}}, "trace"),
        ({"requests": 1}, "requests"),
        ({"rate_rps": 0}, "rate_rps"),
        ({"kv_blocks": 3}, "input_tokens + output_tokens"),
        ({"length_ratio": 0.1}, "length_ratio"),
        ({"workload": {"arrivals": "poisson", "lengths": "sharegpt_turns"}, "adapters": None}, "adapters"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(change, key):
    with pytest.raises(InputError) as caught:
        serving(trial(**change))
    assert caught.value.key == key and "\n" not in str(caught.value)


def test_bad_curves_replicas_and_shares():
    with pytest.raises(InputError, match="curve_rps"):
        slo_rate(trial())
    with pytest.raises(InputError, match="replica"):
        EXPERIMENTS["queueing_share"](trial())
    with pytest.raises(InputError, match="share"):
        EXPERIMENTS["overhead"](trial(share="rest"))


def test_the_seed_decides_where_the_extra_copy_lies():
    hosts = [Bench.of(trial("a100-80x8", replicas=8, adapters=32)).hosts() for _ in range(2)]
    assert hosts[0] == hosts[1] and sum(map(len, hosts[0])) == 39


def test_serving_loads_no_solver_and_no_torch(root):
    code = (
        "import sys, json; from systems.common.core import Trial; from systems.dlora.experiments import serving;"
        f"told = json.loads('''{json.dumps(dict(trial().parameters))}''');"
        f"serving(Trial('dlora', 'serving', told, 'a100-80x1', datasets={DATA}));"
        "print([m for m in ('scipy', 'torch', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
