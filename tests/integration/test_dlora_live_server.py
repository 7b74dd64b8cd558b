"""dLoRA's servers: one YAML, real replicas on a CPU, and what clients see while requests move and replicas die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("uvicorn")
safetensors = pytest.importorskip("safetensors.torch")

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import MODULES, merge, random_adapter  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402
from tests.integration.serving import ROOT, START_S, Server, server  # noqa: E402

torch.set_num_threads(1)
SHAPE = model("tiny")
ADAPTERS = {f"a{i}": random_adapter(SHAPE, 8, i, tuple(MODULES)) for i in range(4)}
PROMPT = [5, 9, 200, 33]
LONG = 100


def file(root: Path, **changes: object) -> Path:
    """A folder with four PEFT checkpoints and the servers' file."""
    for name, adapter in ADAPTERS.items():
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 8, "peft_type": "LORA"}))
        tensors = {
            f"base_model.model.{module}.lora_{side}.weight": tensor
            for module, pair in adapter.modules.items()
            for side, tensor in zip("AB", pair, strict=True)
        }
        safetensors.save_file(tensors, root / name / "adapter_model.safetensors")
    values = {
        "model": "tiny", "random_weights": True, "device": "cpu", "seed": 7, "max_model_len": 256, "max_num_seqs": 4,
        "adapters": {name: name for name in ADAPTERS}, "migration": {"interval_s": 0.1, "load_excess": 2.0}, **changes,
    }  # fmt: skip
    made = root / "servers.yaml"
    made.write_text(yaml.safe_dump(values))
    return made


@cache
def expected(name: str, adapter: str | None = None) -> list[int]:
    """What `name` answers to `PROMPT`, undisturbed: by the common engine, on weights that hold the adapter."""
    weights = random_weights(SHAPE, 7)
    if name != "tiny":
        merge(SHAPE, weights, ADAPTERS[adapter or name])
    live = Live.build(SHAPE, weights, EngineConfig(40), max_tokens=256, prompt=lambda _: np.array(PROMPT))
    return live.generate([Request(0, 0.0, len(PROMPT), LONG)])[1][0]


class Clients:
    """Clients that stream answers at the same time."""

    def __init__(self, made: Server, pool: ThreadPoolExecutor) -> None:
        self._made, self._pool = made, pool
        self._answers: list[tuple[str, list[int], Future[None]]] = []

    def ask(self, *names: str) -> None:
        for name in names:
            tokens: list[int] = []
            self._answers.append((name, tokens, self._pool.submit(self._stream, name, tokens)))

    def _stream(self, name: str, tokens: list[int]) -> None:
        pieces = list(tokens_of(self._made, name, tokens))
        assert pieces[-1] == "length", pieces

    @property
    def begun(self) -> int:
        """How many have got something."""
        return sum(bool(tokens) for _, tokens, _ in self._answers)

    def check(self) -> None:
        """Everybody got exactly what an undisturbed run gives, in order."""
        for name, tokens, future in self._answers:
            future.result(60)
            assert tokens == expected(name), name
        self._answers.clear()


def tokens_of(made: Server, name: str, tokens: list[int], **fields: object):
    for piece in made.stream(PROMPT, model=name, **{"max_tokens": LONG, **fields}):
        assert "choices" in piece, piece
        tokens += piece["choices"][0]["token_ids"]
        yield piece["choices"][0]["finish_reason"]


def until(true, what: str = "it") -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError(f"{what} never happened")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


def gone(pid: int) -> bool:
    """Ended, and perhaps not yet waited for by whoever adopted it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.slow
def test_requests_and_adapters_move_and_clients_notice_nothing(tmp_path) -> None:
    made_file = file(tmp_path, replicas=2, slots=3)
    with (
        server(tmp_path, str(made_file), command=("-m", "systems.dlora.server"), ready=False) as made,
        ThreadPoolExecutor(16) as pool,
    ):
        told = made.wait_ready()["replicas"]
        assert [set(one["adapters"]) for one in told] == [{"a0", "a1", "a2"}, {"a0", "a1", "a3"}]
        assert all(one["constants"]["merged_s"] > 0 for one in told)
        ids = [entry["id"] for entry in made.request("GET", "/v1/models")[1]["data"]]
        assert ids == ["tiny", *ADAPTERS]
        for name in ids:
            status, answer = made.complete(PROMPT, model=name, max_tokens=8)
            assert status == 200 and answer["choices"][0]["token_ids"] == expected(name)[:8]
        drawn = {"model": "a0", "temperature": 0.9, "seed": 5, "max_tokens": 20}
        assert made.complete(PROMPT, **drawn)[1]["choices"] == made.complete(PROMPT, **drawn)[1]["choices"]
        assert made.complete(PROMPT, model="nobody")[0] == 404
        assert made.complete(PROMPT, model="a0", max_tokens=100_000)[0] == 400

        clients = Clients(made, pool)
        before = made.metrics()
        for _ in range(5):  # a2 is at the first replica alone, which has all the work
            clients.ask(*["a2"] * 8)
            clients.check()
            if made.metrics()["dlora_requests_moved_total"]:
                break
        numbers = made.metrics()
        assert numbers["dlora_requests_moved_total"] > 0 and numbers["dlora_solves_total"] > 0
        ran = 'dlora_iterations_total{replica="1"}'
        assert numbers[ran] > before[ran]  # a2 went with its requests
        assert numbers['dlora_switches_total{replica="0"}'] > 0  # merged, too

        tokens: list[int] = []
        leaving = tokens_of(made, "a1", tokens, max_tokens=240)
        next(leaving)
        for one in told:  # lest it ends too soon
            os.kill(one["pid"], signal.SIGSTOP)
        assert made.request("DELETE", "/v1/adapters/a1")[0] == 409  # in use
        leaving.close()  # its client hangs up
        until(lambda: made.metrics()['requests_ended_total{reason="abort"}'] == 1, "the abort")
        for one in told:
            os.kill(one["pid"], signal.SIGCONT)
        until(lambda: made.request("DELETE", "/v1/adapters/a1")[0] == 200, "the removal")
        assert made.complete(PROMPT, model="a1")[0] == 404
        assert made.request("POST", "/v1/adapters", {"name": "a1", "path": str(tmp_path / "a3")})[0] == 200
        assert made.complete(PROMPT, model="a1", max_tokens=8)[1]["choices"][0]["token_ids"] == expected("a3")[:8]

        others = descendants(made.process.pid)
        assert {one["pid"] for one in told} < set(others)
        clients.ask("a0", "tiny", "a3")
        until(lambda: clients.begun == 3)
        assert made.terminate() == 0  # what runs may end
        clients.check()
        until(lambda: all(gone(pid) for pid in others), "the end of all")
        assert not made.log()


@pytest.mark.slow
def test_faults_one_after_another(tmp_path) -> None:
    """A solver that hangs; a source, then a destination that dies in a migration; more adapters than slots; the last death."""
    rules = {"interval_s": 0.1, "load_excess": 1.0, "limit_s": 0.5}
    made_file = file(tmp_path, replicas=3, slots=2, policy="fcfs", migration=rules)
    with (
        server(tmp_path, str(made_file), command=("-m", "systems.dlora.server"), ready=False) as made,
        ThreadPoolExecutor(24) as pool,
    ):
        replicas = {one["pid"]: one for one in made.wait_ready()["replicas"]}
        first, second, third = replicas
        (manager,) = (child for child in children(made.process.pid) if first in children(child))
        (solver,) = set(children(manager)) - set(replicas) - {_tracker(manager)}
        clients = Clients(made, pool)
        moving = lambda: made.metrics()["dlora_requests_moving"]  # noqa: E731

        os.kill(solver, signal.SIGSTOP)
        clients.ask(*[*ADAPTERS, "tiny"] * 4)
        until(lambda: clients.begun >= 3)
        os.kill(first, signal.SIGSTOP)  # soon it has more to do than the others, who go on
        until(lambda: made.metrics()["dlora_solver_timeouts_total"] >= 1, "the time-out")
        other = next(name for name in replicas[second]["adapters"] if name not in replicas[first]["adapters"])
        assert made.complete(PROMPT, model=other, max_tokens=8)[1]["choices"][0]["token_ids"] == expected(other)[:8]
        assert gone(solver)

        until(moving, "a move from the first")  # by another solver
        os.kill(first, signal.SIGKILL)
        clients.check()
        numbers = made.metrics()
        assert (numbers["dlora_replicas_alive"], numbers["dlora_replica_deaths_total"]) == (2, 1)

        clients.ask(*[*ADAPTERS, "tiny"] * 4)
        until(lambda: clients.begun >= 3)
        os.kill(second, signal.SIGSTOP)
        until(moving, "a move from the second")
        os.kill(third, signal.SIGKILL)
        until(lambda: made.metrics()["dlora_replicas_alive"] == 1, "the third's death")
        os.kill(second, signal.SIGCONT)
        clients.check()

        clients.ask(*[*ADAPTERS, "tiny"] * 3)  # four adapters on two slots
        clients.check()
        assert made.request("GET", "/health")[0] == 200
        tokens: list[int] = []
        last = tokens_of(made, "a0", tokens)
        next(last)
        os.kill(second, signal.SIGKILL)
        with pytest.raises(AssertionError, match="no replica is left"):
            list(last)
        assert made.process.wait(60) == 1
        assert made.log().count("its requests go on elsewhere") == 3 and "Traceback" not in made.log()
        until(lambda: all(gone(pid) for pid in (manager, *replicas)), "the end of all")


def _tracker(pid: int) -> int | None:
    """Python's resource tracker among the children of a process."""
    found = [child for child in children(pid) if b"resource_tracker" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return found[0] if found else None


@pytest.mark.slow
def test_nobody_outlives_a_front_that_is_killed(tmp_path) -> None:
    made_file = file(tmp_path, replicas=1, slots=5, exec_type="peft", random_adapters=1)
    with server(tmp_path, str(made_file), command=("-m", "systems.dlora.server"), ready=False) as made:
        made.wait_ready()
        for name in ("a1", "tiny"):
            assert made.complete(PROMPT, model=name, max_tokens=8)[1]["choices"][0]["token_ids"] == expected(name)[:8]
        assert made.complete(PROMPT, model="adapter-0", max_tokens=8)[0] == 200
        assert made.metrics()['dlora_switches_total{replica="0"}'] == 0
        others = descendants(made.process.pid)
        os.kill(made.process.pid, signal.SIGKILL)
        until(lambda: all(gone(pid) for pid in others), "their end")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["copy it again", "trained on another base model than org/tiny"])
def test_a_wrong_adapter_ends_all_with_its_line(tmp_path, case: str) -> None:
    made = file(tmp_path, replicas=1, slots=4, base_model="org/tiny")
    if "copy" in case:
        (tmp_path / "a3" / "adapter_model.safetensors").write_bytes(b"cut off")
    else:
        told = tmp_path / "a3" / "adapter_config.json"
        told.write_text(json.dumps({**json.loads(told.read_text()), "base_model_name_or_path": "org/another"}))
    command = [sys.executable, "-m", "systems.dlora.server", str(made)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 2 and case in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
