"""dLoRA's servers: one YAML, real replicas on a CPU, the model's name selects the adapter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("uvicorn")
safetensors = pytest.importorskip("safetensors.torch")

import yaml  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import MODULES, merge, random_adapter  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402
from systems.dlora.server import main, read  # noqa: E402
from tests.integration.serving import ROOT, START_S, server  # noqa: E402

SHAPE = model("tiny")
ADAPTERS = {name: random_adapter(SHAPE, 8, i, tuple(MODULES)) for i, name in enumerate(("billing", "legal"))}
PROMPT = [5, 9, 200, 33]


def folder(root: Path, name: str) -> Path:
    """A peft checkpoint's two files."""
    made = root / name
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 8, "peft_type": "LORA"}))
    tensors = {}
    for module, pair in ADAPTERS[name].modules.items():
        for side, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = tensor
    safetensors.save_file(tensors, made / "adapter_model.safetensors")
    return made


def file(root: Path, **changes: object) -> Path:
    for name in ADAPTERS:
        if not (root / name).exists():
            folder(root, name)
    values = {
        "model": "tiny", "random_weights": True, "device": "cpu", "seed": 7, "replicas": 2, "slots": 1, "max_model_len": 256,
        "adapters": {name: name for name in ADAPTERS},
    }  # fmt: skip
    made = root / "servers.yaml"
    made.write_text(yaml.safe_dump({key: value for key, value in {**values, **changes}.items() if value is not None}))
    return made


def expected(adapter: str | None) -> list[int]:
    weights = random_weights(SHAPE, 7)
    if adapter:
        merge(SHAPE, weights, ADAPTERS[adapter])
    import numpy as np

    live = Live.build(SHAPE, weights, EngineConfig(40), max_tokens=256, prompt=lambda _: np.array(PROMPT))
    return live.generate([Request(0, 0.0, len(PROMPT), 8)])[1][0]


@pytest.mark.slow
def test_requests_reach_their_adapter_and_a_dead_replica_none(tmp_path) -> None:
    with server(tmp_path, str(file(tmp_path)), command=("-m", "systems.dlora.server"), ready=False) as made:
        told = made.wait_ready()["replicas"]
        assert [sorted(replica["adapters"]) for replica in told] == [["billing", "tiny"], ["legal", "tiny"]]
        ids = [entry["id"] for entry in made.request("GET", "/v1/models")[1]["data"]]
        assert ids == ["tiny", "billing", "legal"]
        for name in ids:
            status, answer = made.complete(PROMPT, model=name, max_tokens=8)
            assert status == 200 and answer["choices"][0]["token_ids"] == expected(None if name == "tiny" else name)
        pieces = list(made.stream(PROMPT, model="legal", max_tokens=8))
        streamed = [t for piece in pieces for choice in piece["choices"] for t in choice.get("token_ids") or []]
        assert streamed == expected("legal")
        assert made.complete(PROMPT, model="nobody")[0] == 404
        assert made.request("POST", "/v1/completions", "no json")[0] == 400
        assert made.request("GET", "/v1/other")[0] == 404
        assert made.complete(PROMPT, model="legal", max_tokens=100_000)[0] == 400  # the replica's own refusal passes through
        others = _children(made.process.pid)
        assert len(others) == 2
        os.killpg(others[1], signal.SIGKILL)  # they were started in order
        _until(lambda: not made.request("GET", "/health")[1]["replicas"][1]["alive"])
        assert made.complete(PROMPT, model="legal", max_tokens=4)[0] == 503
        for name in ("billing", "tiny"):
            assert made.complete(PROMPT, model=name, max_tokens=8)[0] == 200
        assert made.terminate() == 0
        assert all(_gone(pid) for pid in others)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


def _until(true) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


@pytest.mark.parametrize(("changes", "told"), [
    ({"policy": "credit"}, "only this is served so far"),
    ({"exec_type": "peft"}, "only this is served so far"),
    ({"machines": ["node1"]}, "write localhost"),
    ({"adapters": {"lost": "nowhere"}}, "name a PEFT adapter's folder"),
    ({"adapters": {}}, "at least 1 item"),
    ({"replicas": 1}, "raise slots or replicas"),
    ({"random_weights": None}, "give either weights"),
    ({"weights": "nowhere", "random_weights": None}, "no such folder"),
    ({"model": "tinny"}, "tiny"),
    ({"groups": 3}, "Extra inputs"),
])  # fmt: skip
def test_files_that_cannot_be_served(tmp_path, capsys, changes, told: str) -> None:
    made = file(tmp_path, **changes)
    with pytest.raises(InputError, match=told):
        read(made)
    assert main([str(made)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path / "none.yaml")]) == 2


@pytest.mark.slow
def test_a_broken_adapter_ends_all_with_its_line(tmp_path) -> None:
    made = file(tmp_path)
    (tmp_path / "legal" / "adapter_model.safetensors").write_bytes(b"cut off")
    command = [sys.executable, "-m", "systems.dlora.server", str(made)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 2 and "copy it again" in done.stderr, done.stderr
