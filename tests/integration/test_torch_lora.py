"""Adapters: every backend against each request alone on merged weights, the merged model against peft."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import MODULES, Adapter, AdapterBank, merge, random_adapter  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402
from tests.integration.test_torch_model import SHAPES, engine, hugging_face, prefill  # noqa: E402

SHAPE = model("tiny")
ALL = tuple(MODULES)
CONFIG = EngineConfig(200, "chunked-prefill", max_num_batched_tokens=32, max_num_seqs=8)
torch.set_num_threads(1)


@pytest.mark.parametrize("sites", [("qkv", "o"), ALL])
@pytest.mark.parametrize("backend", ["einsum", "bmm"])
def test_each_request_as_if_alone_on_merged_weights(backend: str, sites: tuple[str, ...]) -> None:
    weights = random_weights(SHAPE, 7)
    adapters = {f"a{i}": random_adapter(SHAPE, rank, i, sites) for i, rank in enumerate((4, 8, 16))}
    live = Live.build(SHAPE, weights, CONFIG, max_tokens=256, adapters=(3, 16, sites), lora=backend)
    for name, adapter in adapters.items():
        live.executor.adapters.load(name, adapter)
    rng = np.random.default_rng(1)
    asked = [Request(i, 0.0, int(rng.integers(1, 50)), 12, (None, "a0", "a1", "a2")[i % 4]) for i in range(10)]
    _, together = live.generate(asked)
    for request, tokens in zip(asked, together, strict=True):
        merged = copy.deepcopy(weights)
        if request.adapter:
            merge(SHAPE, merged, adapters[request.adapter])
        _, alone = Live.build(SHAPE, merged, CONFIG, max_tokens=256).generate([replace(request, adapter=None)])
        assert alone == [tokens], request
    assert len({tuple(t) for t in together}) > 1


def test_merged_equals_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors.torch")
    from systems.common.torch_engine import weights as weights_module

    shape, given = SHAPES["llama"]
    other = hugging_face("llama", shape, given)
    model, _ = engine(shape, given)
    model.weights = weights_module.load(shape, copy.deepcopy(other.state_dict()))
    names = [name.split(".")[-1] for modules in MODULES.values() for name in modules]
    other = peft.get_peft_model(
        other, peft.LoraConfig(r=4, lora_alpha=12, target_modules=names, init_lora_weights=False)
    ).eval()
    other.save_pretrained(tmp_path)
    adapter = Adapter.from_peft(safetensors.load_file(tmp_path / "adapter_model.safetensors"), rank=4, alpha=12)
    tokens = torch.randint(0, shape.vocab, (40,))
    before = prefill(model, tokens)
    merge(shape, model.weights, adapter)
    with torch.no_grad():
        expected = other(tokens[None]).logits[0]
    torch.testing.assert_close(prefill(model, tokens), expected, atol=1e-4, rtol=1e-4)
    merge(shape, model.weights, adapter, sign=-1)
    torch.testing.assert_close(prefill(model, tokens), before, atol=1e-4, rtol=1e-4)


def test_what_the_bank_refuses() -> None:
    bank = AdapterBank(SHAPE, 1, 8, 4)
    with pytest.raises(InputError, match="higher than the bank's"):
        bank.load("big", random_adapter(SHAPE, 32, 0))
    with pytest.raises(InputError, match="applies adapters to"):
        bank.load("wide", random_adapter(SHAPE, 8, 0, ALL))
    bank.load("one", random_adapter(SHAPE, 8, 0))
    with pytest.raises(InputError, match="full"):
        bank.load("two", random_adapter(SHAPE, 8, 1))
    with pytest.raises(InputError, match="auto or one of"):
        AdapterBank(SHAPE, 1, 8, 4, backend="slow")
    live = Live.build(SHAPE, random_weights(SHAPE, 7), CONFIG, max_tokens=256)
    with pytest.raises(InputError, match="no adapter is loaded"):
        live.submit(Request(0, 0.0, 3, 3, "nobody"))
