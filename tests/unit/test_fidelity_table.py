"""Simulated again and compared: `systems.common.fidelity_table`, its plot, and the rules around it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from harness import calibration, fidelity
from harness.config import Config
from systems.common import fidelity_table, simulate
from systems.common.errors import InputError

REQUESTS = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{i * 0.03},{100 + 30 * i},{20 + i}\n" for i in range(12))
LIMITS = {"num_gpu_blocks": 2000, "max_num_batched_tokens": 2048, "max_num_seqs": 256, "policy": "chunked-prefill"}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A "measured" run that the roofline itself made: its errors are known to be 0."""
    requests = tmp_path / "requests.csv"
    requests.write_text(REQUESTS)
    out = tmp_path / "measured" / "steady"
    arguments = ["--requests", str(requests), "--model", "llama-3.1-8b", "--hardware", "h200", "--num-gpu-blocks", "2000"]
    assert simulate.main([*arguments, "--out", str(out)]) == 0
    (out / "summary.json").write_text(json.dumps(LIMITS))
    return tmp_path / "measured"


def command(measured: Path, out: Path, *more: str) -> list[str]:
    return ["--measured", str(measured), "--model", "llama-3.1-8b", "--hardware", "h200", "--out", str(out), *more]


def test_a_run_of_the_simulator_itself_has_no_error(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    assert fidelity_table.main(command(measured, out)) == 0
    rows = list(csv.DictReader(out.open()))
    assert {row["hardware_model"] for row in rows} == {"roofline"} and {row["workload"] for row in rows} == {"steady"}
    for row in rows:
        assert float(row["error"]) == pytest.approx(0, abs=1e-9), row
    assert {row["metric"] for row in rows} >= {"ttft", "tpot", "e2e"}


def test_errors_have_the_simulations_sign(measured: Path, tmp_path: Path) -> None:
    file = measured / "steady" / "requests.csv"
    rows = list(csv.DictReader(file.open()))
    for row in rows:  # a GPU twice as slow after the first token
        first, finish = float(row["first_token_s"]), float(row["finish_s"])
        row["finish_s"] = str(first + 2 * (finish - first))
    with file.open("w", newline="") as to:
        writer = csv.DictWriter(to, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "table.csv"
    assert fidelity_table.main(command(measured, out)) == 0
    errors = {(r["metric"], r["statistic"]): float(r["error"]) for r in csv.DictReader(out.open())}
    assert errors["tpot", "p50"] == pytest.approx(-0.5) and errors["ttft", "p50"] == pytest.approx(0, abs=1e-9)


def test_the_figure_is_drawn_the_same_each_time(measured: Path, tmp_path: Path) -> None:
    table, drawings = tmp_path / "table.csv", [tmp_path / "one.pdf", tmp_path / "two.pdf"]
    fidelity_table.main(command(measured, table))
    for out in drawings:
        assert fidelity.main(["--table", str(table), "--gpu", "h200", "--out", str(out)]) == 0
    assert drawings[0].read_bytes() == drawings[1].read_bytes() and drawings[0].stat().st_size > 5000


def test_a_table_without_errors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("workload,hardware_model\nsteady,roofline\n")
    with pytest.raises(InputError, match="metric"):
        fidelity.main(["--table", str(tmp_path / "table.csv"), "--gpu", "h200", "--out", str(tmp_path / "x.pdf")])
    assert not (tmp_path / "x.pdf").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: shutil.rmtree(d / "steady"), "--measured"),
        (lambda d: (d / "steady" / "summary.json").unlink(), "summary.json"),
        (lambda d: (d / "steady" / "summary.json").write_text("{}"), "num_gpu_blocks"),
        (lambda d: (d / "steady" / "summary.json").write_text("["), "summary.json"),
        (lambda d: (d / "steady" / "requests.csv").write_text("a,b\n1,2\n"), "queued_s"),
    ],
)
def test_bad_input_is_one_line(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil, words: str) -> None:
    spoil(measured)
    capsys.readouterr()
    assert fidelity_table.main(command(measured, tmp_path / "table.csv")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not (tmp_path / "table.csv").exists()


def test_calibrating_needs_a_gpu_that_has_a_name() -> None:
    refused: list[InputError] = []
    files = calibration.calibrations(Config(hardware="h200x2"), refused.append)
    h200, rtx4090 = (f"results/calibrated/{gpu}/llama-3.1-8b" for gpu in ("h200", "rtx4090"))
    both = [f"{h200}/meta.yaml", f"{h200}/corun.yaml"]
    assert files(None) == [*both, "results/calibrated/h200/all_reduce.csv"] and not refused
    assert calibration.calibrations(Config(hardware="h200x1"), refused.append)(None) == both
    assert calibration.calibrations(Config(hardware="rtx4090"), refused.append)(None)[0] == f"{rtx4090}/meta.yaml"
    calibration.calibrations(Config(), refused.append)(None)
    assert refused[0].key == "hardware"


def test_recorded_runs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("reference/h200/fidelity/llama-3.1-8b/steady")
    run.mkdir(parents=True)
    assert calibration.fidelity(Config()) == []
    (run / "requests.csv").write_text("")
    assert calibration.fidelity(Config()) == ["results/fidelity/h200/llama-3.1-8b/fidelity.pdf"]

    class Of:
        gpu, model = "h200", "llama-3.1-8b"

    assert calibration.measured_runs(Of()) == [f"{run}/requests.csv"]
    assert "--operators" not in calibration.fidelity_options(Of())
    Path("reference/h200/calibrated/llama-3.1-8b").mkdir(parents=True)
    Path("reference/h200/calibrated/llama-3.1-8b/meta.yaml").write_text("")
    assert "--operators" in calibration.fidelity_options(Of())
