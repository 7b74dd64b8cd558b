"""dLoRA's recorded H200 figures: read from what benchmarks wrote, refused in one line where that is not there."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest

from benchmarks import dlora_record
from harness.figure_file import load_figure
from systems.common.core import Trial
from systems.common.errors import InputError
from systems.dlora import experiments_recorded, fidelity

ROOT = Path(__file__).resolve().parents[2]
FIGURES = sorted((ROOT / "figures" / "dlora").glob("h200_*.yaml"))
MACHINE = {"device": "NVIDIA H200, 580.1, 345 MHz", "torch": "2.11"}


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """An empty reference folder in place of the repository's."""
    monkeypatch.setattr(experiments_recorded, "REFERENCE", tmp_path / "reference")
    cached = experiments_recorded._read, experiments_recorded._predictions, experiments_recorded._cluster_predictions
    for function in cached:
        function.cache_clear()
    yield tmp_path / "reference"
    for function in cached:
        function.cache_clear()


def written(folder: Path, **parts: object) -> Path:
    """A benchmark's file."""
    path = folder / "measured.json"
    path.write_text(json.dumps({"command": ["/somewhere/dlora_gpu.py", "--out", "/elsewhere/x", "--limit-s", "9"], **parts}))
    return path


def test_there_are_figures():
    assert {"h200_fig5", "h200_fig10a", "h200_fig11a", "h200_heldout"} <= {path.stem for path in FIGURES}


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_without_its_table_is_refused_in_one_line(path, reference, capsys):
    assert dlora_record.main([path.stem]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1 and told.err.startswith(path.stem)
    assert "record" in told.err or "run benchmarks" in told.err


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_recorded_tables_are_what_the_benchmarks_files_say(path, tmp_path):
    """Whoever changes a figure or an experiment records it again."""
    kept = ROOT / "reference" / "h200" / "dlora" / path.stem / "table.csv"
    if not kept.is_file():
        pytest.skip("not recorded")
    again = dlora_record.record(path, tmp_path) / "table.csv"
    before, now = ([line.split(",") for line in file.read_text().splitlines()] for file in (kept, again))
    assert [len(row) for row in now] == [len(row) for row in before]
    for mine, theirs in zip(chain(*now), chain(*before), strict=True):
        try:
            assert float(mine) == pytest.approx(float(theirs), rel=1e-3)  # some are simulated anew
        except ValueError:
            assert mine == theirs


def test_a_footer_says_what_was_simulated(tmp_path):
    told = json.loads(
        (dlora_record.record(ROOT / "figures" / "dlora" / "h200_heldout.yaml", tmp_path) / "provenance.json").read_text()
    )
    assert {name: about["backends"] for name, about in told["about"].items()} == {
        f"{policy}{side}": ["simulated" if side else "measured"]
        for policy in ("unmerged", "merged", "dlora") for side in ("", "_simulated")
    }  # fmt: skip


def test_the_simulator_is_within_ten_percent_of_the_held_out_runs_of_an_h200():
    """Mean latency and P90 of every run, and the SLO rates: the goal."""
    found = experiments_recorded._predictions()
    assert len(found) == 9
    for run in found:
        assert abs(run.error_percent("mean_s_per_token")) < 10
        assert abs(run.error_percent("p90_s_per_token")) < 10
    rates = fidelity.slo_rates(found, fidelity.SLO_S_PER_TOKEN)
    crossed = [pair for pair in rates.values() if None not in pair]
    assert len(crossed) == 2
    assert all(simulated == pytest.approx(measured, rel=0.1) for measured, simulated in crossed)


def test_the_simulated_cluster_orders_the_live_ones_runs_as_they_were():
    found = experiments_recorded._cluster_predictions()
    assert len(found) == 9
    assert all(abs(run.error_percent) < 13 for run in found)
    for rate in (0.6, 0.9, 1.2):
        mine = [run for run in found if run.rate == rate]
        orders = [[run.migration for run in sorted(mine, key=lambda run: run.queueing_s[i])] for i in (0, 1)]
        assert orders[0] == orders[1] == ["proactive", "dlora", "round_robin"]


def test_a_cluster_file_without_its_requests_is_refused():
    with pytest.raises(InputError, match="fig11a"):
        fidelity.predict_cluster({"iterations": {}}, {"parts": {"fig11a": [{}]}}, "cluster.json")


def test_parts_are_merged_with_their_origin_and_without_machine_paths(tmp_path, reference):
    spread = {"ms": 8.123456789, "low_ms": 8.0, "high_ms": 9.0}
    switches = dict.fromkeys(("merge", "unmerge", "a_to_b"), spread)
    merge = {"floor_ms": 6.0, "copy": spread, "addmm": switches, "kernel 64x128 4 warps": switches}
    first = written(tmp_path, machine=MACHINE, model="m", copy_bytes_per_s=1.0, merge=merge, drift={"error": "x"})
    target = dlora_record.add_measured(first, "2026-01-01", "", "abc")
    kept = json.loads(target.read_text())
    assert target == reference / "h200" / "benchmarks" / "dlora.json"
    assert "drift" not in kept and kept["merge"]["copy"]["ms"] == 8.123457
    assert kept["provenance"]["driver"] == "580.1"
    assert kept["provenance"]["parts"]["merge"]["command"] == ["benchmarks/dlora_gpu.py", "--limit-s", "9"]
    dlora_record.add_measured(
        written(tmp_path, machine=MACHINE, copy_bytes_per_s=2.0, decode={"x": float("nan")}), "2026-02-02", "570", "def"
    )
    kept = json.loads(target.read_text())
    assert kept["merge"] and kept["decode"] == {"x": None}
    assert {name: part["date"] for name, part in kept["provenance"]["parts"].items()} == {
        "merge": "2026-01-01",
        "decode": "2026-02-02",
    }
    folder = dlora_record.record(ROOT / "figures" / "dlora" / "h200_switching.yaml", tmp_path / "out")
    assert folder == tmp_path / "out" / "h200" / "dlora" / "h200_switching"
    rows = (folder / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 12 and rows[1].startswith("floor,merge,6.0,1.0")
    assert "copy,unmerge,0.0" in "\n".join(rows)


def test_a_cluster_file_goes_to_its_own_place(tmp_path, reference):
    run = {
        "migration": "dlora", "rate": 0.9, "adapters": 8, "duration_s": 10.0, "queueing_s_per_token": 0.5,
        "mean_s_per_token": 0.6, "p90_s_per_token": 0.7, "throughput_rps": 20.0, "unfinished": 0, "moved_requests": 3,
        "solves": 2, "rate_rps": 21.0, "top_share": 0.5, "solver_s": [0.1, 0.1], "switching_s": [0.05, 0.1],
        "moves": [[2, 0.03], [0, 0.01], [1, 0.05]], "errors": [],
        "replicas": [{"queueing_percent": 20.0, "busy_share": 0.9}, {"queueing_percent": None, "busy_share": 0.5}],
    }  # fmt: skip
    facts = [{"device": "NVIDIA H200"}]
    asked_of = {"0.9, 8 adapters": [[0.5, 10, 20, 1]]}
    whole = {"facts": facts, "asked": asked_of, "window_s": 8, "interval_s": 1.0, "load_excess": 16.0, "torch": "2"}
    path = written(
        tmp_path, parts={"fig11a": [{"migration": "dlora", "rate": 0.9, "adapters": 8, "left_out": "x"}, run]}, **whole
    )
    target = dlora_record.add_measured(path, "2026-01-01", "")
    assert target == reference / "h200x2" / "benchmarks" / "dlora_cluster.json"
    asked = {"part": "fig11a", "migration": "dlora", "rate": 0.9, "adapters": 8, "share": "solver"}
    got = experiments_recorded.balanced(Trial("dlora", "recorded_balanced", asked, "h200x2", "recorded")).metrics
    assert got["share_pct"] == pytest.approx(2.0) and got["switching_pct"] == pytest.approx(1.0)
    assert got["inference_pct"] == pytest.approx(97.0) and got["move_ms"] == pytest.approx(40.0)
    other = {**whole, "window_s": 3, "asked": {"0.9, 16 adapters": [[0.0, 1, 2, 3]]}, "parts": {"fig13": [run]}}
    dlora_record.add_measured(written(tmp_path, **other), "2026-01-02", "")
    kept = json.loads(target.read_text())
    assert sorted(kept["asked"]) == ["0.9, 16 adapters", "0.9, 8 adapters"] and kept["window_s"] == 8
    assert sorted(kept["parts"]) == ["fig11a", "fig13"]
    with pytest.raises(InputError, match=r"rate 1\.2"):
        experiments_recorded.balanced(Trial("dlora", "recorded_balanced", {**asked, "rate": 1.2}, "h200x2", "recorded"))


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"machine": {"device": "cpu"}, "copy_bytes_per_s": 1}', '{"a": 1}', '{"machine": {}}', '{"machine": 1}'],
)
def test_other_files_are_refused_with_code_2(text, tmp_path, reference, capsys):
    (tmp_path / "bad.json").write_text(text)
    assert dlora_record.main(["--measured", str(tmp_path / "bad.json"), "h200_fig5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not reference.exists()


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_figures_are_recorded_only_and_name_an_experiment(path):
    figure = load_figure(path)
    assert figure.backends == ["recorded"]
    assert figure.experiment in experiments_recorded.RECORDED_EXPERIMENTS
