"""What users write: settings and bodies of requests; what machines read: metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from systems.common.errors import InputError
from systems.common.serve.config import parse
from systems.common.serve.metrics import Histogram, Metrics
from systems.common.serve.protocol import Chat, Completion, explain
from systems.common.serve.served import Adapters

RANDOM = ["--model", "tiny", "--random-weights"]


def test_defaults_and_names() -> None:
    config = parse(RANDOM)
    assert (config.host, config.port, config.policy, config.name) == ("127.0.0.1", 0, "chunked-prefill", "tiny")
    assert parse([*RANDOM, "--served-model-name", "x"]).name == "x"


def test_a_file_and_options_that_override_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: tiny\nrandom-weights: true\nport: 9000\nmax_num_seqs: 4\n")
    config = parse(["--config", str(file), "--port", "9001"])
    assert (config.port, config.max_num_seqs, config.random_weights) == (9001, 4, True)


def test_layers_of_pipeline_stages(tmp_path: Path) -> None:
    config = parse([*RANDOM, "--tensor-parallel-size", "2", "--pipeline-layers", "20,12"])
    assert (config.pipeline_layers, config.stages, config.ranks) == ((20, 12), 2, 4)
    file = tmp_path / "serve.yaml"
    file.write_text("model: tiny\nrandom_weights: true\npipeline_layers: [3, 2, 1]\n")
    assert parse(["--config", str(file)]).ranks == 3
    assert parse([*RANDOM, "--pipeline-parallel-size", "3"]).stages == 3
    assert parse([*RANDOM, "--pipeline-parallel-size", "2", "--pipeline-layers", "20,12"]).stages == 2
    for wrong in ("", "20,", "20,0", "20,x", "1.5"):
        with pytest.raises(InputError, match="pipeline_layers"):
            parse([*RANDOM, "--pipeline-layers", wrong])
    with pytest.raises(InputError, match="names 2 groups: leave one of the two out"):
        parse([*RANDOM, "--pipeline-parallel-size", "3", "--pipeline-layers", "20,12"])


def test_adapters_by_name(tmp_path: Path) -> None:
    for name in ("a", "b=c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    config = parse([*RANDOM, "--adapter", f"x={tmp_path / 'a'}", "--adapter", f"y={tmp_path / 'b=c'}"])
    assert config.adapter == {"x": tmp_path / "a", "y": tmp_path / "b=c"}
    for wrong in ("x", "=a", "x="):
        with pytest.raises(InputError, match="write NAME=DIR"):
            parse([*RANDOM, "--adapter", wrong])
    with pytest.raises(InputError, match="base model is called so"):
        parse([*RANDOM, "--adapter", f"tiny={tmp_path / 'a'}"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: [", "is no YAML"),
        ("- tiny", "write keys and values"),
        ("model: tiny\nrandom_weights: true\nspeed: 9", "speed: 9"),
        ("model: tiny\nrandom_weights: true\nport: 70000", "port: 70000"),
        ("model: tiny\nrandom_weights: true\ngpu_memory_utilization: 0", "gpu_memory_utilization: 0"),
        ("random_weights: true", "random weights need a shape"),
        ("model: tiny", "exactly one of"),
        ("model: tiny\nrandom_weights: true\nweights: .", "exactly one of"),
        ("model: tinny\nrandom_weights: true", "use one of tiny"),
    ],
)
def test_bad_settings_are_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as raised:
        parse(["--config", str(file)])
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_help_needs_no_torch() -> None:
    script = "import sys, systems.common.serve.server, systems.common.serve.__main__; sys.exit('torch' in sys.modules)"
    pytest.importorskip("uvicorn")
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---- bodies


def body(**fields: object) -> str:
    return json.dumps({"model": "m", "prompt": "p", **fields})


def test_prompts_in_all_forms() -> None:
    for prompt, want in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ):
        assert Completion.model_validate_json(body(prompt=prompt)).prompts == want


def test_neutral_values_of_what_is_not_done_pass() -> None:
    """As the OpenAI client and vLLM's benchmark send them."""
    fields = {
        "n": 1, "best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "top_k": -1, "min_p": 0, "logit_bias": {}, "user": "me", "stop": None, "suffix": None,
        "temperature": None, "top_p": 1, "stream_options": {"include_usage": True}, "ignore_eos": True, "min_tokens": 3,
    }  # fmt: skip
    Completion.model_validate_json(body(**fields))
    Chat.model_validate_json(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "logprobs": False}))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": True}, "temperature"), ({"max_tokens": 1.5}, "max_tokens"), ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[]]}, "prompt"), ({"stream_options": {"x": 1}}, "stream_options"), ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"), ({"top_k": 5}, "top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"), ({"best_of": 3}, "best_of"), ({"min_tokens": -1}, "min_tokens"),
    ],
)  # fmt: skip
def test_the_field_to_blame_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Completion.model_validate_json(body(**fields))
    named, complaint = explain(raised.value)
    assert named.partition(".")[0] == field and complaint and "\n" not in complaint


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = Chat.model_validate_json(json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}))
    assert chat.messages[0].plain == {"role": "user", "content": "ab"}


# ---- metrics


@given(st.lists(st.floats(0, 200), max_size=50))
def test_a_histogram_counts_as_prometheus_does(values: list[float]) -> None:
    histogram = Histogram((0.5, 1.0, 100.0))
    for value in values:
        histogram.observe(value)
    metrics = Metrics(ttft_s=histogram)
    lines = metrics.text({}, {}).splitlines()
    for bound in ("0.5", "1", "100"):
        want = sum(value <= float(bound) for value in values)
        assert f'fivefold_ttft_seconds_bucket{{le="{bound}"}} {want}' in lines
    assert f'fivefold_ttft_seconds_bucket{{le="+Inf"}} {len(values)}' in lines
    assert f"fivefold_ttft_seconds_count {len(values)}" in lines


def test_every_family_is_declared_once_and_large_numbers_stay_exact() -> None:
    metrics = Metrics()
    metrics.output_tokens.add(123_456_789_012)
    metrics.answered(200)
    text = metrics.text({"kv_blocks_used": ("Blocks.", 3)}, {"preemptions_total": ("Thrown out.", 4)})
    assert "fivefold_output_tokens_total 123456789012\n" in text and "fivefold_kv_blocks_used 3\n" in text
    declared = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))
    for line in text.splitlines():
        if not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            assert any(name in (family, f"{family}_bucket", f"{family}_sum", f"{family}_count") for family in declared), line


def test_users_of_an_adapter_are_counted_while_they_last() -> None:
    adapters = Adapters(["a"])
    with adapters.using("a"), adapters.using("a"), adapters.using(None):
        assert adapters.users("a") == 2
    with pytest.raises(RuntimeError), adapters.using("a"):
        raise RuntimeError
    assert adapters.users("a") == 0
