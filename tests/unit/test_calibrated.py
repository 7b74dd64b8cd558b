"""The `calibrated` hardware source: its reader, its costs, and the padding of a measured engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from systems.common import simulate
from systems.common.core import Request
from systems.common.engine.config import EngineConfig
from systems.common.engine.engine import Engine, serve
from systems.common.engine.executor import Batch
from systems.common.engine.padding import Padding
from systems.common.engine.sequence import Sequence
from systems.common.engine.simulated import IterationCost, SimulatedExecutor
from systems.common.errors import InputError
from systems.common.hardware import CalibratedCosts, Chunk, costs
from systems.common.hardware.calibrated import read_calibration
from systems.common.models import model

TABLES = {
    "layer.csv": "tokens,time_us\n1,100\n128,150\n1024,900\n",
    "embedding.csv": "tokens,time_us\n1,5\n1024,20\n",
    "head.csv": "sequences,time_us\n1,300\n512,700\n",
    "attention.csv": "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
    "0,0,1,128,10\n0,0,1,1024,20\n0,0,64,128,30\n0,0,64,1024,160\n64,0,0,0,15\n1024,0,0,0,120\n64,0,64,128,40\n",
    "steps.csv": "rows,context,chunk,past,time_us\n1,512,0,0,4000\n64,512,0,0,6000\n0,512,64,0,5000\n0,512,1024,0,25000\n"
    "64,128,64,0,9000\n64,128,1024,0,30000\n",
}
ENGINE = {
    "num_gpu_blocks": 1000,
    "block_tokens": 16,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 512,
    "graphs": {"decode": [1, 2, 4, 8, 64], "rows": [0, 16, 64], "tokens": [32, 64, 128], "prompt_tokens": 64, "chunks": 8},
    "host_us": 20.0,
}
META = {"gpu": "h200", "model": "llama-3.1-8b", "dtype": "bf16"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "calibrated"
    made.mkdir()
    for name, text in TABLES.items():
        (made / name).write_text(text)
    (made / "engine.yaml").write_text(yaml.safe_dump(ENGINE))
    (made / "meta.yaml").write_text(yaml.safe_dump(META))
    return made


def test_measured_points_are_returned_as_measured(folder: Path) -> None:
    cost = costs("llama-3.1-8b", "h200", operators=folder)
    assert isinstance(cost, CalibratedCosts) and cost.source == "calibrated on h200"
    assert cost.layer_linear_s(128) == pytest.approx(150e-6)
    assert cost.head_s(512) == pytest.approx(700e-6)
    assert cost.embedding_s(1) == pytest.approx(5e-6)
    assert cost.attention_s([], 64, 64 * 1024) == pytest.approx(160e-6)
    assert cost.attention_s([Chunk(1024)], 0, 0) == pytest.approx(120e-6)
    assert cost.attention_s([Chunk(64)], 64, 64 * 128) == pytest.approx(40e-6)
    assert cost.all_reduce_s(1 << 20) == 0.0


def test_engine_facts_are_read(folder: Path) -> None:
    facts = read_calibration(folder).engine
    assert (facts.num_gpu_blocks, facts.host_s) == (1000, pytest.approx(20e-6))
    assert facts.padding.decode_rows(5) == 8 and facts.padding.decode_rows(65) == 65
    assert facts.padding.mixed(3, 40, 1) == (16, 64, 24)
    assert facts.padding.mixed(0, 100, 1) == (0, 100, 1)  # prompts alone take graphs up to 64 tokens only
    assert facts.padding.is_graph(16, 128) and facts.padding.is_graph(0, 64) and not facts.padding.is_graph(0, 128)
    assert not facts.padding.is_graph(3, 64) and not facts.padding.is_graph(16, 40)
    assert facts.padding.mixed(3, 40, 9) == (3, 40, 12)  # more chunks than a graph takes
    assert facts.padding.mixed(65, 40, 1) == (65, 40, 66)


@given(st.integers(0, 700), st.integers(1, 3000), st.integers(1, 12))
def test_padding_never_shrinks_a_batch(rows: int, tokens: int, chunks: int) -> None:
    padding = Padding((1, 2, 4, 8), (0, 16, 32), (32, 64, 128), 64, 8)
    padded = padding.mixed(rows, tokens, chunks)
    assert padded[0] >= rows and padded[1] >= tokens and padded[2] >= rows + chunks
    assert Padding().mixed(rows, tokens, chunks) == (rows, tokens, rows + chunks)
    assert padding.decode_rows(rows) >= rows == Padding().decode_rows(rows)


def test_the_simulated_engine_pays_for_padding(folder: Path) -> None:
    cost = costs("llama-3.1-8b", "h200", operators=folder)
    padding = read_calibration(folder).engine.padding
    plain, padded = (IterationCost(cost, model("llama-3.1-8b"), 0.0, p) for p in (Padding(), padding))
    assert padded.decode(8, 800).first_s == plain.decode(8, 800).first_s
    more = padded.decode(5, 800).first_s - plain.decode(5, 800).first_s
    expected = 32 * (cost.layer_linear_s(8) - cost.layer_linear_s(5)) + cost.embedding_s(8) - cost.embedding_s(5)
    assert more == pytest.approx(expected + cost.head_s(8) - cost.head_s(5))
    batch = Batch([], 0, 0)
    batch.chunks.append((None, 0, 40))  # type: ignore[arg-type]
    assert padded.batch_s(batch) - plain.batch_s(batch) == pytest.approx(
        32 * (cost.layer_linear_s(64) - cost.layer_linear_s(40))
        + cost.embedding_s(64) - cost.embedding_s(40) + cost.head_s(8) - cost.head_s(1)
    )  # fmt: skip


def test_whole_steps_come_back_as_measured(folder: Path) -> None:
    cost = costs("llama-3.1-8b", "h200", operators=folder)
    assert isinstance(cost, CalibratedCosts)
    whole = IterationCost(cost, model("llama-3.1-8b"), rest_s=cost.rest_s)
    for (chunk, past, rows, context), step_s in cost.calibration.steps.items():
        if chunk:
            batch = Batch([(None, past, chunk)], rows, rows * context)  # type: ignore[list-item]
            assert whole.batch_s(batch) == pytest.approx(step_s)
        else:
            assert whole.decode(rows, rows * context).first_s == pytest.approx(step_s)
    between = whole.decode(64, 64 * 1024).first_s - 6000e-6
    assert between == pytest.approx(32 * (cost.attention_s([], 64, 64 * 1024) - cost.attention_s([], 64, 64 * 512)))
    assert IterationCost(cost, model("llama-3.1-8b"), 7e-6, rest_s=cost.rest_s).rest_s(1, 0, 1) == cost.rest_s(1, 0) + 7e-6


def test_simulate_takes_the_engines_facts(folder: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.csv"
    requests.write_text("arrival_s,input_tokens,output_tokens\n0,64,5\n0,64,5\n")
    out = tmp_path / "out"
    arguments = ["--requests", str(requests), "--model", "llama-3.1-8b", "--hardware", "h200", "--operators", str(folder)]
    assert simulate.main([*arguments, "--out", str(out)]) == 0
    summary = yaml.safe_load((out / "summary.json").read_text())
    assert summary["num_gpu_blocks"] == 1000 and summary["hardware_model"] == "calibrated on h200"
    assert simulate.main([*arguments, "--overhead-us", "5000", "--out", str(tmp_path / "slow")]) == 0
    slow = yaml.safe_load((tmp_path / "slow" / "summary.json").read_text())
    steps = summary["engine_steps"]
    assert slow["duration_s"] - summary["duration_s"] == pytest.approx(steps * (5000e-6 - 20e-6), rel=1e-6)


BAD = {
    "another model": ("meta.yaml", {**META, "model": "llama-2-7b"}, "model"),
    "another gpu": ("meta.yaml", {**META, "gpu": "cpu"}, "gpu"),
    "no dtype": ("meta.yaml", {"gpu": "h200", "model": "llama-3.1-8b"}, "dtype"),
    "no blocks": ("engine.yaml", {**ENGINE, "num_gpu_blocks": 0}, "num_gpu_blocks"),
    "blocks no number": ("engine.yaml", {**ENGINE, "num_gpu_blocks": "many"}, "num_gpu_blocks"),
    "host time negative": ("engine.yaml", {**ENGINE, "host_us": -1}, "host_us"),
    "sizes unsorted": ("engine.yaml", {**ENGINE, "graphs": {"decode": [4, 2]}}, "graphs.decode"),
    "sizes no list": ("engine.yaml", {**ENGINE, "graphs": {"rows": 4}}, "graphs.rows"),
    "graphs no mapping": ("engine.yaml", {**ENGINE, "graphs": [1]}, "graphs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_yaml_is_refused(folder: Path, case: str) -> None:
    name, content, key = BAD[case]
    (folder / name).write_text(yaml.safe_dump(content))
    with pytest.raises(InputError) as error:
        costs("llama-3.1-8b", "h200", operators=folder)
    assert error.value.key == key and name in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("layer.csv", "tokens,time_us\n1,0\n", "column time_us, row 2"),
        ("layer.csv", "tokens,time_us\n1,nan\n", "column time_us, row 2"),
        ("head.csv", "rows,time_us\n1,5\n", "column"),
        ("steps.csv", "rows,context,chunk,past,time_us\n1,512,0,0,4000\n", "column chunk"),
        ("steps.csv", "rows,context,chunk,past,time_us\n1,512,8,0,4000\n", "column rows"),
        ("attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,128,10\n", "column prefill_chunk"),
        ("attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n8,0,0,0,10\n", "column n_decode"),
    ],
)
def test_bad_tables_are_refused(folder: Path, name: str, text: str, key: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(InputError) as error:
        costs("llama-3.1-8b", "h200", operators=folder)
    assert error.value.key == key


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="calibrate"):
        read_calibration(folder / "nowhere")
    (folder / "engine.yaml").unlink()
    with pytest.raises(InputError, match=r"engine\.yaml"):
        read_calibration(folder)
    with pytest.raises(InputError, match="one GPU"):
        (folder / "engine.yaml").write_text(yaml.safe_dump(ENGINE))
        costs("llama-3.1-8b", "h200x2", tp=2, operators=folder)
    with pytest.raises(InputError, match="operators"):
        costs("llama-3.1-8b", "h200", source="calibrated")


def served(folder: Path, arrivals_s: list[float], ahead: bool) -> list[Sequence]:
    """Requests of 64 tokens in and 30 out, by an engine that launches ahead or not."""
    cost = IterationCost(costs("llama-3.1-8b", "h200", operators=folder), model("llama-3.1-8b"))
    executor = SimulatedExecutor(cost, 0.002, ahead)
    engine = Engine(EngineConfig(1000), executor)
    requests = [Request(i, at, 64, 30) for i, at in enumerate(arrivals_s)]
    return serve(engine, requests, ahead=executor if ahead else None)


def test_a_request_joins_a_batch_only_before_it_is_formed(folder: Path) -> None:
    first = served(folder, [0.0], ahead=True)[0]
    plain = served(folder, [0.0], ahead=False)[0]
    assert first.first_token_s == plain.first_token_s and first.finish_s == pytest.approx(plain.finish_s)
    prefill_s, step_s = first.first_token_s, (first.finish_s - first.first_token_s) / 29
    # in the middle of the prompt's step: the step after it was formed when the prompt's began, so it waits for two
    late = served(folder, [0.0, prefill_s / 2], ahead=True)[1]
    assert late.scheduled_s == pytest.approx(prefill_s + step_s, rel=0.02)
    assert served(folder, [0.0, prefill_s / 2], ahead=False)[1].scheduled_s == pytest.approx(prefill_s)
    # in a decode step: until 2 ms before its end it joins the next one, afterwards the one after that
    begins = prefill_s + 9 * step_s
    early = served(folder, [0.0, begins + step_s - 0.0022], ahead=True)[1]
    missed = served(folder, [0.0, begins + step_s - 0.0018], ahead=True)[1]
    assert early.scheduled_s == pytest.approx(begins + step_s, rel=0.01)
    assert missed.scheduled_s == pytest.approx(begins + 2 * step_s, rel=0.01)


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_launching_ahead_never_serves_before_arrival(folder: Path, gaps_s: list[float]) -> None:
    arrivals_s = [sum(gaps_s[: i + 1]) for i in range(len(gaps_s))]
    for sequence in served(folder, arrivals_s, ahead=True):
        assert sequence.arrival_s <= sequence.scheduled_s < sequence.first_token_s < sequence.finish_s


# ---- several prompts in a step, and steps without a graph

PROMPTS = (
    "prompts,tokens,n_decode,kv_decode,time_us\n"
    "1,64,16,512,20\n2,64,16,512,24\n4,64,16,512,26\n1,256,16,512,40\n4,256,16,512,70\n"
)


def test_further_prompts_cost_what_they_were_measured_to_add(folder: Path) -> None:
    without = costs("llama-3.1-8b", "h200", operators=folder)
    (folder / "prompts.csv").write_text(PROMPTS)
    cost = costs("llama-3.1-8b", "h200", operators=folder)
    one = cost.attention_s([Chunk(64)], 0, 0)
    assert one == without.attention_s([Chunk(64)], 0, 0), "a single prompt is as before"
    assert cost.attention_s([Chunk(64)] * 2, 0, 0) - one == pytest.approx(4e-6)
    assert cost.attention_s([Chunk(64)] * 4, 0, 0) - one == pytest.approx(6e-6)
    assert cost.attention_s([Chunk(64)] * 9, 0, 0) - one == pytest.approx(8 * 2e-6), "beyond the most: as in steps of the most"
    unlike = cost.attention_s([Chunk(64), Chunk(256), Chunk(64), Chunk(64)], 0, 0)
    assert unlike - cost.attention_s([Chunk(256)], 0, 0) == pytest.approx(3 * 2e-6), "the largest is the first"
    assert cost.attention_s([Chunk(160)] * 4, 0, 0) - cost.attention_s([Chunk(160)], 0, 0) == pytest.approx(3 * 6e-6)
    beside = cost.attention_s([Chunk(64)] * 2, 64, 64 * 128) - cost.attention_s([Chunk(64)], 64, 64 * 128)
    assert beside == pytest.approx(4e-6), "decodes are paid for once"


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=8), st.integers(1, 1500))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_prompts_does_not_matter_and_one_more_is_never_cheaper(folder: Path, tokens: list[int], more: int) -> None:
    (folder / "prompts.csv").write_text(
        "prompts,tokens,n_decode,kv_decode,time_us\n1,64,16,512,20\n2,64,16,512,24\n4,64,16,512,34\n"
    )
    cost = costs("llama-3.1-8b", "h200", operators=folder)
    seconds = cost.attention_s([Chunk(n) for n in tokens], 0, 0)
    assert cost.attention_s([Chunk(n) for n in reversed(tokens)], 0, 0) == pytest.approx(seconds)
    assert cost.attention_s([Chunk(n) for n in (*tokens, more)], 0, 0) >= seconds - 1e-12


@pytest.mark.parametrize("text", ["prompts,tokens,n_decode,time_us\n1,8,1,5\n", PROMPTS + "2,8,16,512,0\n"])
def test_bad_prompts_are_refused(folder: Path, text: str) -> None:
    (folder / "prompts.csv").write_text(text)
    with pytest.raises(InputError, match=r"prompts\.csv"):
        costs("llama-3.1-8b", "h200", operators=folder)


def test_steps_without_a_graph_depend_on_all_their_tokens(folder: Path) -> None:
    """Rows and prompt tokens are alike to every operator but attention; with a graph the padded sizes count."""
    graphs = "1,512,0,0,4000\n64,512,0,0,6000\n0,512,64,0,5000\n16,512,64,0,5600\n64,512,64,0,7000\n"
    steps = graphs + "0,512,1024,0,25000\n32,512,2016,0,49000\n"
    (folder / "steps.csv").write_text("rows,context,chunk,past,time_us\n" + steps)
    cost = costs("llama-3.1-8b", "h200", operators=folder)
    assert isinstance(cost, CalibratedCosts)
    rest_s = cost.rest_s
    assert rest_s(24, 1000) == rest_s(0, 1024) == rest_s(1, 1023), "one curve"
    between = (rest_s(0, 1024) + rest_s(32, 2016)) / 2
    assert rest_s(100, 1436) == pytest.approx(between)
    each_s = (rest_s(0, 1024) / 1024 + rest_s(32, 2016) / 2048) / 2
    assert rest_s(100, 4000) == pytest.approx(4100 * each_s), "beyond the largest in proportion to the tokens"
    assert rest_s(0, 2049) >= rest_s(0, 2048)
    assert rest_s(16, 64) == pytest.approx(5600e-6 - 32 * cost.attention_s([Chunk(64)], 16, 16 * 512)), "a graph's own size"
