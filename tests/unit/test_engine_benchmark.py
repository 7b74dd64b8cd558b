"""benchmarks/engine.py: ratios of what both measured, and the parts that need no GPU on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks import engine  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import ATTENTION_SITES, random_adapter  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402

OURS: dict[str, Any] = {
    "engine": {"1": {"ms": 4.0}, "32": {"ms": 5.0}, "256": {"ms": 12.0}},
    "prefill": {"512": {"ms": 12.0}},
    "offline": {"output_tokens_per_s": 15000.0},
    "open": {"ttft_p50_s": 0.02, "ttft_p99_s": 0.06, "tpot_mean_s": 0.009, "tpot_p99_s": 0.01},
    "lora": {"32, served": {"ms": 6.0, "ratio": 1.2}},
}
PEER: dict[str, Any] = {
    "decode": {"1": {"ms": 5.0}, "32": {"ms": 4.0}, "128": {"ms": 8.0}},
    "prefill": {"512": {"ms": 10.0}, "2048": {"ms": 50.0}},
    "offline": {"output_tokens_per_s": 10000.0},
    "open": {"ttft_p50_s": 0.04, "ttft_p99_s": 0.05, "tpot_mean_s": 0.0090, "tpot_p99_s": 0.02},
    "lora": {"none": {"ms": 4.8}, "32": {"ms": 7.5}, "ratio": 1.5},
}


def test_ratios_of_what_both_measured() -> None:
    """Ours over vLLM's, part by part."""
    assert engine.compare(OURS, PEER) == pytest.approx(
        {
            "decode 1": 0.8,
            "decode 32": 1.25,
            "prefill 512": 1.2,
            "offline output_tokens_per_s": 1.5,
            "open ttft_p50_s": 0.5,
            "open ttft_p99_s": 1.2,
            "open tpot_mean_s": 1.0,
            "open tpot_p99_s": 0.5,
            "lora": 0.8,
            "lora step": 0.8,
            "lora step, over none of vLLM's": 1.5,  # 4.0 ms: the faster of its engines
        }
    )


@pytest.mark.parametrize("lacking", sorted(PEER))
def test_a_part_that_vllm_lacks(lacking: str) -> None:
    """A file of a run that broke off is still compared with."""
    found = engine.compare(OURS, {name: part for name, part in PEER.items() if name != lacking})
    assert found and not any(name.split()[0] == lacking for name in found)


def test_every_part_has_a_bound() -> None:
    """`--limit-s` knows what each part takes."""
    assert set(engine.COSTS_S) == set(engine.PARTS)


@pytest.fixture(scope="module")
def bench() -> engine.Bench:
    """A tiny model on the CPU, with adapters."""
    made = engine.Bench.__new__(engine.Bench)
    made.shape, made.seed = model("tiny"), 0
    made.weights = random_weights(made.shape, 0, "cpu")
    config = EngineConfig(3000, max_num_batched_tokens=2048, max_num_seqs=16)
    made.live = Live.build(made.shape, made.weights, config, max_tokens=1024, graphs=False, adapters=(2, 16, ATTENTION_SITES))
    bank = made.live.executor.adapters
    assert bank is not None
    for i in range(2):
        bank.load(f"a{i}", random_adapter(made.shape, 16, i))
    return made


def test_served_steps(bench: engine.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many periods as asked for, with and without adapters, and host work within them."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for adapters in (0, 2):
        timed, host_ms = bench.served(2, adapters, steps=12)
        assert timed["runs"] == 8 and 0 < timed["low_ms"] <= timed["ms"] <= timed["high_ms"] and host_ms > 0


def test_open_loop(bench: engine.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrivals of the span at the rate that is told, or at 70 % of its own saturation."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    workload: list[list[float]] = [[i * 0.5, 20, 5] for i in range(70)]
    told = bench.open(workload, 40.0, 0.5)
    assert told["requests"] == 40 and told["rate_rps"] == 40.0 and "saturation_rps" not in told
    assert 0 < told["ttft_p50_s"] <= told["ttft_p99_s"] and told["preemptions"] == 0
    own = bench.open(workload, None, 0.1)
    assert own["rate_rps"] == pytest.approx(0.7 * own["saturation_rps"])
