"""A replica's loop over dLoRA's engine, on a CPU: what it is told between iterations, and what it reports."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.serve.loading import Given  # noqa: E402
from systems.common.serve.messages import Abort, Done, Job, LoadAdapter, Progress, Stop, UnloadAdapter  # noqa: E402
from systems.common.torch_engine import executor  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import MODULES, merge, random_adapter  # noqa: E402
from systems.common.torch_engine.numerics import numerics  # noqa: E402
from systems.common.torch_engine.sampling import Sampling  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402
from systems.dlora.lora_engine.bank import SlotBank  # noqa: E402
from systems.dlora.lora_engine.runner import LoraRunner  # noqa: E402
from systems.dlora.lora_engine.switching import layer_bytes  # noqa: E402
from systems.dlora.policies.credit import Credit, CreditRules  # noqa: E402
from systems.dlora.policies.static import Fcfs, Merge, OneAdapter  # noqa: E402
from systems.dlora.replica import engine_config  # noqa: E402
from systems.dlora.serving.engine import Unmerged, bank_bytes, memory  # noqa: E402
from systems.dlora.serving.file import ServerFile  # noqa: E402
from systems.dlora.serving.loop import ReplicaLoop  # noqa: E402
from systems.dlora.serving.messages import Host, Spent, Withdraw, Withdrawn  # noqa: E402

torch.set_num_threads(1)
SHAPE = model("tiny")
ADAPTERS = {f"a{i}": random_adapter(SHAPE, 4, i, tuple(MODULES)) for i in range(4)}
NAMES = [*ADAPTERS]
HOT = Sampling(0.8, 0.9, 11)


def prompt(index: int) -> np.ndarray:
    return np.random.default_rng([1, index]).integers(0, SHAPE.vocab, 5 + 3 * index)


def job(index: int, adapter: str | None, tokens: int = 10, want: Sampling = Sampling()) -> Job:  # noqa: B008
    wanted = want.temperature, want.top_p, want.seed, want.stop_tokens, want.min_tokens
    return Job(index, prompt(index), tokens, *wanted, adapter=adapter)


@cache
def expected(index: int, adapter: str | None, tokens: int = 10, want: Sampling = Sampling()) -> list[int]:  # noqa: B008
    """By the common engine, alone, on weights that hold the adapter."""
    weights = random_weights(SHAPE, 7)
    if adapter:
        merge(SHAPE, weights, ADAPTERS[adapter])
    live = Live.build(SHAPE, weights, EngineConfig(40), max_tokens=256, prompt=lambda _: prompt(index), sampling=lambda _: want)
    return live.generate([Request(0, 0.0, len(prompt(index)), tokens)])[1][0]


BASE = "org/tiny-base"


class Served:
    """A loop that has run: what it reported, with commands that are given when something has been reported."""

    def __init__(self, policy=None, blocks: int = 200, slots: int = 3, batch: int = 4, places: int = 32, **options) -> None:
        config = EngineConfig(blocks, max_num_seqs=places, max_num_batched_tokens=256)
        runner = LoraRunner.build(SHAPE, random_weights(SHAPE, 7), config, slots, 4, max_tokens=256, **options)
        for name, adapter in ADAPTERS.items():
            runner.add(name, adapter)
        self.inbox: SimpleQueue = SimpleQueue()
        policy = policy or Fcfs(slots, batch)
        self.loop = ReplicaLoop(runner, engine_config(blocks, batch, 256), policy, NAMES, self._hear, self.inbox, BASE)
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.reports: list[object] = []
        self.when: dict[tuple[int, int], list[object]] = {}
        """Commands to give as soon as a request has so many tokens."""

    def _hear(self, report: object) -> None:
        self.reports.append(report)
        if not isinstance(report, Progress):
            return
        for index, token, end in report.tokens:
            self.tokens.setdefault(index, []).append(token)
            for command in self.when.pop((index, len(self.tokens[index])), []):
                self.inbox.put(command)
            if end:
                self.ends[index] = end
        if report.load.running == report.load.waiting == 0 and len(self.reports) > 1 and not self.when:
            self.inbox.put(Stop())

    def run(self, *commands: object) -> Served:
        for command in commands:
            self.inbox.put(command)
        self.loop.run()
        runner = self.loop.replica.runner
        assert not runner.requests and runner.live.executor.tables.free_blocks == runner.live.engine.config.num_gpu_blocks
        assert self.loop.replica.pool.free_blocks == self.loop.replica.config.num_gpu_blocks
        return self

    def of(self, kind: type) -> list:
        return [report for report in self.reports if isinstance(report, kind)]


POLICIES = {
    "credit": lambda: Credit(5, 3, 4, CreditRules(0.001, 0.0015, 0.0005, scale=0.5)),
    "fcfs": lambda: Fcfs(3, 4),
    "merge": lambda: Merge(4),
    "peft": lambda: Unmerged(OneAdapter(4)),
}
SKEWED = ["a0", "a0", None, "a1", "a0", "a2", "a0", None, "a3", "a1", "a0", "a3"]


@pytest.mark.parametrize("policy", POLICIES)
def test_each_request_gets_its_own_tokens_under_every_policy(policy: str) -> None:
    """More adapters than slots, and the base model's requests among them; every third draws its tokens."""
    wants = [HOT if i % 3 == 2 else Sampling() for i in range(len(SKEWED))]
    served = Served(POLICIES[policy]()).run(*(job(i, name, want=wants[i]) for i, name in enumerate(SKEWED)))
    assert served.tokens == {i: expected(i, name, want=wants[i]) for i, name in enumerate(SKEWED)}
    assert served.ends == dict.fromkeys(range(len(SKEWED)), "length")
    spent = {index: seconds for report in served.of(Spent) for index, seconds in report.executed}
    assert set(spent) == set(served.tokens) and min(spent.values()) > 0
    assert (served.loop.replica.switches == 0) == (policy in ("fcfs", "peft"))


@pytest.mark.parametrize("want", [Sampling(), HOT])
def test_a_request_that_is_taken_away_goes_on_elsewhere_with_the_same_tokens(want: Sampling) -> None:
    """Its last tokens are told before it is let go; what follows them does not depend on where it runs."""
    served = Served(POLICIES["credit"]())
    served.when = {(0, 4): [Withdraw((0, 1, 7)), Host(("a3",))]}
    served.run(job(0, "a0", want=want), job(1, "a1"), job(2, "a2"))
    (withdrawn,) = served.of(Withdrawn)
    assert [index for index, _ in withdrawn.executed] == [0, 1] and min(s for _, s in withdrawn.executed) > 0
    assert served.tokens[0] == expected(0, "a0", want=want)[:4] and 0 not in served.ends
    assert served.tokens[2] == expected(2, "a2") and "a3" in served.loop.replica.runner.store.residents.slot_of
    rest = Job(0, np.concatenate([prompt(0), served.tokens[0]]), 6, want.temperature, want.top_p, want.seed, adapter="a0")
    other = Served(POLICIES["merge"]()).run(rest)
    assert served.tokens[0] + other.tokens[0] == expected(0, "a0", want=want) and other.ends == {0: "length"}


def test_an_abort_lets_go_at_once() -> None:
    served = Served()
    served.when = {(0, 3): [Abort(0), Abort(9)]}
    served.run(job(0, "a0"), job(1, "a1"), job(2, "a2"))
    assert len(served.tokens[0]) == 3 and 0 not in served.ends
    assert served.tokens[1] == expected(1, "a1") and served.tokens[2] == expected(2, "a2")


def test_stop_tokens_end_an_answer_and_free_its_place() -> None:
    whole = expected(0, "a0")
    stop = frozenset({whole[3]})
    first = whole.index(whole[3])
    served = Served().run(job(0, "a0", want=Sampling(stop_tokens=stop)), job(1, "a1"))
    assert served.tokens[0] == whole[: first + 1] and served.ends == {0: "stop", 1: "length"}
    patient = Sampling(stop_tokens=stop, min_tokens=6)
    again = Served()
    again.when = {(0, 3): [job(1, "a1")]}  # it decodes alone, and beside a prompt
    again.run(job(0, "a0", want=patient))
    assert again.tokens[0] == expected(0, "a0", want=patient) and not stop & set(again.tokens[0][:6])


@pytest.mark.parametrize(("blocks", "places"), [(9, 32), (200, 5)])
@pytest.mark.parametrize("scheme", ["copy", "in-place"])
def test_where_room_runs_out_those_that_came_last_are_computed_again(blocks: int, places: int, scheme: str) -> None:
    """KV blocks, or places for requests that hold some while others run."""
    policy = Credit(5, 3, 4, CreditRules(0.001, 0.0015, 0.0005, scale=0.1)) if places < 32 else Fcfs(3, 4)
    served = Served(policy, blocks=blocks, places=places, scheme=scheme)
    wants = [Sampling(stop_tokens=frozenset(range(128)), min_tokens=20) if i == 1 else Sampling() for i in range(len(SKEWED))]
    commands = [job(i, name, 24, want=wants[i]) for i, name in enumerate(SKEWED)]
    served.when = {(0, 2): commands[4:]}
    served.run(*commands[:4])
    assert served.tokens == {i: expected(i, name, 24, wants[i]) for i, name in enumerate(SKEWED)}
    assert served.loop.replica.preemptions > 0 and served.of(Progress)[-1].load.preemptions > 0


def test_the_slots_bytes_are_reckoned() -> None:
    bank = SlotBank(SHAPE, 3, 16, 4)
    assert bank_bytes(SHAPE, 3, 16) == sum(t.numel() * t.itemsize for side in (bank.a, bank.b) for t in side.values())


@pytest.mark.parametrize(("fits", "kv_blocks", "found"), [
    (4000, None, "copy"),
    (260, None, "in-place"),
    (260, 100, "copy"),
    (4000, 3960, "in-place"),
    (1300, 1300, "1288 blocks fit beside tiny and 2 adapters"),
    (3, None, "0 blocks fit"),
])  # fmt: skip
def test_a_gpu_s_memory_is_shared_out(monkeypatch, fits: int, kv_blocks: int | None, found: str) -> None:
    """A second set of the weights where there is room for it and for four longest contexts, or for the blocks asked for."""
    monkeypatch.setattr(executor, "fitting_blocks", lambda *_: fits)
    given = ServerFile(model="tiny", random_weights=True, adapters={"a0": Path("a0")}, slots=2, kv_blocks=kv_blocks)
    weights = random_weights(SHAPE, 7)
    plan = Given(SHAPE, numerics(SHAPE), "cuda", 1024)
    if "fit" in found:
        with pytest.raises(InputError, match=found):
            memory(given, plan, weights, 4)
        return
    blocks, scheme = memory(given, plan, weights, 4)
    block_bytes = SHAPE.kv_bytes_per_token * 16
    taken = blocks * block_bytes + bank_bytes(SHAPE, 2, 4) + (layer_bytes(weights) if scheme == "copy" else 0)
    assert scheme == found and taken <= fits * block_bytes and blocks == (kv_blocks or blocks)


def folder(root, name: str, adapter, base: str = BASE):
    made = root / name
    made.mkdir()
    (made / "adapter_config.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 4, "peft_type": "LORA", "base_model_name_or_path": base})
    )
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": tensor
        for module, pair in adapter.modules.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    safetensors.save_file(tensors, made / "adapter_model.safetensors")
    return made


@pytest.mark.parametrize("scheme", ["copy", "in-place"])
def test_adapters_come_and_go(tmp_path, scheme: str) -> None:
    """One in use is not taken away, whether its requests run or wait; its name can be another one's afterwards."""
    made, other = folder(tmp_path, "new", ADAPTERS["a1"]), folder(tmp_path, "other", ADAPTERS["a1"], "org/another")
    (tmp_path / "empty").mkdir()
    served = Served(Merge(1), scheme=scheme)
    served.when = {
        (0, 2): [UnloadAdapter(1, "a0"), UnloadAdapter(2, "a2"), LoadAdapter(3, "new", made), LoadAdapter(4, "a3", made)],
        (0, 10): [
            UnloadAdapter(5, "a0"),
            LoadAdapter(6, "a0", made),
            LoadAdapter(7, "none", tmp_path / "empty"),
            LoadAdapter(8, "other", other),
        ],
        (2, 9): [job(4, "new"), job(5, "a0"), job(6, "nobody")],
    }
    served.run(job(0, "a0"), job(2, "a2"))
    errors = {report.ticket: report.error for report in served.of(Done)}
    assert [ticket for ticket, error in errors.items() if error is None] == [3, 5, 6]
    assert "use it" in str(errors[1]) and "let them end" in str(errors[2])
    assert "remove it first" in str(errors[4]) and "name a folder" in str(errors[7])
    assert f"trained on another base model than {BASE}" in str(errors[8])
    assert (served.tokens[0], served.tokens[2]) == (expected(0, "a0"), expected(2, "a2"))
    assert (served.tokens[4], served.tokens[5]) == (expected(4, "a1"), expected(5, "a1"))
    refused = [one for report in served.of(Progress) for one in report.refused]
    assert [index for index, _ in refused] == [6] and "no adapter of this name" in str(refused[0][1])
