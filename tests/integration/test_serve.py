"""A real server of the tiny model: what it answers, to good and bad requests."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("uvicorn")

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.serve.loading import read_adapter  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import Adapter, random_adapter  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402
from tests.integration.serving import TINY, Server, server  # noqa: E402

SHAPE = model("tiny")
CONTEXT, BLOCKS = 2048, 100
CONFIG = EngineConfig(BLOCKS, max_num_batched_tokens=256, max_num_seqs=64)
PROMPT = [17, 4, 201, 96, 33]


def write_adapter(folder: Path, adapter: Adapter, rank: int) -> Path:
    """As peft does, with alpha = 2 rank."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for name, (a, b) in adapter.modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2 * rank, "peft_type": "LORA"}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(at / name, random_adapter(SHAPE, 4, seed), 4) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Server]:
    options = (
        *TINY, "--max-model-len", str(CONTEXT), "--kv-blocks", str(BLOCKS), "--max-num-batched-tokens", "256",
        "--max-num-seqs", "64", "--adapter", f"one={folders['one']}", "--max-lora-rank", "8",
    )  # fmt: skip
    # few file descriptors to begin with: the server must raise the limit itself
    with server(tmp_path_factory.mktemp("tiny"), *options, ulimit="-S -n 256") as made:
        yield made


def offline(prompt: list[int], tokens: int, folder: Path | None = None) -> list[int]:
    """What `Live.generate` gives."""
    live = Live.build(
        SHAPE, random_weights(SHAPE, 7), CONFIG, max_tokens=CONTEXT,
        prompt=lambda _: torch.tensor(prompt).numpy(), adapters=(2, 8, ("qkv", "o", "up", "down")),
    )  # fmt: skip
    if folder is not None:
        live.executor.adapters.load("it", read_adapter(folder))
    return live.generate([Request(0, 0.0, len(prompt), tokens, "it" if folder else None)])[1][0]


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


# ---- answers


def test_what_it_says_of_itself(tiny: Server) -> None:
    assert tiny.request("GET", "/health") == (200, {"status": "ok"})
    status, models = tiny.request("GET", "/v1/models")
    assert status == 200
    base = next(m for m in models["data"] if m["id"] == "tiny")
    assert base["parent"] is None and "stand-in" in base["tokenizer"] and base["weights"] == "random (seed 7)"
    assert base["max_model_len"] == CONTEXT and base["device"] == "cpu"
    assert next(m for m in models["data"] if m["id"] == "one")["parent"] == "tiny"


def test_greedy_text_is_that_of_generate(tiny: Server) -> None:
    want = offline(PROMPT, 40)
    status, answer = tiny.complete(PROMPT, max_tokens=40)
    assert status == 200
    choice = answer["choices"][0]
    assert choice["token_ids"] == want and choice["text"] == text_of(want) and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 40, "total_tokens": 45}


def test_an_adapter_is_chosen_by_the_models_name(tiny: Server, folders: dict[str, Path]) -> None:
    want = offline(PROMPT, 20, folders["one"])
    assert want != offline(PROMPT, 20)
    assert tiny.complete(PROMPT, max_tokens=20, model="one")[1]["choices"][0]["token_ids"] == want


@pytest.mark.parametrize("chat", [False, True])
def test_pieces_joined_are_the_whole(tiny: Server, chat: bool) -> None:
    options = {"max_tokens": 60, "temperature": 1.0, "seed": 5, "chat": chat}
    _, whole = tiny.complete("Say it.", **options)
    pieces = list(tiny.stream("Say it.", **options, stream_options={"include_usage": True}))
    choices = [piece["choices"][0] for piece in pieces[:-1]]
    texts = [choice["delta"]["content"] if chat else choice["text"] for choice in choices]
    said = whole["choices"][0]["message"]["content"] if chat else whole["choices"][0]["text"]
    assert "".join(texts) == said
    assert [i for choice in choices for i in choice["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"] == whole["usage"]
    assert all(piece["usage"] is None for piece in pieces[:-1])
    assert len({piece["id"] for piece in pieces}) == 1
    if chat:
        assert choices[0]["delta"]["role"] == "assistant" and "role" not in choices[-1]["delta"]
        assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}


def test_a_chat_is_written_by_the_stand_ins_template(tiny: Server) -> None:
    _, chat = tiny.complete("Hi", chat=True, max_tokens=9)
    _, plain = tiny.complete("user: Hi\nassistant: ", max_tokens=9)
    assert chat["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]


def test_seeds_repeat_and_differ(tiny: Server) -> None:
    def draw(**fields: object) -> list[int]:
        status, answer = tiny.complete(PROMPT, max_tokens=30, temperature=1.5, top_p=0.9, **fields)
        assert status == 200
        return answer["choices"][0]["token_ids"]

    assert draw(seed=11) == draw(seed=11) != draw(seed=12)
    assert draw() != draw()


def test_many_prompts_in_one_request(tiny: Server) -> None:
    prompts = [PROMPT, [5, 6], [7] * 40]
    status, answer = tiny.complete(prompts, max_tokens=12)
    want = [offline(prompt, 12) for prompt in prompts]
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["token_ids"] for choice in answer["choices"]] == want
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for piece in tiny.stream(prompts, max_tokens=12):
        for choice in piece["choices"]:
            got[choice["index"]] += choice["token_ids"]
    assert list(got.values()) == want
    assert tiny.complete(["ab", "cd"], max_tokens=1)[1]["usage"]["prompt_tokens"] == 4


def test_stop_strings_and_tokens(tiny: Server) -> None:
    want = offline(PROMPT, 200)
    whole = text_of(want)
    stop = next(whole[i : i + 2] for i in range(20, 200) if "\ufffd" not in whole[i : i + 2])
    expected = whole[: whole.index(stop)]
    _, answer = tiny.complete(PROMPT, max_tokens=200, stop=[stop, "never there"])
    choice = answer["choices"][0]
    assert choice["text"] == expected and choice["finish_reason"] == "stop"
    assert text_of(choice["token_ids"]).rstrip("\ufffd").startswith(expected.rstrip("\ufffd"))
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"]) < 200
    pieces = [piece["choices"][0] for piece in tiny.stream(PROMPT, max_tokens=200, stop=stop)]
    assert "".join(piece["text"] for piece in pieces) == expected and pieces[-1]["finish_reason"] == "stop"

    first = want.index(want[30])
    choice = tiny.complete(PROMPT, max_tokens=200, stop_token_ids=[want[30]])[1]["choices"][0]
    assert choice["token_ids"] == want[: first + 1] and choice["text"] == text_of(want[:first])
    assert choice["finish_reason"] == "stop"
    choice = tiny.complete(PROMPT, max_tokens=200, stop_token_ids=[want[30]], min_tokens=first + 9)[1]["choices"][0]
    ids = choice["token_ids"]  # another token in the place of each that came too early
    assert ids[:first] == want[:first] and want[30] not in ids[: first + 9]
    assert (ids[-1] == want[30]) == (choice["finish_reason"] == "stop") and ids.count(want[30]) <= 1


# ---- bad input

BAD = [
    ({"model": "llama"}, 404, "model"),
    ({"model": 3}, 400, "model"),
    ({"prompt": [1] * (CONTEXT + 10)}, 400, "prompt"),
    ({"prompt": [1] * (BLOCKS * 16 + 10)}, 400, "prompt"),
    ({"max_tokens": CONTEXT}, 400, "max_tokens"),
    ({"max_tokens": BLOCKS * 16 + 1}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "many"}, 400, "max_tokens"),
    ({"temperature": -0.5}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.5}, 400, "top_p"),
    ({"seed": 1 << 63}, 400, "seed"),
    ({"n": 2}, 400, "n"),
    ({"echo": True}, 400, "echo"),
    ({"logprobs": 5}, 400, "logprobs"),
    ({"stop": 3}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [256]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"wishes": 3}, 400, "wishes"),
]


def test_bad_requests_are_refused_by_name_and_the_engine_goes_on(tiny: Server) -> None:
    for fields, status, field in BAD:
        got, answer = tiny.complete(**{"prompt": PROMPT, "max_tokens": 4, **fields})
        assert got == status, (fields, answer)
        assert answer["error"]["param"] == field and field in answer["error"]["message"], (fields, answer)
        assert "\n" not in answer["error"]["message"]
    for body in ("{", "", "[]", "null", b"\xff\xfe", '{"model": "tiny"', "{" * 100_000):
        got, answer = tiny.request("POST", "/v1/completions", body)
        assert got == 400 and answer["error"]["message"], body[:20]
    got, answer = tiny.request("POST", "/v1/completions", {"model": "tiny"})
    assert got == 400 and answer["error"]["message"] == "prompt: is missing"
    got, answer = tiny.request("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "cat", "content": "x"}]})
    assert got == 400 and answer["error"]["param"] == "messages"
    assert tiny.request("GET", "/v2")[0] == 404
    assert tiny.request("GET", "/v1/completions")[0] == 405 and tiny.headers["allow"] == "POST"
    assert tiny.complete(PROMPT, max_tokens=8)[1]["choices"][0]["token_ids"] == offline(PROMPT, 8)


def test_who_hangs_up_frees_the_blocks(tiny: Server) -> None:
    before = tiny.metrics()
    for stream in (True, False):
        pieces = tiny.stream(PROMPT, max_tokens=1500) if stream else None
        if pieces is not None:
            next(pieces)
            assert tiny.metrics()["kv_blocks_used"] > 0
            pieces.close()
        else:
            asyncio.run(ask_and_leave(tiny))
        until(lambda: tiny.metrics()["kv_blocks_used"] == 0)
    after = tiny.metrics()
    assert after["requests_running"] == 0
    assert after["requests_aborted_total"] == before["requests_aborted_total"] + 2
    assert after["output_tokens_total"] - before["output_tokens_total"] < 3000


async def ask_and_leave(tiny: Server) -> None:
    """A request without stream; gone as soon as the engine works on it."""
    _, writer = await asyncio.open_connection("127.0.0.1", tiny.port)
    writer.write(message({"model": "tiny", "prompt": PROMPT, "max_tokens": 1500}))
    await writer.drain()
    while (await asyncio.to_thread(tiny.metrics))["requests_running"] == 0:
        pass
    writer.close()


def until(condition) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "it never came true"


def message(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (len(data), data)


def test_a_thousand_connections_at_once_are_all_answered(tiny: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("this machine allows too few file descriptors for the clients")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    try:
        answers = asyncio.run(crowd(tiny.port, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    want = offline(PROMPT, 3)
    for head, body in answers:
        assert head.startswith(b"HTTP/1.1 200"), head
        assert json.loads(body)["choices"][0]["token_ids"] == want
    assert tiny.metrics()["kv_blocks_used"] == 0


async def crowd(port: int, size: int) -> list[tuple[bytes, bytes]]:
    """All connect, then all ask."""
    connections = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(size)))
    body = message({"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "return_token_ids": True})

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[bytes, bytes]:
        writer.write(body)
        answer = await reader.read()
        writer.close()
        head, _, rest = answer.partition(b"\r\n\r\n")
        return head, rest

    return await asyncio.gather(*(ask(*connection) for connection in connections))


# ---- adapters


def test_adapters_come_and_go(tiny: Server, folders: dict[str, Path], tmp_path: Path) -> None:
    two = {"name": "two", "path": str(folders["two"])}
    assert tiny.complete(PROMPT, model="two")[0] == 404
    assert tiny.request("POST", "/v1/adapters", two)[0] == 200
    assert tiny.request("POST", "/v1/adapters", two)[0] == 409
    assert tiny.complete(PROMPT, max_tokens=20, model="two")[1]["choices"][0]["token_ids"] == offline(
        PROMPT, 20, folders["two"]
    )
    pieces = tiny.stream(PROMPT, max_tokens=1500, model="two")
    next(pieces)
    status, answer = tiny.request("DELETE", "/v1/adapters/two")
    assert status == 409 and "1 requests" in answer["error"]["message"]
    pieces.close()
    until(lambda: tiny.request("DELETE", "/v1/adapters/two")[0] == 200)
    assert tiny.complete(PROMPT, model="two")[0] == 404 and tiny.request("DELETE", "/v1/adapters/two")[0] == 404
    assert tiny.complete(PROMPT, max_tokens=20, model="one")[1]["choices"][0]["token_ids"] == offline(
        PROMPT, 20, folders["one"]
    )


def test_bad_adapters_are_refused(tiny: Server, tmp_path: Path) -> None:
    def load(folder: Path) -> str:
        status, answer = tiny.request("POST", "/v1/adapters", {"name": "bad", "path": str(folder)})
        assert status == 400, answer
        return answer["error"]["message"]

    assert "adapter_config.json" in load(tmp_path / "nowhere")
    high = write_adapter(tmp_path / "high", random_adapter(SHAPE, 32, 1), 32)
    assert "rank" in load(high)
    foreign = write_adapter(tmp_path / "foreign", random_adapter(model("qwen2-0.5b"), 4, 1), 4)
    assert "not an adapter of this model's shape" in load(foreign)
    (high / "adapter_model.safetensors").write_bytes(b"broken")
    assert "safetensors" in load(high)
    assert tiny.complete(PROMPT, max_tokens=8)[1]["choices"][0]["token_ids"] == offline(PROMPT, 8)


def test_metrics_add_up(tiny: Server) -> None:
    before = tiny.metrics()
    tiny.complete([PROMPT, PROMPT], max_tokens=10)
    after = tiny.metrics()
    more = {name: after[name] - before.get(name, 0.0) for name in after}
    assert more["prompt_tokens_total"] == 10 and more["output_tokens_total"] == 20
    assert more['requests_ended_total{reason="length"}'] == 2
    for name in ("ttft_seconds", "tpot_seconds", "e2e_seconds"):
        assert more[f"{name}_count"] == more[f'{name}_bucket{{le="+Inf"}}'] == 2 and more[f"{name}_sum"] > 0
    assert after["kv_blocks_total"] == BLOCKS
