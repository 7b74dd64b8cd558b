"""Several ranks (gloo, CPU) against one: logits, tokens under both policies, adapters, sampling, quantised weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.engine.engine import Engine  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import ModelShape, model  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import ATTENTION_SITES, MODULES, random_adapter  # noqa: E402
from systems.common.torch_engine.parallel.executor import start  # noqa: E402
from systems.common.torch_engine.placement import layout  # noqa: E402
from systems.common.torch_engine.sampling import Sampling  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402

SHAPE = replace(model("tiny"), layers=4)
# a vocabulary that does not go to all ranks evenly, fewer kv heads than ranks
GROUPED = ModelShape("grouped", 2, 64, 8, 2, 16, 160, 131, tied=True, qkv_biases=True, dtype="fp32")
GPT = ModelShape("gpt", 4, 64, 4, 4, 16, 128, 131, gated=False, tied=True, biases=True, positions=260, dtype="fp32")
CHUNKED = EngineConfig(200, "chunked-prefill", max_num_batched_tokens=32, max_num_seqs=8)
PREEMPTING = EngineConfig(9, "chunked-prefill", max_num_batched_tokens=40, max_num_seqs=8)
PREFILL_FIRST = EngineConfig(200, "prefill-first", max_num_batched_tokens=128, max_num_seqs=8)
torch.set_num_threads(1)


def requests(count: int, adapters: Sequence[str | None] = (None,)) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(i, 0.0, int(rng.integers(1, 60)), int(rng.integers(2, 25)), adapters[i % len(adapters)]) for i in range(count)
    ]


def sampling(request: Request) -> Sampling:
    """Every third request is greedy; every fourth stops at any even token, but not before its seventh."""
    stops = frozenset(range(0, SHAPE.vocab, 2)) if request.index % 4 == 0 else frozenset()
    i = request.index
    return Sampling((0.0, 0.7, 1.3)[i % 3], (1.0, 0.8)[i % 2], i, stops, min_tokens=6)


def compare(shape: ModelShape, tp: int, pp_map: list[int], config: EngineConfig, dtype: str | None = None) -> None:
    """All that one start of the ranks can show, against a single rank."""
    weights = random_weights(shape, 7, dtype=dtype)
    sites = tuple(MODULES) if shape.gated else ATTENTION_SITES
    options = {"max_tokens": 256, "adapters": (2, 16, sites)}
    whole = Live.build(shape, weights, config, **options)
    adapters = {name: random_adapter(shape, rank, rank, sites) for name, rank in (("a", 4), ("b", 16))}
    with start(shape, layout(shape, tp, pp_map=pp_map), config, seed=7, dtype=dtype, **options) as several:
        prompt = np.random.default_rng(0).integers(0, shape.vocab, 70)
        expected = whole.executor.half.score(prompt)
        found = several.score(prompt)
        assert found.shape == (70, shape.vocab)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        live = Live(Engine(config, several), several)
        several.attach(live.engine)
        for executor in (whole.executor, several):
            for name, adapter in adapters.items():
                executor.adapters.load(name, adapter)
        rounds = [("greedy", (None,)), ("adapters", ("a", None, "b")), ("sampled", (None, "a"))]
        for name, used in rounds:
            asked = [replace(r, index=100 * len(name) + r.index) for r in requests(9, used)]
            for each in (whole, live):
                each.executor.sampling = sampling if name == "sampled" else lambda _: Sampling()
            together, alone = live.generate(asked), whole.generate(asked)
            assert together[1] == alone[1], name
        assert config is not PREEMPTING or live.engine.state.preemptions > 0
        assert len({tuple(tokens) for tokens in alone[1]}) > 4
        several._reconcile()
        assert several.tables.free_blocks == config.num_gpu_blocks
        processes = list(several.cluster._processes)
    assert [process.returncode for process in processes] == [0] * (tp * len(pp_map) - 1)


@pytest.mark.parametrize(
    ("shape", "tp", "pp_map", "config"),
    [
        pytest.param(SHAPE, 2, [4], PREEMPTING, id="tp2"),
        pytest.param(SHAPE, 1, [1, 3], PREFILL_FIRST, id="pp-1-3"),
        pytest.param(SHAPE, 1, [2, 2], replace(CHUNKED, kv_dtype="int8"), id="pp-2-2-int8-cache"),
        pytest.param(GPT, 2, [1, 3], CHUNKED, id="tp2-pp-1-3-gpt"),
        pytest.param(GROUPED, 4, [2], CHUNKED, id="tp4-of-2-kv-heads"),
    ],
)
def test_ranks_together_equal_one(shape: ModelShape, tp: int, pp_map: list[int], config: EngineConfig) -> None:
    compare(shape, tp, pp_map, config)


@pytest.mark.parametrize(("dtype", "tp", "pp_map"), [("int8", 1, [1, 3]), ("int4", 2, [4])])
def test_quantised_ranks_equal_one(dtype: str, tp: int, pp_map: list[int]) -> None:
    """Each rank quantises the whole matrix and keeps its part: the very same numbers as without ranks."""
    compare(replace(SHAPE, hidden=128, heads=4, head_dim=64, mlp=384), tp, pp_map, CHUNKED, dtype)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [SHAPE, GROUPED, GPT], ids=lambda shape: shape.name)
def test_parts_are_the_whole(shape: ModelShape, tp: int) -> None:
    """No process: every row and column of the whole is some rank's, kv heads that are shared and padding apart."""
    if shape.heads % tp:
        with pytest.raises(InputError, match=r"use one of 1, 2, 4$"):
            layout(shape, tp)
        return
    cut = layout(shape, tp, pp_map=[1, shape.layers - 1])
    whole = random_weights(shape, 3)
    for stage in range(2):
        places = [cut.place(shape, stage * tp + r) for r in range(tp)]
        parts = [random_weights(shape, 3, place=place) for place in places]
        if stage == 0:
            joined = torch.cat([part.embedding for part in parts])
            assert torch.equal(joined[: shape.vocab], whole.embedding) and not joined[shape.vocab :].any()
        else:
            assert torch.equal(torch.cat([part.head for part in parts])[: shape.vocab], whole.head)
            assert all(torch.equal(part.norm.gain, whole.norm.gain) for part in parts)
        for i, layer in enumerate(range(places[0].layers.begin, places[0].layers.end)):
            one, several = whole.layers[layer], [part.layers[i] for part in parts]
            assert torch.equal(torch.cat([s.o.weight for s in several], 1), one.o.weight)
            assert torch.equal(torch.cat([s.down.weight for s in several], 1), one.down.weight)
            halves = zip(*(s.up.weight.chunk(2 if shape.gated else 1) for s in several), strict=True)
            assert torch.equal(torch.cat([torch.cat(half) for half in halves]), one.up.weight)
            q, k, v = one.qkv.weight.split([shape.q_width, shape.kv_width, shape.kv_width])
            for part, place in zip(several, places, strict=True):
                local = place.local(shape)
                mine = part.qkv.weight.split([local.q_width, local.kv_width, local.kv_width])
                group = shape.heads // shape.kv_heads
                for head in range(local.heads):  # each query head meets the keys it met before
                    rows = slice(head * 16, head * 16 + 16)
                    at = place.q.begin + head * 16
                    assert torch.equal(mine[0][rows], q[at : at + 16])
                    kv_head = (place.q.begin // 16 + head) // group * 16
                    local_kv = head // (local.heads // local.kv_heads) * 16
                    for cut_kv, whole_kv in ((mine[1], k), (mine[2], v)):
                        assert torch.equal(cut_kv[local_kv : local_kv + 16], whole_kv[kv_head : kv_head + 16])
            if shape.biases:
                assert [s.o.bias is not None for s in several] == [True] + [False] * (tp - 1)


def test_uneven_shares() -> None:
    llama = model("llama-2-7b")
    cut = layout(llama, 4, pp=3)
    assert cut.pp_map == (11, 11, 10)
    widths = [cut.place(llama, r, 128).mlp.size for r in range(4)]
    assert sum(widths) == llama.mlp and all(w % 128 == 0 for w in widths) and max(widths) - min(widths) == 128
    assert {cut.place(llama, r).mlp.size for r in range(4)} == {llama.mlp // 4}


def test_a_split_that_cuts_a_group_is_refused_before_any_rank_starts() -> None:
    with pytest.raises(
        InputError, match=r"^parallel: tp: 2: a rank's heads are 32 wide and would cut a group of 64: use fewer"
    ):
        start(replace(SHAPE, mlp=384), layout(SHAPE, 2), CHUNKED, dtype="int4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3}, "4 heads and 2 kv heads: use one of 1, 2, 4"),
        ({"tp": 0}, "use one of 1, 2, 4"),
        ({"pp": 5}, "has 4 layers: give 1 to 4 stages"),
        ({"pp_map": [2, 1]}, "4 in all"),
        ({"pp_map": [4, 0]}, "each at least 1"),
        ({"pp_map": []}, "4 in all"),
    ],
)
def test_splits_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout(SHAPE, **options)
