"""`python -m systems.llmstation.calibrate` on a CPU with the tiny shape: the procedure, not the numbers."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torch")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "systems.llmstation.calibrate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


TINY = ("--model", "tiny", "--gpu", "h200", "--device", "cpu")


def test_every_part_gives_rows_that_the_simulator_reads(tmp_path: Path) -> None:
    from systems.common.hardware.interference import GREEN, MPS, STEADY, STREAMS
    from systems.common.hardware.interference_table import read_interference
    from systems.llmstation.tuning_table import read_tuning

    (tmp_path / "meta.yaml").write_text("gpu: h200\n")
    done = run(*TINY, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = yaml.safe_load((tmp_path / "corun.yaml").read_text())
    assert (told["gpu"], told["failed"], told["left_out"]) == ("cpu", {}, {})
    assert list(told["seconds"]) == ["mps", "streams", "tasklets", "green", "lengths"]
    assert (tmp_path / "meta.yaml").read_text() == "gpu: h200\n", "the calibration's own files stay"
    with (tmp_path / "corun.csv").open() as file:
        rows = list(csv.DictReader(file))
    ways = Counter((row["way"], row["sm_limit"]) for row in rows)
    assert set(ways) == {(MPS, "0.5000"), (MPS, "1.0000"), (STREAMS, "1.0000"), (STEADY, "1.0000"), (GREEN, "0.4848")}
    assert {row["tuning_tokens"] for row in rows if row["way"] == STEADY} == {"16", "8"}
    assert {row["serving_phase"] for row in rows if row["way"] == STREAMS} == {"decode"}, "prompts pause a planner's tuning"
    table = read_interference(tmp_path / "corun.csv")
    assert table.limits("decode", "backward", MPS) == [0.5, 1.0]
    assert table.limits("idle", "forward", GREEN) == [0.4848]
    assert set(read_tuning(tmp_path / "tuning.csv").times_s["forward"]) == {8, 16}


def test_parts_can_be_picked_and_a_budget_ends_them(tmp_path: Path) -> None:
    done = run(*TINY, "--parts", "tasklets,green", "--budget-s", "0.001", "--out", str(tmp_path))
    assert done.returncode == 1, "nothing was measured"
    told = yaml.safe_load((tmp_path / "corun.yaml").read_text())
    assert told["left_out"] == {"tasklets": "all", "green": "all"}
    assert not (tmp_path / "corun.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "tinny", "--gpu", "h200"), "tiny"),
        (("--model", "tiny", "--gpu", "h2000"), "h200"),
        (("--model", "tiny", "--gpu", "h200", "--parts", "mps,steams"), "steams"),
        (("--model", "tiny", "--gpu", "h200", "--budget-s", "-1"), "--budget-s"),
        (("--model", "tiny", "--gpu", "h200"), "--device"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    import torch

    if torch.cuda.is_available() and words == "--device":
        pytest.skip("there is a GPU here")
    command = importlib.import_module("systems.llmstation.calibrate.__main__")
    assert command.main([*arguments, "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not (tmp_path / "x").exists()


def test_a_process_that_dies_is_one_line_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from systems.common.calibrate.budget import Budget
    from systems.common.errors import InputError
    from systems.llmstation.calibrate import mps

    started: list[mps.Process] = []
    real = mps.Process.__init__

    def noting(self: mps.Process, side: str, environment: dict[str, str]) -> None:
        real(self, side, environment)
        started.append(self)

    monkeypatch.setattr(mps.Process, "__init__", noting)
    plan = mps.Plan("no-such-model", "cpu", (50,), (8,), (("decode", 1),))
    with pytest.raises(InputError, match="no-such-model"):
        mps.measure(plan, Budget(60), lambda rows: None)
    assert len(started) == 3
    assert all(process._process.poll() is not None for process in started)
