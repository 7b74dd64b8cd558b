"""`python -m systems.common.calibrate` and `measure`, on a CPU with the tiny shape: the procedure, not the numbers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from systems.common.calibrate.write import Folder
from systems.common.errors import InputError

pytest.importorskip("torch")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_a_calibration_has_every_table_and_is_replaced_whole(tmp_path: Path) -> None:
    from systems.common.hardware.calibrated import read_calibration

    out = tmp_path / "tiny"
    arguments = ["--model", "tiny", "--gpu", "h200", "--device", "cpu", "--runs", "3", "--out", str(out)]
    for _ in range(2):
        done = run("systems.common.calibrate", *arguments)
        assert done.returncode == 0, done.stderr
        assert {p.name for p in out.iterdir()} == {
            "layer.csv", "embedding.csv", "head.csv", "attention.csv", "prompts.csv", "adapters.csv", "copies.csv", "steps.csv",
            "check.csv", "engine.yaml", "meta.yaml",
        }  # fmt: skip
        (out / "stale.csv").write_text("gone with the next run")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    rows = list(csv.DictReader((out / "attention.csv").open()))
    assert any(row["n_decode"] != "0" and row["prefill_chunk"] != "0" for row in rows)
    assert all(float(row["time_us"]) > 0 for row in rows)
    # a CPU's numbers never pass for a GPU's
    (out / "layer.csv").write_text("tokens,time_us\n1,10\n")
    calibration = read_calibration(out)
    assert (calibration.gpu, calibration.model) == ("cpu", "tiny")
    assert calibration.engine.num_gpu_blocks == 64


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    from systems.common.hardware.calibrated import read_calibration
    from systems.common.hardware.tables import read_prompts

    out = tmp_path / "tiny"
    arguments = ["--model", "tiny", "--gpu", "h200", "--device", "cpu", "--runs", "3", "--budget-s", "0.001", "--out", str(out)]
    done = run("systems.common.calibrate", *arguments)
    assert done.returncode == 0, done.stderr
    meta = yaml.safe_load((out / "meta.yaml").read_text())
    assert meta["left_out"] == {"adapters": "1 of 1 points", "copies": "1 of 1 points"}
    assert {k for k, *_ in read_prompts(out / "prompts.csv")} == {1, 2}, "the thin grid is measured whatever it takes"
    assert read_calibration(out).engine.num_gpu_blocks == 64
    sustained = yaml.safe_load((out / "engine.yaml").read_text())["sustained"]
    assert sustained["behind_decode_us"] > 0 and sustained["back_to_back_us"] > 0


def test_all_reduces_are_measured_by_size(tmp_path: Path) -> None:
    from systems.common.hardware.tables import read_all_reduce

    out = tmp_path / "all_reduce.csv"
    done = run("systems.common.calibrate.all_reduce", "--gpus", "2", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    curve = read_all_reduce(out, 2)
    assert curve.xs == (8192, 16384, 32768) and min(curve.ys) > 0
    refused = run("systems.common.calibrate.all_reduce", "--gpus", "1", "--device", "cpu", "--out", str(tmp_path / "one.csv"))
    assert refused.returncode == 2 and "--gpus" in refused.stderr and not (tmp_path / "one.csv").exists()


def test_measure_serves_in_real_time(tmp_path: Path) -> None:
    requests = tmp_path / "three.csv"
    requests.write_text("arrival_s,input_tokens,output_tokens\n0,20,5\n0.05,40,8\n0.4,10,3\n")
    again = tmp_path / "again.csv"
    again.write_text("arrival_s,input_tokens,output_tokens\n0,30,6\n")
    done = run(
        "systems.common.measure", "--requests", str(requests), str(again), "--model", "tiny", "--device", "cpu",
        "--num-gpu-blocks", "200", "--max-num-batched-tokens", "512", "--max-model-len", "600", "--log-steps",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for file, outputs in ((requests, [5, 8, 3]), (again, [6])):
        rows = list(csv.DictReader((tmp_path / "out" / file.stem / "requests.csv").open()))
        assert [int(row["output_tokens"]) for row in rows] == outputs
        for row in rows:
            assert float(row["queued_s"]) <= float(row["scheduled_s"]) < float(row["first_token_s"]) <= float(row["finish_s"])
    steps = list(csv.DictReader((tmp_path / "out" / "three" / "steps.csv").open()))
    summary = json.loads((tmp_path / "out" / "three" / "summary.json").read_text())
    assert len(steps) == summary["gpu_steps"] and [float(s["ended_s"]) for s in steps] == sorted(
        float(s["ended_s"]) for s in steps
    )
    assert {s["decode_rows"] for s in steps} >= {"0", "1"}
    assert summary["finished"] == 3 and summary["attention"] == "sdpa"
    assert summary["measured_s"] >= 0.4  # the last one arrived then


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("calibrate", ("--model", "tiny", "--gpu", "h2000", "--out", "x"), "h200"),
        ("calibrate", ("--model", "tinny", "--gpu", "h200", "--out", "x"), "tiny"),
        ("calibrate", ("--model", "tiny", "--gpu", "h200", "--runs", "1", "--out", "x"), "--runs"),
        ("calibrate", ("--model", "tiny", "--gpu", "h200", "--out", "x"), "--device"),
        ("calibrate", ("--model", "tiny", "--gpu", "h200", "--budget-s", "0", "--out", "x"), "--budget-s"),
        ("measure", ("--requests", "absent.csv", "--model", "tiny", "--out", "x"), "absent.csv"),
        ("measure", ("--requests", "r.csv", "--model", "tiny", "--out", "x"), "--device"),
        ("measure", ("--requests", "r.csv", "--model", "tiny", "--device", "cpu", "--out", "x"), "--num-gpu-blocks"),
        (
            "measure",
            ("--requests", "r.csv", "--model", "tiny", "--device", "cpu", "--num-gpu-blocks", "2", "--max-num-batched-tokens",
             "512", "--max-model-len", "64", "--out", "x"),
            "num_gpu_blocks",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    module: str, arguments: tuple[str, ...], words: str,
) -> None:  # fmt: skip
    import importlib

    import torch

    if torch.cuda.is_available() and words == "--device":
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    Path("r.csv").write_text("arrival_s,input_tokens,output_tokens\n0,20,50\n")
    command = importlib.import_module(
        "systems.common.calibrate.__main__" if module == "calibrate" else "systems.common.measure"
    )
    assert command.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not Path("x").exists()


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    folder = Folder()
    folder.mapping("meta.yaml", {"gpu": "cpu"})
    with pytest.raises(InputError, match="other files"):
        folder.write(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_sum_of_operators_is_the_step() -> None:
    """The pieces that are timed are the pieces of a step: run with a clock that counts calls, nothing is left out or twice."""
    import torch

    from systems.common.calibrate.bench import Bench
    from systems.common.calibrate.dense import _body, _without_attention
    from systems.common.models import model

    shape = model("tiny")
    bench = Bench.build(shape, torch.device("cpu"), 8, 32)
    whole, half = _without_attention(bench, 2), _without_attention(bench, 1)
    counted = {"linear": 0}
    real = torch.nn.functional.linear

    def counting(*given: object, **more: object) -> object:
        counted["linear"] += 1
        return real(*given, **more)

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counting)
        calls = []
        for built in (whole, half):
            counted["linear"] = 0
            _body(bench, built, 4)
            calls.append(counted["linear"])
    assert calls[0] - calls[1] == 4 and calls[1] == 5  # qkv, o, up, down of one layer; the head beside them
    assert replace(bench.weights, layers=bench.weights.layers[:1]).head is bench.weights.head
