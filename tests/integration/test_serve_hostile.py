"""A real server under bad clients, bad adapters and bad moments: what they may not change, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("uvicorn")
psutil = pytest.importorskip("psutil")

from safetensors.torch import save_file  # noqa: E402

from systems.common.models import model  # noqa: E402
from systems.common.torch_engine.lora import Adapter, random_adapter  # noqa: E402
from tests.integration.serving import TINY, Server, server  # noqa: E402
from tests.integration.test_serve import message, write_adapter  # noqa: E402
from tests.integration.test_serve_life import LONG, engine_of  # noqa: E402

SHAPE = model("tiny")
PROMPT = [17, 4, 201, 96, 33]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("hostile"), *TINY, "--max-lora-rank", "8") as made:
        yield made


def tokens(made: Server, **fields: object) -> list[int]:
    status, answer = made.complete(PROMPT, max_tokens=8, **fields)
    assert status == 200, answer
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


TOO_SMALL = [
    {"temperature": 1e-40},
    {"temperature": 1e-7},
    {"temperature": 1, "top_p": 1e-320},
    {"temperature": 1, "top_p": 1e-9},
]


@pytest.mark.parametrize("fields", TOO_SMALL)
def test_numbers_too_small_for_the_device_mean_greedy(tiny: Server, fields: dict[str, float]) -> None:
    assert tokens(tiny, **fields) == tokens(tiny)


def test_one_model_by_its_name(tiny: Server) -> None:
    listed = tiny.request("GET", "/v1/models")[1]["data"][0]
    assert tiny.request("GET", "/v1/models/tiny") == (200, listed)
    status, answer = tiny.request("GET", "/v1/models/" + "x" * 3000)
    assert status == 404 and answer["error"]["code"] == "model_not_found" and len(answer["error"]["message"]) < 200
    assert tiny.request("DELETE", "/v1/models/tiny")[0] == 405 and tiny.headers["allow"] == "GET"


def raw(made: Server, data: bytes) -> bytes:
    """All that the server answers to `data`."""
    with closing(socket.create_connection(("127.0.0.1", made.port), timeout=60)) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_bytes_that_are_no_request_and_requests_in_pieces(tiny: Server) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",  # TLS
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
    ):
        assert raw(tiny, data).startswith(b"HTTP/1.1 400 ")
    whole = message({"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "temperature": 0})
    head, _, body = whole.partition(b"\r\n\r\n")
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    chunked = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked") + b"\r\n\r\n" + chunks
    pipelined = whole.replace(b"connection: close\r\n", b"") + whole
    assert raw(tiny, chunked).count(b'"finish_reason":"length"') == 1
    assert raw(tiny, pipelined).count(b'"finish_reason":"length"') == 2


# ---- adapters


def test_adapters_that_are_none_are_refused_and_the_engine_goes_on(tiny: Server, tmp_path: Path) -> None:
    good = random_adapter(SHAPE, 4, 1)
    (name, (a, b)), *_ = good.modules.items()
    rows = b.shape[0]
    bad: dict[str, tuple[dict, dict]] = {
        "other rank than it says": ({}, {name: (a[:2], b[:, :2])}),
        "B with fewer outputs": ({}, {name: (a, b[: rows // 2])}),
        "B with more outputs": ({}, {name: (a, torch.cat([b, b]))}),
        "vectors": ({}, {name: (a[0], b[0])}),
        "a layer below 0": ({}, {name.replace("layers.0", "layers.-1"): (a, b)}),
        "a layer too many": ({}, {name.replace("layers.0", "layers.99"): (a, b)}),
        "another path": ({}, {name.replace("model.layers", "visual.blocks"): (a, b)}),
        "a short name": ({}, {"q_proj": (a, b)}),
        "empty": ({}, {}),
        "rank true": ({"r": True}, good.modules),
        "rank 0": ({"r": 0}, good.modules),
        "alpha nan": ({"lora_alpha": float("nan")}, good.modules),
        "another kind": ({"peft_type": "IA3"}, good.modules),
        "rank-stabilised": ({"use_rslora": True}, good.modules),
    }
    for case, (described, modules) in bad.items():
        folder = tmp_path / case
        write_adapter(folder, Adapter({}), 4)
        tensors = {f"base_model.model.{n}.lora_A.weight": a.contiguous() for n, (a, _) in modules.items()}
        tensors |= {f"base_model.model.{n}.lora_B.weight": b.contiguous() for n, (_, b) in modules.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, **described}))
        status, answer = tiny.request("POST", "/v1/adapters", {"name": "bad", "path": str(folder)})
        assert status == 400 and "\n" not in answer["error"]["message"], (case, answer)
    extra = write_adapter(tmp_path / "extra", good, 4)
    tensors = {"base_model.model.lm_head.lora_embedding_A": torch.zeros(4, 4)}
    save_file(tensors, extra / "adapter_model.safetensors")
    for path in (extra, "\0", str(tmp_path / "nowhere"), "x" * 5000, __file__):
        assert tiny.request("POST", "/v1/adapters", {"name": "bad", "path": str(path)})[0] == 400, path
    for name in ("", "tiny"):
        assert tiny.request("POST", "/v1/adapters", {"name": name, "path": str(extra)})[0] in (400, 409)
    assert len(tiny.request("GET", "/v1/models")[1]["data"]) == 1
    assert tokens(tiny) == tokens(tiny, model="tiny")


# ---- ends


def test_who_says_nothing_or_half_a_request_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """The drain's limit is an hour; the half request hears that the server ends, and the port is free for the next one."""
    with server(tmp_path, *TINY, "--drain-s", "3600") as made:
        half = message({"model": "tiny", "prompt": PROMPT})[:-5]
        asking = [socket.create_connection(("127.0.0.1", made.port), timeout=60) for _ in range(3)]
        for connection, data in zip(asking, (half, b"POST /v1/compl", b""), strict=True):
            connection.sendall(data)
        while made.metrics()["requests_running"]:
            pass
        assert made.terminate() == 0
        assert asking[0].recv(65536).startswith(b"HTTP/1.1 503 ") and asking[1].recv(1) == asking[2].recv(1) == b""
        for connection in asking:
            connection.close()
    (tmp_path / "again").mkdir()
    with server(tmp_path / "again", *TINY, "--port", str(made.port), ready=False) as again:
        engine = engine_of(again)
        assert again.port == made.port
        for process in (engine, again.process):  # while it loads, to everybody
            process.send_signal(signal.SIGTERM)
        assert again.process.wait(60) == 0 and again.log() == ""


def test_an_engine_that_still_loads_does_not_outlive_the_server(tmp_path: Path) -> None:
    with server(tmp_path, *TINY, ready=False) as made:
        engine = engine_of(made)
        made.process.kill()
        made.process.wait(60)
        psutil.wait_procs([engine], timeout=60)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_ranks_drain_with_the_server_and_a_dead_one_is_noticed_by_an_idle_server(tmp_path: Path) -> None:
    def ranks(made: Server) -> list[psutil.Process]:
        return [child for child in engine_of(made).children() if "torch_engine.parallel.rank" in " ".join(child.cmdline())]

    with server(tmp_path, *TINY, "--tensor-parallel-size", "2") as made:
        others = [engine_of(made), *ranks(made)]
        stream = made.stream(**LONG)
        next(stream)
        for process in (*others, made.process):  # a service manager's way
            os.kill(process.pid, signal.SIGTERM)
        assert list(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert made.process.wait(60) == 0 and made.log() == ""
        assert psutil.wait_procs(others, timeout=60)[1] == []
    (tmp_path / "again").mkdir()
    with server(tmp_path / "again", *TINY, "--tensor-parallel-size", "2") as made:
        (rank,) = ranks(made)
        rank.kill()
        assert made.process.wait(60) == 1  # nobody has asked for anything
        (line,) = made.log().splitlines()
        assert "rank 1 of 2 died (killed by SIGKILL)" in line
