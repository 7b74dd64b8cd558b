"""The simulator against live runs: the benchmark's own loop on a clock of ours, priced by a law, must be predicted exactly."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from systems.common.errors import InputError
from systems.dlora import fidelity
from systems.dlora.costs import Iteration
from systems.dlora.measured import MeasuredCosts
from systems.dlora.policies.credit import CreditRules

RULES = CreditRules(0.004, 0.006, 0.01)


def law_s(merged: bool, rows: int, context: int, adapters: int, tokens: int, prompts: int) -> float:
    """Seconds of an iteration: straight in everything that the fidelity tool takes for straight."""
    seconds = 0.004 + 1e-4 * rows + 2e-7 * context
    if not tokens:
        return seconds + (0.0 if merged else 0.001 + 1e-4 * (adapters - 1))
    return seconds + (0.0 if merged else 0.002) + 5e-5 * tokens + 3e-4 * (prompts - 1)


def table() -> dict:
    """What the benchmark would write for `law_s`."""
    decode, prompts = [], []
    for merged in (True, False):
        for rows in (1, 4, 16):
            for context in (100 * rows, 900 * rows):
                for adapters in (1, 4) if not merged and rows > 1 else (1,):
                    ms = 1e3 * law_s(merged, rows, context, adapters, 0, 0)
                    decode.append({"merged": merged, "rows": rows, "context": context, "adapters": adapters, "ms": ms})
        for rows, count in [(0, 1), (1, 1), (12, 1), (0, 4)]:
            for tokens in (32, 512, 1024):
                ms = 1e3 * law_s(merged, rows, 100 * rows, 1, tokens, count)
                one = {"merged": merged, "rows": rows, "context": 100 * rows, "tokens": tokens, "prompts": count, "adapters": 1}
                prompts.append({**one, "ms": ms})
    return {"decode": decode, "prompts": prompts, "changes": {"a_to_b_ms": 9.0, "other_rows_ms": 0.1}}


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_decode_prices_are_the_measured_ones_and_straight_in_between(merged, rows):
    costs = MeasuredCosts(table(), RULES)
    adapters = 1 if merged else 3
    run = costs.run(Iteration(merged, (), rows, 500 * rows, 8, adapters))
    if rows > 1:
        assert run.first_s == pytest.approx(law_s(merged, rows, 500 * rows, adapters, 0, 0), rel=0.02)
    assert run.increment_s == pytest.approx(2e-7 * rows)


@pytest.mark.parametrize(("rows", "chunks"), [(0, (200,)), (7, (64,)), (15, (300, 200)), (3, (50, 60, 70)), (0, (1024, 1024))])
def test_batches_with_prompts_are_priced_by_tokens_rows_and_prompts(rows, chunks):
    costs = MeasuredCosts(table(), RULES)
    run = costs.run(Iteration(True, chunks, rows, 200 * rows, 8, 1))
    expected = law_s(True, rows, 200 * rows, 1, sum(chunks), len(chunks))
    assert run.first_s == pytest.approx(expected, rel=0.01)


def test_a_table_that_lacks_something_is_refused_in_one_line():
    broken = table()
    del broken["changes"]
    with pytest.raises(InputError, match="changes"):
        MeasuredCosts(broken, RULES, "file.json")
    for report in ({}, {"iterations": table()}, {"iterations": {"error": "x"}, "heldout": {}}):
        with pytest.raises(InputError, match="dlora_gpu"):
            fidelity.predict(report)


def test_the_slo_rate_is_read_off_the_curve():
    assert fidelity._crossing([(1.0, 0.01), (2.0, 0.03), (3.0, 0.5)], 0.02) == pytest.approx(1.5)
    assert fidelity._crossing([(1.0, 0.01), (2.0, 0.015)], 0.02) is None


# ---- the benchmark's loop on our clock


@dataclass
class Clock:
    """Time that passes only where somebody says so."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 1e-9  # as a real clock: past it, whatever rounding does


@dataclass
class LawfulRunner:
    """In place of the engine: iterations take what `law_s` says, other merged weights 9 ms, other rows 0.1 ms."""

    clock: Clock
    bank: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(capacity=16, shape=SimpleNamespace(vocab=100)))
    requests: dict[int, list] = field(default_factory=dict)
    switches: int = 0
    held: str | None = None
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.store = SimpleNamespace(
            residents=SimpleNamespace(outstanding={f"a{i}": 0 for i in range(16)}), fetch=lambda _: None, loads=0
        )
        self.scheme = SimpleNamespace(passes=0)

    def admit(self, index, prompt, adapter, *_) -> None:
        self.requests[index] = [len(prompt), adapter]

    def finish(self, index) -> None:
        del self.requests[index]

    def prefetch(self, names) -> None:
        pass

    def launch(self, prefill, decode, merged=None, *_):
        context = sum(self.requests[i][0] for i in decode)
        adapters = len({self.requests[i][1] for i in [*prefill, *decode]})
        tokens = sum(self.requests[i][0] for i in prefill)
        if merged is not None and merged != self.held:
            self.held, self.scheme.passes = merged, self.scheme.passes + 1
            self.clock.now_s += 0.009
        elif not prefill and tuple(decode) != self.rows:
            self.clock.now_s += 0.0001
        self.rows = tuple(decode)
        self.clock.now_s += law_s(merged is not None, len(decode), context, adapters, tokens, len(prefill))
        for i in decode:
            self.requests[i][0] += 1
        return SimpleNamespace(read=lambda: dict.fromkeys([*prefill, *decode], 0))


@pytest.fixture
def lawful(monkeypatch):
    """The benchmark's serving parts, and a runner for them, on a clock of ours."""
    pytest.importorskip("torch")
    from benchmarks import dlora_serving
    from systems.dlora.lora_engine.constants import Constants

    clock = Clock()
    monkeypatch.setattr(dlora_serving, "CLOCK", clock)
    monkeypatch.setattr(dlora_serving, "SLEEP", clock.sleep)
    monkeypatch.setattr(dlora_serving, "measured", lambda _: Constants(0.0061, 0.0079, 0.009, 0.0, 16, 8))
    monkeypatch.setattr(dlora_serving, "WINDOW_S", 0.3)
    monkeypatch.setattr(dlora_serving, "PROMPTS", (4, 8, 16, 32, 60, 120, 240))
    return dlora_serving, LawfulRunner(clock)


def test_parts_that_serve_run_every_policy_and_say_what_they_leave_out(lawful):
    dlora_serving, runner = lawful
    found = dlora_serving.policies(runner, 1e6)
    points = found["points"]
    assert [(p["traffic"], p["policy"]) for p in points] == [
        (t, p) for t in ("even", "halving") for p in dlora_serving.POLICIES
    ]
    assert all("error" not in p and p["requests"] == 24 and p["throughput_rps"] > 0 for p in points)
    assert all(sum(kind["iterations"] for kind in p["kinds"].values()) == p["iterations"] for p in points)
    assert points[3]["top_share"] > points[0]["top_share"]
    assert {p["adapters"] for p in dlora_serving.adapters(runner, 1e6)["points"]} == {8, 16}
    late = dlora_serving.policies(runner, -1.0)
    assert not late["points"] and len(late["left_out"]) == 6
    assert not runner.requests


def test_held_out_runs_on_a_lawful_machine_are_predicted(lawful, tmp_path, capsys):
    dlora_serving, runner = lawful
    iterations = dlora_serving.iterations(runner)
    held = dlora_serving.heldout(runner, 1e6)
    assert not held["left_out"] and not runner.requests
    found = fidelity.predict({"iterations": iterations, "heldout": held})
    assert len(found) == 9
    assert {p.measured.passes > 0 for p in found if p.policy == "merge"} == {True}
    for p in found:  # where a decision hangs on who came first, a microsecond can change it, and what follows
        for name in ("mean_s_per_token", "p90_s_per_token", "ended_s"):
            assert abs(p.error_percent(name)) < (1.5 if p.policy == "fcfs" else 12), (p, name)
        assert abs(p.error_percent("within_slo")) < 5
    assert sum(abs(p.error_percent("mean_s_per_token")) for p in found) / len(found) < 3
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"iterations": iterations, "heldout": held}))
    assert fidelity.main(["--measured", str(path), "--out", str(tmp_path / "out.json")]) == 0
    assert "credit: SLO rate" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())) == 9


def test_a_file_that_is_none_is_refused_with_code_2(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("[]")
    for path in (tmp_path / "bad.json", tmp_path / "none.json"):
        assert fidelity.main(["--measured", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
