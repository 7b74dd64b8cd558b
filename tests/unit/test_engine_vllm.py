"""benchmarks/engine_vllm.py against a stand-in for vLLM that answers at once: what it writes, and that its processes end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import engine_vllm

SCRIPT = Path(engine_vllm.__file__)
FILES = {
    "__init__.py": """
class SamplingParams:
    def __init__(self, **given):
        self.__dict__ |= given
__version__ = "stand-in"
""",
    "sampling_params.py": "class RequestOutputKind:\n    DELTA, FINAL_ONLY = 'delta', 'final'\n",
    "engine/arg_utils.py": "AsyncEngineArgs = dict\n",
    "lora/request.py": """
from pathlib import Path
class LoRARequest:
    def __init__(self, name, number, path):
        assert number > 0 and (Path(path) / "adapter_model.safetensors").is_file()
        self.name = name
""",
    "v1/engine/async_llm.py": """
import asyncio, os
from pathlib import Path
class AsyncLLM:
    @classmethod
    def from_engine_args(cls, args):
        assert (Path(args["model"]) / "config.json").is_file()
        self, self.args, self.known = cls(), args, set()
        if args.get("enable_lora"):
            if os.environ["FAKE"] == "crash":
                raise RuntimeError("no adapters today")
            near = Path(os.environ["FAKE_PID"] + ".part")
            near.write_text(str(os.getpid()))
            near.rename(os.environ["FAKE_PID"])
        return self
    async def add_lora(self, request):
        self.known.add(request.name)
    async def generate(self, prompt, want, request_id, lora_request=None):
        assert all(type(token) is int for token in prompt["prompt_token_ids"])
        assert lora_request is None or lora_request.name in self.known
        if os.environ["FAKE"] == "hang" and want.max_tokens == 200:
            await asyncio.sleep(600)
        for _ in range(want.max_tokens if want.output_kind == "delta" else 1):
            await asyncio.sleep(0)
            yield "output"
    def shutdown(self):
        pass
""",
}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The script with the stand-in on its path."""
    for name, text in FILES.items():
        file = tmp_path / "site/vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAKE", "well")
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    (tmp_path / "load.json").write_text(json.dumps([[i * 0.5, 20, 1 + i % 5] for i in range(700)]))
    words = ["--folder", tmp_path / "model", "--out", tmp_path / "vllm.json", "--workload", tmp_path / "load.json"]
    return [sys.executable, str(SCRIPT), *map(str, words), "--adapters", "2"]


def result(folder: Path) -> dict[str, Any]:
    """What was written."""
    found: dict[str, Any] = json.loads((folder / "vllm.json").read_text())
    return found


def gone(folder: Path) -> bool:
    """Whether the second engine's process ended."""
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_all_parts(command: list[str], tmp_path: Path) -> None:
    """Each part is written; the open loop keeps to 70 % of what was found for saturation."""
    ended = subprocess.run([*command, "--span-s", "0.05"], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    found = result(tmp_path)
    assert set(found["decode"]) == {"1", "32", "128"} and set(found["prefill"]) == {"128", "512", "2048"}
    assert found["decode"]["128"]["runs"] == 2 * 61
    assert found["open"]["rate_rps"] == pytest.approx(0.7 * found["saturation_rps"])
    assert found["open"]["requests"] == sum(i * 0.5 / found["open"]["rate_rps"] < 0.05 for i in range(700))
    assert found["lora"]["ratio"] == found["lora"]["2"]["ms"] / found["lora"]["none"]["ms"]
    assert "errors" not in found and gone(tmp_path)


def test_second_engine_fails(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with adapters that does not come up costs its own part only."""
    monkeypatch.setenv("FAKE", "crash")
    ended = subprocess.run([*command, "--parts", "prefill,lora"], capture_output=True, text=True, timeout=60, check=False)
    found = result(tmp_path)
    assert ended.returncode == 1
    assert "512" in found["prefill"] and list(found["errors"]) == ["lora"]
    assert "no adapters today" in (tmp_path / "vllm_lora.log").read_text()


def test_limit(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that never ends is given up at the limit; what was measured before it stays."""
    monkeypatch.setenv("FAKE", "hang")
    began = time.monotonic()
    ended = subprocess.run(
        [*command, "--parts", "decode,offline", "--limit-s", "6"], capture_output=True, text=True, timeout=60, check=False
    )
    found = result(tmp_path)
    assert ended.returncode == 1 and time.monotonic() - began < 30
    assert "32" in found["decode"] and list(found["errors"]) == ["offline"]


def test_told_to_end(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM takes the second engine's process along."""
    monkeypatch.setenv("FAKE", "hang")
    words = [*command, "--parts", "offline,lora"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("engine ready" in line for line in process.stdout)
            (other,) = psutil.Process(process.pid).children()
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGKILL
    assert not other.is_running()


def test_adapters_are_peft_folders(tmp_path: Path) -> None:
    """Names, shapes and numbers as safetensors reads them; no two adapters are alike."""
    pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    first, other = (safetensors.load_file(f / "adapter_model.safetensors") for f in engine_vllm.write_adapters(tmp_path, 2))
    assert len(first) == 32 * 4 * 2
    for name, shape in (("q_proj.lora_A", (16, 4096)), ("k_proj.lora_B", (1024, 16)), ("o_proj.lora_B", (4096, 16))):
        tensor = first[f"base_model.model.model.layers.31.self_attn.{name}.weight"]
        assert tuple(tensor.shape) == shape and str(tensor.dtype) == "torch.bfloat16"
        assert float(tensor.float().std()) == pytest.approx(0.02, rel=0.05)
        assert float((tensor != other[f"base_model.model.model.layers.31.self_attn.{name}.weight"]).float().mean()) > 0.9
    assert json.loads((tmp_path / "adapter1/adapter_config.json").read_text())["r"] == 16
