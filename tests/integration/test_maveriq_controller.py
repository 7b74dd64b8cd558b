"""The controller with real engine processes: serving, deaths, removal under load, HTTP, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from systems.common.errors import InputError
from systems.maveriq.controller import trial
from systems.maveriq.controller.core import Core
from systems.maveriq.controller.driver import Controller
from systems.maveriq.controller.launch import Launch, serving
from systems.maveriq.controller.library import Library
from systems.maveriq.controller.memory import Budgets
from systems.maveriq.controller.queues import QUEUES
from systems.maveriq.search import Refusal, Wish
from tests.unit.test_maveriq_decide import fingerprints

FAKE = Path(__file__).resolve().parents[1] / "fakes" / "maveriq_engine.py"
LIMIT_S = 60
MODELS = ("llama-2-7b", "llama-2-13b")


def fake(deployment, devices):
    return Launch((sys.executable, str(FAKE), deployment.decision.wish.model), tuple(devices))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return fingerprints(tmp_path_factory.mktemp("prints") / "prints.csv", models=MODELS)


def controller(table, launcher=fake, queue="global", gpus=2, gib=48.0, timeout_s=LIMIT_S):
    library = Library.read(table)
    core = Core(library.search(), QUEUES[queue]())
    return Controller(core, Budgets((gib,) * gpus, (0.5,) * gpus), launcher, library, timeout_s)


def going(scenario):
    """Run an async scenario with a limit; no engine may be left when it has ended."""

    async def limited():
        return await asyncio.wait_for(scenario(), LIMIT_S)

    found = asyncio.run(limited())
    assert not [child for child in psutil.Process().children(recursive=True) if str(FAKE) in " ".join(command(child))]
    return found


def command(process):
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def told(answer):
    assert not answer.error, answer.error
    return json.loads(answer.text)


@pytest.mark.parametrize("queue", list(QUEUES))
def test_models_serve_side_by_side_and_end_with_the_controller(table, queue):
    async def scenario():
        async with controller(table, queue=queue) as node:
            for name, model in zip("ab", MODELS, strict=True):
                await node.deploy(name, Wish(model, "min_mem", output_length=7))
            answers = await asyncio.gather(*(node.inference("ab"[place % 2], f"hello {place}") for place in range(20)))
            assert [told(answer)["prompt"] for answer in answers] == [f"HELLO {place}" for place in range(20)]
            assert {told(answer)["model"] for answer in answers} == set(MODELS)
            assert {told(answer)["tokens"] for answer in answers} == {7}
            assert all(answer.e2e_s >= answer.service_s > 0 and answer.tries == 1 for answer in answers)
            assert any(node.busy(gpu) > 0 for gpu in range(2))
            pids = [one["pid"] for one in node.status()]
        assert not any(psutil.pid_exists(pid) for pid in pids)

    going(scenario)


def test_an_engine_that_dies_mid_request_retries_it_once_and_harms_nobody(table, tmp_path):
    async def scenario():
        async with controller(table) as node:
            await node.deploy("a", Wish(MODELS[0], "min_mem"))
            await node.deploy("b", Wish(MODELS[1], "min_mem"))
            before = {one["id"]: one["pid"] for one in node.status()}
            answers = await asyncio.gather(
                node.inference("a", f"die once {tmp_path / 'died'}"), node.inference("a", "after"), node.inference("b", "other")
            )
            assert [answer.tries for answer in answers] == [2, 1, 1]
            assert told(answers[0])["pid"] == told(answers[1])["pid"] != before["a"]
            assert told(answers[2])["pid"] == before["b"]
            lost = await node.inference("a", "die")
            assert lost.error.startswith("engine of a: ") and lost.error.endswith("tried 2 times")
            assert told(await node.inference("a", "still here"))["prompt"] == "STILL HERE"

    going(scenario)


def test_a_rank_that_dies_is_a_dead_engine_and_not_a_refused_request(table, tmp_path):
    async def scenario():
        async with controller(table) as node:
            await node.deploy("a", Wish(MODELS[0], "min_mem"))
            before = node.status()[0]["pid"]
            answer = await node.inference("a", f"rank {tmp_path / 'died'}")
            assert answer.tries == 2 and told(answer)["pid"] != before
            lost = await node.inference("a", f"rank {tmp_path / 'no' / 'such'}")
            assert lost.error == "engine of a: rank 1 of 2 died (killed by SIGKILL); tried 2 times"
            assert told(await node.inference("a", "after"))["prompt"] == "AFTER"

    going(scenario)


def test_an_engine_that_is_killed_while_idle_comes_back(table):
    async def scenario():
        async with controller(table) as node:
            await node.deploy("a", Wish(MODELS[0], "min_mem"))
            pid = node.status()[0]["pid"]
            os.kill(pid, signal.SIGKILL)
            answer = await node.inference("a", "hello")
            while answer.error or told(answer)["pid"] == pid:  # a request in the very moment of the death is retried
                answer = await node.inference("a", "hello")

    going(scenario)


def test_an_engine_that_does_not_start_frees_its_memory_and_says_why(table, monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE_BROKEN", MODELS[0])

    async def scenario():
        async with controller(table, gpus=1) as node:
            with pytest.raises(InputError, match="no such weights; given up after 2 engines") as error:
                await node.deploy("a", Wish(MODELS[0], "min_mem"))
            assert "\n" not in str(error.value)
            assert [gpu.used_gib for gpu in node.memory.states(node.busy)] == [0.5]
            await node.deploy("b", Wish(MODELS[1], "min_mem"))
            assert told(await node.inference("b", "hi"))["prompt"] == "HI"

    going(scenario)


def test_removal_with_a_full_queue_fails_it_and_frees_the_gpus(table, tmp_path):
    async def scenario():
        async with controller(table) as node:
            await node.deploy("a", Wish(MODELS[0], "min_mem"))
            await node.deploy("b", Wish(MODELS[1], "min_mem"))
            waiting = [node.submit("a", f"wait {tmp_path / 'never'}")[1] for _ in range(100)]
            other = node.submit("b", "hello")[1]
            assert await node.remove("a") == 100
            assert {answer.error for answer in await asyncio.gather(*waiting)} == {"a was removed"}
            assert told(await other)["prompt"] == "HELLO"
            with pytest.raises(InputError, match="'a': is not deployed"):
                node.submit("a", "x")
            await node.deploy("a", Wish(MODELS[0], "min_mem"))  # its name and memory are free again
            assert sum(gpu.used_gib for gpu in node.memory.states(node.busy)) > 1.0

    going(scenario)


def test_removal_while_the_engine_still_loads(table):
    async def scenario():
        async with controller(table) as node:
            await node.deploy("a", Wish(MODELS[0], "min_mem"), wait=False)
            waiting = node.submit("a", "hello")[1]
            assert await node.remove("a") == 1
            assert (await waiting).error == "a was removed"
            late = asyncio.create_task(node.deploy("b", Wish(MODELS[0], "min_mem")))
            while "b" not in node.core.deployments:
                await asyncio.sleep(0.001)
            await node.remove("b")
            with pytest.raises(InputError, match="was removed while it loaded"):
                await late
            assert [gpu.used_gib for gpu in node.memory.states(node.busy)] == [0.5, 0.5]

    going(scenario)


def test_the_order_under_one_queue_and_prior_requests(table, tmp_path):
    gate = tmp_path / "gate"

    async def scenario():
        async with controller(table) as node:
            await node.deploy("a", Wish(MODELS[0], "min_mem"))
            futures = [node.submit("a", f"wait {gate}")[1]]
            futures += [node.submit("a", text)[1] for text in ("second", "third")]
            futures.append(node.submit("a", "prior", front=True)[1])
            gate.touch()
            await asyncio.gather(*futures)
            assert [told(record)["prompt"] for record in node.records][1:] == ["PRIOR", "SECOND", "THIRD"]

    going(scenario)


def test_a_request_that_takes_too_long_or_is_refused(table, tmp_path):
    async def scenario():
        async with controller(table, timeout_s=0.3) as node:
            await node.deploy("a", Wish(MODELS[0], "min_mem"))
            assert (await node.inference("a", "refuse")).error == "HTTP 400: no such thing"
            slow = await node.inference("a", f"wait {tmp_path / 'never'}")
            assert "no answer in 0.3 s" in slow.error and slow.tries == 2

    going(scenario)


def test_what_does_not_fit_is_refused_and_a_name_is_taken_once(table):
    async def scenario():
        async with controller(table, gpus=1, gib=40.0) as node:
            await node.deploy("a", Wish(MODELS[0], "min_mem", fp16_only=True))
            found = await node.deploy("b", Wish(MODELS[1], "min_mem", fp16_only=True))
            assert isinstance(found, Refusal) and found.reason.startswith("out of memory")
            with pytest.raises(InputError, match="'a': is deployed already"):
                await node.deploy("a", Wish(MODELS[0]))

    going(scenario)


def test_two_deployments_at_once_never_take_the_same_memory(table):
    async def scenario():
        async with controller(table, gpus=1, gib=45.0) as node:  # one fits, both do not
            wish = Wish(MODELS[0], "min_mem", fp16_only=True)
            found = await asyncio.gather(*(node.deploy(name, wish) for name in "ab"))
            assert sorted(isinstance(one, Refusal) for one in found) == [False, True]

    going(scenario)


def test_registered_fingerprints_are_used(table, tmp_path):
    async def scenario():
        async with controller(table) as node:
            with pytest.raises(InputError, match="gptj-6b"):
                await node.deploy("g", Wish("gptj-6b"))
            new = fingerprints(tmp_path / "new.csv", models=("gptj-6b",))
            with pytest.raises(InputError, match="no fingerprint of it"):
                await node.register("falcon-40b", new)
            assert await node.register("gptj-6b", new) > 0
            await node.deploy("g", Wish("gptj-6b", "min_mem"))
            assert told(await node.inference("g", "hi"))["model"] == "gptj-6b"
            await node.deploy("a", Wish(MODELS[0], "min_mem"))  # those before are still there

    going(scenario)


class Program:
    """`python -m systems.maveriq.controller --http 0` with fake engines."""

    def __init__(self, table, root, *more):
        engine = shlex.join((sys.executable, str(FAKE)))
        self.argv = [
            sys.executable, "-m", "systems.maveriq.controller", "--fingerprints", str(table), "--gpu-total-gib", "48",
            "--gpus", "2", "--engine-command", engine, *more,
        ]  # fmt: skip
        self.root = root

    def __enter__(self):
        self.process = subprocess.Popen(
            [*self.argv, "--http", "0"], cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.port = json.loads(line)["port"]
        return self

    def __exit__(self, *_error):
        self.process.kill()
        self.process.communicate(timeout=LIMIT_S)

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        try:
            connection.request(method, path, body if isinstance(body, str) or body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def gone(pid):
    """Wait until a process has ended."""
    limit = time.monotonic() + LIMIT_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit, f"{pid} lives on"
        time.sleep(0.02)


def test_over_http(table, root):
    pytest.importorskip("uvicorn")
    with Program(table, root) as program:
        assert program.ask("GET", "/health") == (200, {"status": "ok"})
        status, one = program.ask("POST", "/deploy", {"id": "a", "model": MODELS[0], "intent": "min_mem", "output_length": 5})
        assert (status, one["state"], one["refusal"]) == (200, "ready", None)
        status, answer = program.ask("POST", "/inference", {"id": "a", "text": "hello"})
        assert status == 200 and json.loads(answer["text"])["prompt"] == "HELLO"
        status, answer = program.ask("POST", "/prior_inference", {"id": "a", "text": "first"})
        assert status == 200 and json.loads(answer["text"])["prompt"] == "FIRST"
        wrong = [
            ("POST", "/deploy", {"id": "a", "model": MODELS[0]}, 409), ("POST", "/inference", {"id": "b", "text": "x"}, 404),
            ("POST", "/remove", {"id": "b"}, 404), ("POST", "/deploy", {"id": "c", "model": "llama-9"}, 400),
            ("POST", "/deploy", {"id": "c", "model": MODELS[0], "intent": "cheap"}, 400), ("POST", "/deploy", {"id": 5}, 400),
            ("POST", "/deploy", "no json", 400), ("POST", "/deploy", "[]", 400), ("POST", "/deploy", {"slow": 1}, 400),
            ("POST", "/inference", {"id": "a"}, 400), ("GET", "/nothing", None, 404), ("GET", "/deploy", None, 405),
            ("POST", "/register", {"model": MODELS[0], "file": "/nowhere"}, 400),
            ("POST", "/inference", {"id": "a", "text": "die"}, 502),
        ]  # fmt: skip
        for method, path, body, wanted in wrong:
            status, found = program.ask(method, path, body)
            assert status == wanted, (path, body, found)
            assert "\n" not in found["error"]["message"]
        assert program.ask("POST", "/deploy", {"id": "d", "model": MODELS[1], "slo": 1e-6})[1]["best_effort"]
        assert [one["id"] for one in program.ask("GET", "/deployments")[1]["deployments"]] == ["a", "d"]
        assert len(program.ask("GET", "/gpus")[1]["gpus"]) == 2
        assert [record["error"] == "" for record in program.ask("GET", "/records")[1]["records"]] == [True, True, False]
        assert program.ask("POST", "/remove", {"id": "a"}) == (200, {"id": "a", "failed_requests": 0})
        pid = program.ask("GET", "/deployments")[1]["deployments"][0]["pid"]
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(timeout=LIMIT_S) == 0
        gone(pid)


def test_two_controllers_on_one_port(table, root):
    pytest.importorskip("uvicorn")
    with Program(table, root) as first:
        second = subprocess.run(
            [*first.argv, "--http", str(first.port)], cwd=root, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        assert f"controller: port: {first.port}: Address already in use" in second.stderr
        assert first.ask("GET", "/health")[0] == 200


def test_engines_end_when_the_controller_is_killed(table, root):
    pytest.importorskip("uvicorn")
    with Program(table, root) as program:
        pid = program.ask("POST", "/deploy", {"id": "a", "model": MODELS[0], "intent": "min_mem"})[1]["pid"]
        program.process.kill()
        gone(pid)


def test_commands_from_a_pipe(table, root):
    program = Program(table, root)
    lines = (
        "help deploy\n"
        f"a deploy {MODELS[0]} 20 min_mem\n"
        "a inference hello\n"
        "wait\n"
        "status\n"
        "nonsense\n"
        f"a deploy {MODELS[0]} 20 min_mem\n"
        "b inference hello\n"
        "a remove\n"
        "status\n"
        "history\n"
        "exit\n"
        "a inference never\n"
    )
    done = subprocess.run(program.argv, cwd=root, input=lines, capture_output=True, text=True, timeout=LIMIT_S)
    out = done.stdout.splitlines()
    assert done.stderr == "" and done.returncode == 1  # some commands were wrong
    assert out[0].startswith("deploy ID MODEL OUTPUT_LENGTH INTENT")
    assert out[1].startswith("a: TP 1 PP 1 int8, layers [32], GPUs [0]")
    assert '\'{"prompt": "HELLO"' in out[2]
    assert out[3].startswith(f"a: {MODELS[0]} ready")
    assert out[4].startswith("controller: command: 'nonsense': use one of")
    assert "is deployed already" in out[5] and "'b': is not deployed" in out[6]
    assert out[7] == "a: removed"
    assert [line.split(maxsplit=1)[1] for line in out[8:]] == lines.splitlines()[:11]  # up to `history` itself


def test_a_terminal_completes_names_and_keeps_what_was_typed(table, root, tmp_path):
    pytest.importorskip("readline")
    ours, theirs = os.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    program = subprocess.Popen(
        Program(table, root).argv, cwd=root, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    watchdog = threading.Timer(LIMIT_S, program.kill)
    watchdog.start()
    said = b""
    try:
        while b"maveriq> " not in said:
            said += os.read(ours, 4096)
        os.write(ours, f"dep\t a {MODELS[1][:-2]}\t 0 min_m\t\nhist\t\nexit\n".encode())  # length 0: nothing is deployed
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while data := os.read(ours, 4096):
                said += data
        assert program.wait(timeout=LIMIT_S) == 1
    finally:
        watchdog.cancel()
        program.kill()
        program.wait()
        os.close(ours)
    typed = f"deploy a {MODELS[1]} 0 min_mem"
    assert f"   1  {typed}\r\n" in said.decode()
    assert (tmp_path / "fivefold" / "maveriq_history").read_text().splitlines()[-3:] == [typed, "history", "exit"]


def test_bad_options_are_one_line(table, root, tmp_path):
    for argv in (
        ("--gpus", "0"),
        ("--gpu-total-gib", "-1"),
        ("--mode", "guess"),
        ("--engine-command", ""),
        ("--host", "256.1.1.1", "--http", "0"),
    ):
        done = subprocess.run(
            [*Program(table, root).argv, *argv], cwd=root, input="", capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (argv, done.stderr)
    absent = subprocess.run(
        [sys.executable, "-m", "systems.maveriq.controller", "--fingerprints", str(tmp_path / "absent.csv")],
        cwd=root, input="", capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert absent.returncode == 2 and "absent.csv" in absent.stderr


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_trial_writes_what_it_has(table, tmp_path, monkeypatch, capsys, gpus):
    monkeypatch.setattr(trial, "serving", lambda *_options, **_more: fake)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    out = tmp_path / "trial.json"
    argv = ["--fingerprints", str(table), "--out", str(out), "--device", "cpu", "--gpus", str(gpus), "--commit", "abc"]
    argv += ["--rate-rps", "60", "--traffic-s", "0.5", "--tokens", "3", "--limit-s", "60"]
    assert trial.main(argv) == 0
    told = json.loads(out.read_text())
    tenants = told["load"]["tenants"]
    assert [one["name"] for one in tenants] == (["dense", "cheap", "small"] if gpus == 1 else ["pipeline", "tensor", "small"])
    assert all(len(one["service_s"]) == 3 and one["memory"]["gib"] is None for one in tenants)
    assert [one["pp_map"] for one in tenants] == ([[32], [40], [32]] if gpus == 1 else [[20, 12], [40], [32]])
    for queue in QUEUES:
        assert 0 < told["queues"][queue]["answered"] == told["queues"][queue]["requests"]
    death, removal = told["death_under_traffic"], told["removal_under_traffic"]
    assert (death["answer_error"], death["others_failed"], death["processes_left"]) == ("", 0, 0)
    assert removal["back"] and removal["others"]["errors"] == []
    assert len(told["unload"]["steps"]) == 3 and told["left_out"] == [] and told["provenance"]["commit"] == "abc"
    capsys.readouterr()
    if gpus == 1:
        assert trial.main([*argv, "--sections", "all"]) == 2
        assert trial.main([*argv, "--sections", "queues"]) == 1
        assert "no model has been deployed" in json.loads(out.read_text())["queues"]["error"]
        assert trial.main([*argv, "--limit-s", "0"]) == 1
        assert json.loads(out.read_text())["left_out"] == list(trial.SECTION_S)


@pytest.mark.slow
def test_the_real_engine_on_a_cpu(table):
    pytest.importorskip("torch")
    pytest.importorskip("uvicorn")
    options = ("--device", "cpu", "--max-model-len", "256", "--kv-blocks", "32", "--seed", "7")

    async def scenario():
        async with controller(table, serving("tiny", options), "per_model") as node:
            await asyncio.gather(*(node.deploy(name, Wish(MODELS[0], "min_mem", output_length=4)) for name in "ab"))
            answers = await asyncio.gather(*(node.inference(name, "hello") for name in "abab"))
            assert not any(answer.error for answer in answers)
            assert len({answer.text for answer in answers}) == 1  # one shape, one seed, greedy
            os.kill(next(one["pid"] for one in node.status() if one["id"] == "a"), signal.SIGKILL)
            after = [await node.inference(name, "hello") for name in "ab"]
            assert {answer.text for answer in after} == {answers[0].text}

    asyncio.run(asyncio.wait_for(scenario(), 240))
