"""What goes wrong with ranks and at start: a rank or rank 0 dies, weights are bad, memory is short. One line, nobody left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.engine.engine import Engine  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine import device, memory, weights  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.executor import fitting_blocks  # noqa: E402
from systems.common.torch_engine.parallel.cluster import Cluster, RankError  # noqa: E402
from systems.common.torch_engine.parallel.executor import start  # noqa: E402
from systems.common.torch_engine.parallel.plan import decode, encode  # noqa: E402
from systems.common.torch_engine.parallel.spec import Spec  # noqa: E402
from systems.common.torch_engine.placement import layout  # noqa: E402

SHAPE = replace(model("tiny"), layers=4)
CONFIG = EngineConfig(200, "chunked-prefill", max_num_batched_tokens=32, max_num_seqs=8)
torch.set_num_threads(1)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rank_that_dies_ends_all() -> None:
    executor = start(SHAPE, layout(SHAPE, 1, pp_map=[2, 1, 1]), CONFIG, seed=7, max_tokens=256)
    try:
        live = Live(Engine(CONFIG, executor), executor)
        executor.attach(live.engine)
        pids = [process.pid for process in executor.cluster._processes]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        steps = []

        def kill_one(*_: object) -> None:
            steps.append(1)
            if len(steps) == 5:
                os.kill(pids[1], signal.SIGKILL)

        executor.on_tokens = kill_one
        with pytest.raises(RankError, match=r"^rank 2 of 3 died \(killed by SIGKILL\); all ranks have ended$"):
            live.generate([Request(i, 0.0, 20, 200) for i in range(4)])
        assert not any(alive(pid) for pid in pids)
        with pytest.raises(RankError, match="rank 2"):
            executor.score(np.arange(3))
    finally:
        executor.close()


LEADER = """
import sys
from dataclasses import replace
from systems.common.engine.config import EngineConfig
from systems.common.models import model
from systems.common.torch_engine.parallel.executor import start
from systems.common.torch_engine.parallel.spec import Spec  # noqa: E402
from systems.common.torch_engine.placement import layout
shape = replace(model("tiny"), layers=4)
executor = start(shape, layout(shape, 1, pp_map=[2, 2]), EngineConfig(20, max_num_batched_tokens=32, max_num_seqs=8))
print(*[process.pid for process in executor.cluster._processes], flush=True)
sys.stdin.read()
"""


def test_ranks_die_with_rank_0(root: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEADER], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdout is not None
        pids = [int(word) for word in leader.stdout.readline().split()]
        assert len(pids) == 1 and alive(pids[0])
        leader.kill()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)


STUCK = """
import os, socket, subprocess, tempfile, threading
from systems.common.torch_engine.parallel import cluster
cluster.GRACE_S = 0.2
server = socket.create_server(("127.0.0.1", 0))
theirs = socket.create_connection(server.getsockname())
made = cluster.Cluster(2)
made._leashes = [cluster.Wire(server.accept()[0])]
made._processes.append(subprocess.Popen(["false"]))
made._words.append(tempfile.TemporaryFile())
made._wake = os.pipe()
threading.Thread(target=made._watch, daemon=True).start()
with made.guard():
    theirs.close()
    threading.Event().wait()
"""


def test_rank_0_does_not_hang_in_a_collective_that_cannot_be_broken_off(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr == "rank 1 of 2 died (exit code 1); all ranks have ended\n"


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a whole model, written as two files."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors: dict[str, torch.Tensor] = {}

    def source(name: str, size: tuple[int, ...]) -> torch.Tensor:
        return tensors.setdefault(name, torch.full(size, 0.01))

    weights.build(SHAPE, source)
    first = {name: tensor for name, tensor in tensors.items() if "layers.3" not in name}
    safetensors.save_file(first, folder / "first.safetensors")
    safetensors.save_file({n: t for n, t in tensors.items() if n not in first}, folder / "second.safetensors")
    return tensors


@pytest.mark.parametrize("late", [False, True])
def test_what_a_rank_finds_wrong_is_told_by_rank_0(tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last stage reads layer 3; `late`: rank 0 listens only when the watchdog has seen that rank's end."""
    if late:
        clusters, begin, build = [], Cluster.start, Spec.weights

        def started(self: Cluster) -> None:
            clusters.append(self)
            begin(self)

        def slow(self: Spec, rank: int) -> weights.Weights:
            assert clusters[0]._failed.wait(60)
            return build(self, rank)

        monkeypatch.setattr(Cluster, "start", started)
        monkeypatch.setattr(Spec, "weights", slow)
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = saved(tmp_path)
    bad = {n: t for n, t in tensors.items() if "layers.3" in n} | {"model.layers.3.mlp.down_proj.weight": torch.ones(64, 99)}
    safetensors.save_file(bad, tmp_path / "second.safetensors")
    with pytest.raises(
        InputError, match=r"second\.safetensors: model\.layers\.3\.mlp\.down_proj\.weight: \(64, 99\)"
    ) as caught:
        start(SHAPE, layout(SHAPE, 1, pp_map=[3, 1]), CONFIG, folder=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_bad_weights_name_file_and_tensor(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = saved(tmp_path)
    loaded = weights.load_safetensors(SHAPE, tmp_path, place=layout(SHAPE, 2).place(SHAPE, 1))
    assert torch.equal(loaded.layers[3].down.weight, tensors["model.layers.3.mlp.down_proj.weight"][:, 64:])
    second = tmp_path / "second.safetensors"
    whole = second.read_bytes()
    for size in (4, 60, len(whole) - 5):  # in the length, in the header, in the data
        second.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"second\.safetensors: weights: .*: not a whole safetensors file"):
            weights.load_safetensors(SHAPE, tmp_path)
    kept = {n: t for n, t in tensors.items() if "layers.3" in n and "up_proj" not in n}
    safetensors.save_file(kept, second)
    with pytest.raises(InputError, match=r"tensor: 'model\.layers\.3\.mlp\.up_proj\.weight': missing"):
        weights.load_safetensors(SHAPE, tmp_path)


def test_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "free_bytes", lambda: 3 * 2**30)
    given = weights.random_weights(SHAPE, 1)
    monkeypatch.setattr(device, "KVCache", full)
    with pytest.raises(InputError, match=r"num_gpu_blocks: 9999999: weights 0\.0 GiB, KV cache .* GiB, free 3\.0 GiB: lower"):
        Live.build(SHAPE, given, EngineConfig(9999999), max_tokens=64)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_bytes", lambda: 3 * 2**30)
    monkeypatch.setattr(weights, "build", full)
    llama = model("llama-3.1-70b")
    with pytest.raises(InputError, match=r"model: 'llama-3.1-70b': its weights need 131\.\d GiB .* 3\.0 GiB free: use int8"):
        weights.random_weights(llama)
    with pytest.raises(InputError, match=r"its weights need 18\.4 GiB"):  # 34.2e9 parameters at 0.5156 bytes, half the ends
        weights.random_weights(llama, place=layout(llama, 2).place(llama, 0), dtype="int4")
    with pytest.raises(InputError, match=r"gpu_memory_utilisation: 0.9: no room for a KV cache: 139\.0 GiB of 140\.0 GiB hold"):
        fitting_blocks(llama, memory=(2**30, 140 * 2**30))


def test_a_plan_says_what_was_called() -> None:
    calls = [
        ("rows", [np.arange(5), np.empty(0, np.int64)]),
        ("decode", [7, 1, 0]),
        ("warm", []),
        ("tables", [np.array([3]), np.arange(2), np.array([-1])]),
    ]
    found = list(decode(np.concatenate([encode(name, *arguments) for name, arguments in calls])))
    assert [name for name, _ in found] == [name for name, _ in calls]
    for (_, expected), (_, got) in zip(calls, found, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))
