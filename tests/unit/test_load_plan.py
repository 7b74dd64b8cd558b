"""Which requests a run sends, and what they look like."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.core import SLO_PRESETS, Slo
from systems.common.errors import InputError
from systems.common.load import options, plan
from systems.common.load.api import KINDS, Api
from systems.common.load.connection import Target
from systems.common.load.prompts import Ids, Words
from systems.common.workloads import Workload, build


def workload(*words: str, seed: int = 0) -> Workload:
    return plan.workload(options.sources(options.parser().parse_args(words)), seed)


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        given_options = options.parser().parse_args(words)
        made = plan.workload(options.sources(given_options), given_options.seed)
        options.limits(given_options, len(made))
        options.prompts(given_options, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flags_are_a_declaration() -> None:
    declared = {"arrivals": "poisson", "rate_rps": 5, "requests": 40, "lengths": "fixed", "input_tokens": 9, "output_tokens": 4}
    expected = build({**declared, "adapters": 3}, {}, 7)
    made = workload("--rate", "5", "--count", "40", "--input-tokens", "9", "--output-tokens", "4", "--adapters", "3", seed=7)
    assert made.requests == expected.requests and made.requests[1].adapter == "adapter-1"


def test_sharegpt_means_the_dataset_behind_vllms_filter() -> None:
    made = workload("--rate", "5", "--duration", "60", "--lengths", "sharegpt")
    assert 200 < len(made) < 400 and made.input_tokens.max() <= 1024 and "stand-in" in made.notes[0]


def test_a_file_of_requests_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,input_tokens,output_tokens,adapter,more\n0.5,10,3,,x\n0.75,20,4,a,y\n")
    made = workload("--requests", str(path))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.adapter) for r in made.requests] == [
        (0.5, 10, 3, None),
        (0.75, 20, 4, "a"),
    ]
    assert "says which requests already" in refusal("--requests", str(path), "--rate", "2")
    assert "workload" in refusal("--requests", str(path), "--workload", str(path))


def test_a_declaration_in_a_file_and_flags_over_it(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(
        "workload: {arrivals: deterministic, rate_rps: 2, seconds: 10, lengths: fixed, input_tokens: 5, output_tokens: 6}\n"
    )
    assert len(workload("--workload", str(path))) == 20
    assert len(workload("--workload", str(path), "--rate", "4")) == 40
    made = workload("--workload", str(path), "--count", "3", "--output-tokens", "9")
    assert len(made) == 3 and made.output_tokens.tolist() == [9, 9, 9]


@pytest.mark.parametrize("words", [("--rate", "inf"), ("--concurrency", "4"), ("--rate", "inf", "--concurrency", "4")])
def test_a_closed_loop_needs_no_arrivals(words: tuple[str, ...]) -> None:
    text = (*words, "--count", "7", "--input-tokens", "9", "--output-tokens", "4")
    assert len(workload(*text)) == 7
    bounds = options.limits(options.parser().parse_args(text), 7)
    assert bounds.concurrency == (4 if "--concurrency" in words else 7)


def test_a_closed_loop_on_a_declaration_ignores_its_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(
        "{arrivals: mmpp, rates_rps: [1, 8], dwell_s: [60, 15], requests: 30,"
        " lengths: fixed, input_tokens: 5, output_tokens: 6}\n"
    )
    assert len(workload("--workload", str(path), "--concurrency", "2")) == 30


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--rate 2 --input-tokens 3 --output-tokens 3", "how many requests"),
        ("--rate 2 --count 4", "lengths"),
        ("--count 4 --input-tokens 3 --output-tokens 3", "rate_rps"),
        ("--rate 0 --count 4 --input-tokens 3 --output-tokens 3", "rate_rps"),
        ("--rate nan --count 4 --input-tokens 3 --output-tokens 3", "rate_rps"),
        ("--rate 2 --count 4 --input-tokens 0 --output-tokens 3", "input_tokens"),
        ("--rate 2 --count 4 --duration 3 --input-tokens 3 --output-tokens 3", "requests, seconds"),
        ("--rate 2 --concurrency 4 --count 4 --input-tokens 3 --output-tokens 3", "--rate"),
        ("--concurrency 0 --count 4 --input-tokens 3 --output-tokens 3", "--concurrency"),
        ("--concurrency 2 --duration 4 --input-tokens 3 --output-tokens 3", "--count"),
        ("--rate 2 --count 4 --input-tokens 3 --output-tokens 3 --timeout 0", "--timeout"),
        ("--rate 2 --count 4 --input-tokens 3 --output-tokens 3 --grace -1", "--grace"),
        ("--rate 2 --count 4 --input-tokens 3 --output-tokens 3 --warmup -1", "--warmup"),
        ("--rate 2 --count 4 --input-tokens 3 --output-tokens 3 --vocab 0", "--vocab"),
        ("--rate 2 --count 4 --input-tokens 3 --output-tokens 3 --prompts ids --kind openai", "--prompts"),
        ("--rate 2 --count 4 --input-tokens 3 --output-tokens 3 --prompts ids --route chat", "--prompts"),
        ("--rate 2 --count 4 --lengths nowhere", "nowhere"),
        ("--rate 2 --count 4 --lengths sharegpt --dataset x", "--dataset"),
        ("--rate 1e-9 --duration 1 --input-tokens 3 --output-tokens 3", "--duration"),
        ("--workload /no/such.yaml", "/no/such.yaml"),
        ("--requests /no/such.csv", "/no/such.csv"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: str, part: str) -> None:
    assert part in refusal(*words.split())


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "3", "", "1: 2"])
def test_a_file_that_declares_nothing_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    assert str(path) in refusal("--workload", str(path))


def test_limits_by_name_and_by_value() -> None:
    assert plan.slo("mlperf-llama3.1-8b") is SLO_PRESETS["mlperf-llama3.1-8b"]
    assert plan.slo("ttft=0.5, tpot=0.05") == Slo(ttft_s=0.5, tpot_s=0.05)
    for text in ("", "ttft", "ttft=x", "ttft=-1", "latency=3", "ttft=0", "ttft=nan"):
        with pytest.raises(InputError, match="--slo"):
            plan.slo(text)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 40_000))
def test_prompts_have_the_exact_length_and_follow_from_the_seed(seed: int, sizes: list[int], vocab: int) -> None:
    ours, theirs = Ids(seed, vocab), Ids(seed, vocab)
    for size in sizes:
        ids = ours.make(size)
        assert len(ids) == size and ids == theirs.make(size)
        assert all(isinstance(place, int) and 0 <= place < vocab for place in ids)
    words = Words(seed)
    assert [len(words.make(size).split()) for size in sizes] == sizes


def test_prompts_share_no_beginning() -> None:
    ids = Ids(0, 32000)
    assert len({tuple(ids.make(8)) for _ in range(200)}) == 200
    assert Ids(0, 10, frozenset({0, 1})).make(500) != [] and min(Ids(0, 10, frozenset({0, 1})).make(500)) == 2


def test_text_of_an_exact_length_under_a_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from systems.common.load.prompts import Texts

    letters = {chr(97 + i): i for i in range(26)}
    merged = {**letters, " ": 26, "ab": 27, "<s>": 28}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(merged, [("a", "b")]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = Texts(3, tmp_path)
    for size in (1, 2, 17, 100):
        text = texts.make(size)
        assert len(tokenizer.encode(text).ids) == size and "<s>" not in text
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    for folder in (tmp_path / "bad", tmp_path / "none"):
        with pytest.raises(InputError, match="--tokenizer"):
            Texts(0, folder)


def body_of(request: bytes) -> tuple[str, dict[str, Any]]:
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return head.decode(), json.loads(body)


def test_a_request_forces_the_length_where_the_server_can() -> None:
    api = Api(Target.parse("http://h:1", "--url"), "m", adapter_model="lora/{adapter}", extra={"top_p": 0.5})
    head, body = body_of(api.request([1, 2], 9, "a", "run-1"))
    assert head.startswith("POST /v1/completions HTTP/1.1\r\nHost: h:1\r\n") and "X-Request-Id: run-1" in head
    assert body["prompt"] == [1, 2] and body["max_tokens"] == 9 and body["ignore_eos"] is True and body["stream"] is True
    assert body["model"] == "lora/a" and body["top_p"] == 0.5 and body["temperature"] == 0
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_openais_own_api_gets_no_field_that_it_does_not_know() -> None:
    api = Api(Target.parse("https://h/base", "--url"), "m", kind="openai", route="chat", api_key="k")
    head, body = body_of(api.request("hello", 9))
    assert head.startswith("POST /base/chat/completions HTTP/1.1\r\nHost: h:443\r\n") and "Authorization: Bearer k" in head
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert body.keys() == {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
    assert api.hide("wrong key: k!") == "wrong (hidden)ey: (hidden)!" and api.hide("") == ""
    assert "Bearer" not in repr(api) and "api_key" not in repr(api)
    assert {"vllm", "sglang", "fivefold", "openai"} == set(KINDS)


@pytest.mark.parametrize(
    "url", ["h:1", "ftp://h", "http://", "http://h:x", "http://h/v1?a=b", "http://h\n/v1", "http://h:99999"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="--url"):
        Target.parse(url, "--url")


def test_addresses() -> None:
    assert Target.parse("http://h:1/", "--url") == Target("h", 1, "/v1")
    assert Target.parse("https://h/a/v2/", "--url") == Target("h", 443, "/a/v2", tls=True)
    assert Target.parse("http://[::1]:8000/v1", "--url").url == "http://[::1]:8000/v1"
    with pytest.raises(InputError) as caught:
        Target.parse("http://me:hunter2@h/v1", "--url")
    assert "hunter2" not in str(caught.value)


def test_keys_come_by_reference_and_are_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("s3cret\n")
    assert options.api_key(f"file:{path}") == "s3cret"
    assert options.api_key("env:K", {"K": "abc"}) == "abc"
    assert options.api_key(None) is None
    for reference in ("s3cret", "env:", "env:MISSING", f"file:{tmp_path / 'no'}"):
        with pytest.raises(InputError) as caught:
            options.api_key(reference, {})
        assert "s3cret" not in str(caught.value)
    with pytest.raises(InputError, match="characters") as caught:
        options.api_key("env:K", {"K": "a\r\nX-Evil: 1"})
    assert "Evil" not in str(caught.value)


def test_further_fields_are_json() -> None:
    assert options.extra('{"a": [1]}') == {"a": [1]}
    for text in ("", "[]", "{", "3"):
        with pytest.raises(InputError, match="--extra"):
            options.extra(text)


def test_an_open_loop_waits_for_all_answers_unless_told_otherwise() -> None:
    bounds = options.limits(options.parser().parse_args(["--rate", "2"]), 5)
    assert bounds.concurrency is None and bounds.grace_s == math.inf and bounds.timeout_s == 600
