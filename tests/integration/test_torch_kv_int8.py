"""The KV cache in int8 on a CPU: the numbers, what fits, and that every way to the same context sees the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine.cache import KVCache, rounded, token_bytes, unrounded  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.executor import fitting_blocks  # noqa: E402
from systems.common.torch_engine.memory import kv_too_large  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402

SHAPE = model("tiny")
WEIGHTS = random_weights(SHAPE, 7)
CONFIG = EngineConfig(200, max_num_batched_tokens=32, max_num_seqs=8, kv_dtype="int8")
torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(st.integers(-9, 9), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_number_is_off_by_more_than_half_a_step(power: int, seed: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(seed)) * 10.0**power).to(dtype)
    x[0, 0] = 0
    whole, scale = rounded(x)
    assert whole.dtype == torch.int8 and scale.shape == (5, 3) and whole.abs().max() <= 127
    off = (unrounded(whole, scale, torch.float64) - x.double()).abs()
    # the scale is rounded too: by 2^-11 of itself, or to float16's smallest step (of 127) and largest number
    allowed = x.double().abs().amax(-1, keepdim=True) / 127 * 0.58 + 127 * 2.0**-25
    small = x.double().abs().amax(-1, keepdim=True) < 127 * 65504
    assert bool((off <= allowed)[small.expand_as(off)].all())
    assert not whole[0, 0].any() and not bool(unrounded(whole, scale, dtype).isnan().any())


def test_what_fits_nearly_doubles() -> None:
    llama = model("llama-3.1-8b")
    assert token_bytes(llama) == llama.kv_bytes_per_token == 131072
    assert token_bytes(llama, "int8") == 2 * 32 * 8 * (128 + 2)
    memory = (120 << 30, 140 << 30)
    plain, small = (fitting_blocks(llama, memory=memory, kv_dtype=kind) for kind in ("auto", "int8"))
    assert 1.96 < small / plain < 1.97
    for kind in ("auto", "int8"):
        cache = KVCache(SHAPE, 2, 9, 4, kv_dtype=kind)
        held = [x for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None]
        assert sum(x.nbytes for x in held) == 10 * 16 * token_bytes(SHAPE, kind)
    assert "KV cache 65.0 GiB" in str(kv_too_large(llama, EngineConfig(65536, kv_dtype="int8"), 0))


def test_every_way_to_a_context_gives_the_same_tokens() -> None:
    """Prompts whole or in chunks, alone or among others, with and without preemption: the cache's numbers are the same."""
    rng = np.random.default_rng(0)
    asked = [Request(i, 0.0, int(rng.integers(1, 60)), int(rng.integers(1, 40))) for i in range(10)]
    few = replace(CONFIG, num_gpu_blocks=9, max_num_batched_tokens=40)
    configs = [CONFIG, few, replace(CONFIG, max_num_batched_tokens=512)]
    found = []
    for config in configs:
        live = Live.build(SHAPE, WEIGHTS, config, max_tokens=256)
        sequences, outputs = live.generate(asked)
        assert config is not few or sum(sequence.preemptions for sequence in sequences)
        assert bool(live.executor.cache.k.any()) and live.executor.cache.k.dtype == torch.int8
        found.append(outputs)
    assert found[0] == found[1] == found[2]
    live = Live.build(SHAPE, WEIGHTS, CONFIG, max_tokens=256)
    assert [live.generate([request])[1][0] for request in asked] == found[0]


def test_logits_are_near_those_of_the_whole_cache() -> None:
    prompt = np.random.default_rng(1).integers(0, SHAPE.vocab, 200)
    with torch.inference_mode():
        plain, small = (
            Live.build(SHAPE, WEIGHTS, replace(CONFIG, kv_dtype=kind), max_tokens=256).executor.half.score(prompt)
            for kind in ("auto", "int8")
        )
    off = float((small - plain).norm() / plain.norm())
    assert 1e-5 < off < 0.01  # 127 steps a side: about 0.4 % of a typical number


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match="use one of auto, int8"):
        EngineConfig(10, kv_dtype="fp8")


def test_the_server_takes_it() -> None:
    pytest.importorskip("pydantic")
    from systems.common.serve.config import parse
    from systems.common.serve.loading import engine

    given = ["--model", "tiny", "--random-weights", "--device", "cpu", "--max-num-seqs", "4096", "--max-model-len", "4096"]
    given += ["--max-num-batched-tokens", "4096"]
    held = {}
    for kind in ("auto", "int8"):
        with engine(parse([*given, "--kv-dtype", kind, "--attention-backend", "sdpa"])) as live:
            assert live.executor.choices["kv_dtype"] == ("fp32" if kind == "auto" else "int8")
            assert live.executor.choices["attention"] == "sdpa"
            held[kind] = live.engine.config.num_gpu_blocks
            assert live.generate([Request(0, 0.0, 20, 5)])[1][0]
    assert held["int8"] / held["auto"] == pytest.approx(4 * 16 / 18, rel=0.01)  # float32 here, heads of 16
    with pytest.raises(InputError, match="kv_dtype"):
        parse([*given, "--kv-dtype", "fp8"])
    with pytest.raises(InputError, match="needs Triton, a GPU"), engine(parse([*given, "--attention-backend", "triton"])):
        pass
