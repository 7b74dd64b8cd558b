"""Deployments over several ranks for real (gloo on a CPU): an uneven pipeline, a rank's death, quantised weights."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from systems.common.core import Request
from systems.common.models import model
from systems.maveriq.controller.core import Core
from systems.maveriq.controller.driver import Controller
from systems.maveriq.controller.engines import session
from systems.maveriq.controller.launch import serving
from systems.maveriq.controller.library import Library
from systems.maveriq.controller.memory import Budgets
from systems.maveriq.controller.queues import ModelQueues
from systems.maveriq.search import Wish
from tests.unit.test_maveriq_decide import fingerprints

pytest.importorskip("torch")
pytest.importorskip("uvicorn")

LAYERS = 6
LIMIT_S = 240
OPTIONS = ("--device", "cpu", "--max-model-len", "1200", "--kv-blocks", "160")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the safetensors of two models of six layers."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    import torch

    from systems.common.torch_engine import weights as engine_weights

    shape, made = replace(model("tiny"), layers=LAYERS), torch.Generator().manual_seed(1)
    tensors = {}

    def source(name, size):
        scale = 1.0 if "norm" in name else 0.2
        return tensors.setdefault(name, scale * (torch.ones(size) if "norm" in name else torch.randn(size, generator=made)))

    engine_weights.build(shape, source)
    config = {
        "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": shape.hidden, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "intermediate_size": shape.mlp,
        "vocab_size": shape.vocab, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
    }  # fmt: skip
    root = tmp_path_factory.mktemp("weights")
    for name in ("six", "other"):
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    facts = {"layers": LAYERS, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 128, "vocab": 256}
    (folder / "models.yaml").write_text(json.dumps({"models": {"six": facts, "other": facts}}))
    prints = fingerprints(folder / "prints.csv", models=("six", "other"))
    return Library.read(prints, models=folder / "models.yaml")


def node(library, weights, total_gib, one_rank=False):
    core = Core(library.search(), ModelQueues())
    budgets = Budgets(tuple(total_gib), (0.0,) * len(total_gib))
    return Controller(core, budgets, serving("model", OPTIONS, weights, one_rank), library)


def ids(port, name, prompt, tokens):
    """Greedy token ids, asked of the engine itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["choices"][0]["token_ids"]


def ranks(engine):
    return [pid for pid in engine.processes() if "parallel.rank" in " ".join(psutil.Process(pid).cmdline())]


def one_process(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """What the engine without controller, server and ranks says."""
    from systems.common.engine.config import EngineConfig
    from systems.common.serve.loading import shape_of
    from systems.common.torch_engine.drivers import Live
    from systems.common.torch_engine.weights import load_safetensors

    shape, given, _ = shape_of(json.loads((folder / "config.json").read_text()), folder, "six")
    config = EngineConfig(64, "chunked-prefill", max_num_batched_tokens=128, max_num_seqs=1)
    loaded = load_safetensors(shape, folder, "cpu")
    live = Live.build(shape, loaded, config, max_tokens=1000, given=given, prompt=lambda _: np.array(prompt))
    return live.generate([Request(0, 0.0, len(prompt), tokens)])[1][0]


@pytest.mark.slow
def test_an_uneven_pipeline_says_what_one_process_says_and_survives_the_death_of_a_rank(library, weights: Path):
    async def scenario():
        async with node(library, weights, (9.3, 3.6)) as several:
            await several.deploy("b", Wish("other", "min_mem", output_length=8, strategy="none"))
            wish = Wish("six", "min_mem", fp16_only=True, output_length=600, strategy="none")
            found = await several.deploy("a", wish)  # neither GPU holds it, and one has more room
            assert (found.decision.configuration.tp, found.decision.placement.pp_map) == (1, (4, 2))
            engine, other = several._engines["a"], several._engines["b"]
            assert len(ranks(engine)) == 1 and ranks(other) == []
            assert engine.launch.differs == other.launch.differs == ()
            assert "--quantization int8" in " ".join(other.launch.argv)
            expected = one_process(weights / "six", [1, 2, 3], 40)
            assert await asyncio.to_thread(ids, engine.port, "six", [1, 2, 3], 40) == expected
            _, asked = several.submit("a", "hello")
            _, beside = several.submit("b", "hello")
            while several.core.running().get("a") is None:
                await asyncio.sleep(0.001)
            os.kill(ranks(engine)[0], signal.SIGKILL)
            answer = await asked
            assert (answer.error, answer.tries) == ("", 2)
            assert answer.text == bytes(one_process(weights / "six", [*b"hello"], 600)).decode(errors="replace")
            assert not (await beside).error
            assert several._engines["b"] is other and several._engines["a"] is not engine
            assert session(engine.pid) == []  # all its processes, so all its memory
            pids = [one["pid"] for one in several.status()]
        assert [session(pid) for pid in pids] == [[], []]

    asyncio.run(asyncio.wait_for(scenario(), LIMIT_S))
