"""How a server starts and ends: readiness, drain, a dead engine, bad settings."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("uvicorn")
psutil = pytest.importorskip("psutil")

from tests.integration.serving import TINY, Server, run, server  # noqa: E402
from tests.integration.test_serve import crowd, offline  # noqa: E402

LONG = {"max_tokens": 700, "prompt": [1, 2, 3]}


def engine_of(made: Server) -> psutil.Process:
    """The engine's process."""
    return next(
        child
        for child in psutil.Process(made.process.pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    )


def test_not_ready_then_drained(tmp_path: Path) -> None:
    """503 until the engine is warm; after SIGTERM 503 for who comes, the whole answer for who is there, exit code 0."""
    with server(tmp_path, *TINY, "--drain-s", "120", ready=False, ulimit="-n 150") as made:
        for path in ("/health", "/v1/models"):
            status, answer = made.request("GET", path)
            assert status == 503 and answer["error"]["code"] == "starting" and made.headers["retry-after"]
        assert made.complete()[0] == 503
        assert made.request("GET", "/metrics")[0] == 200
        made.wait_ready()
        assert made.request("GET", "/health")[0] == 200

        # more connections than the process may have files: some are told so, all are answered
        heads = [head.split(b"\r\n")[0] for head, _ in asyncio.run(crowd(made.port, 200))]
        assert set(heads) <= {b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Service Unavailable"} and b"HTTP/1.1 200 OK" in heads
        until_idle(made)

        streams = [made.stream(**LONG) for _ in range(3)]
        first = [next(stream) for stream in streams]
        made.process.send_signal(signal.SIGTERM)
        while (refusal := made.complete())[0] == 200:
            pass
        assert refusal[0] == 503 and refusal[1]["error"]["code"] == "draining" and made.headers["retry-after"]
        for begun, stream in zip(first, streams, strict=True):
            pieces = [begun, *stream]
            tokens = [token for piece in pieces for token in piece["choices"][0]["token_ids"]]
            assert len(tokens) == LONG["max_tokens"] and pieces[-1]["choices"][0]["finish_reason"] == "length"
        assert made.process.wait(60) == 0


def until_idle(made: Server) -> None:
    """Until connections that were turned away are gone, so that others may come."""
    while made.request("GET", "/metrics")[0] != 200:
        pass


def test_a_drain_has_an_end(tmp_path: Path) -> None:
    with server(tmp_path, *TINY, "--drain-s", "0.1") as made:
        stream = made.stream(prompt=[1], max_tokens=1000)
        next(stream)
        made.process.send_signal(signal.SIGINT)
        last = list(stream)[-1]
        assert last["choices"][0]["finish_reason"] == "abort"
        assert made.process.wait(60) == 0


def test_a_dying_engine_ends_everything(tmp_path: Path) -> None:
    """An error in the engine: everyone who waits hears why, and the process ends with code 1."""
    (tmp_path / "dying.py").write_text(
        "import sys\n"
        "from systems.common.serve.__main__ import main\n"
        "from systems.common.torch_engine.executor import TorchExecutor\n"
        "def decode_run(self, batch, steps=[0], real=TorchExecutor.decode_run):\n"
        "    steps[0] += batch.decodes == 4\n"  # everybody is there
        "    if steps[0] == 20:\n"
        "        raise RuntimeError('the fuse is blown')\n"
        "    return real(self, batch)\n"
        "TorchExecutor.decode_run = decode_run\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    with server(tmp_path, *TINY, command=("dying.py",)) as made:
        answers: list[tuple[int, dict]] = []
        asking = [threading.Thread(target=lambda: answers.append(made.complete(**LONG))) for _ in range(3)]
        for thread in asking:
            thread.start()
        pieces = list(made.stream(**LONG))
        for thread in asking:
            thread.join(60)
        assert "RuntimeError: the fuse is blown" in pieces[-1]["error"]["message"]
        assert [status for status, _ in answers] == [500] * 3
        assert all("the fuse is blown" in answer["error"]["message"] for _, answer in answers)
        assert made.process.wait(60) == 1
        assert "the fuse is blown" in made.log().splitlines()[-1]


@pytest.mark.slow
def test_a_rank_that_dies_ends_everything(tmp_path: Path) -> None:
    """A model on two ranks says what it says on one; when the other rank goes, everyone hears of it and nothing is left."""
    with server(tmp_path, *TINY, "--tensor-parallel-size", "2") as made:
        want = offline([1, 2, 3], 12)
        assert made.complete([1, 2, 3], max_tokens=12)[1]["choices"][0]["token_ids"] == want
        engine = engine_of(made)
        (rank,) = [child for child in engine.children() if "torch_engine.parallel.rank" in " ".join(child.cmdline())]
        stream = made.stream(**LONG)
        next(stream)
        rank.kill()
        assert "rank 1" in list(stream)[-1]["error"]["message"]
        assert made.process.wait(60) == 1
        assert not engine.is_running()


def test_neither_process_outlives_the_other(tmp_path: Path) -> None:
    with server(tmp_path, *TINY) as made:
        engine = engine_of(made)
        stream = made.stream(**LONG)
        next(stream)
        engine.kill()
        assert "code -9" in list(stream)[-1]["error"]["message"]
        assert made.process.wait(60) == 1
    (tmp_path / "again").mkdir()
    with server(tmp_path / "again", *TINY) as made:
        engine = engine_of(made)
        engine.send_signal(signal.SIGTERM)  # a service manager sends it to everybody: the engine must let the other decide
        assert made.complete(max_tokens=2)[0] == 200
        made.process.kill()
        engine.wait(60)


def test_bad_settings_are_one_line_and_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (tmp_path / "empty").mkdir()
        (tmp_path / "bad.yaml").write_text("model: tiny\nrandom-weights: true\nmax_num_seqs: 0\n")
        cases = [
            ([*TINY, "--port", port], f"serve: port: {port}: Address already in use"),
            (["--model", "tiny", "--weights", "nowhere"], "serve: weights: 'nowhere'"),
            (["--model", "tiny", "--weights", "empty"], "*.safetensors"),
            (["--weights", "empty"], "config.json"),
            (["--config", "bad.yaml"], "bad.yaml: max_num_seqs: 0"),
            ([*TINY, "--tokenizer", "empty"], "tokenizer"),
        ]
        for options, told in cases:
            ended = run(tmp_path, *options)
            lines = ended.stderr.splitlines()
            assert ended.returncode == 2 and len(lines) == 1 and told in lines[0], (options, ended.stderr)


def test_a_yaml_file_says_what_options_say(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(
        "model: tiny\nrandom_weights: true\nseed: 3\nkv_blocks: 50\nserved_model_name: small\n"
    )
    with server(tmp_path, "--config", "serve.yaml", "--kv-blocks", "60", ready=False) as made:
        assert made.wait_ready()["kv_blocks"] == 60
        assert made.request("GET", "/v1/models")[1]["data"][0]["id"] == "small"
        assert made.terminate() == 0
        assert made.log() == ""
