"""`python -m systems.common.simulate` as a user calls it."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import pytest

GOOD = "arrival_s,input_tokens,output_tokens\n0.0,100,20\n0.5,300,1\n0.6,700,50\n"


def simulate(root, tmp_path, text=GOOD, *options):
    requests = tmp_path / "requests.csv"
    requests.write_text(text)
    command = [
        *(sys.executable, "-m", "systems.common.simulate", "--requests", str(requests), "--out", str(tmp_path / "out")),
        *("--model", "llama-3.1-8b", "--hardware", "rtx4090", "--num-gpu-blocks", "200", *options),
    ]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def rows(tmp_path):
    with (tmp_path / "out" / "requests.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if key != "status"} for row in csv.DictReader(file)]


def test_every_request_gets_its_timings(root, tmp_path):
    done = simulate(root, tmp_path)
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path)
    assert [row["output_tokens"] for row in table] == [20, 1, 50]
    for row in table:
        assert row["queued_s"] <= row["scheduled_s"] < row["first_token_s"] <= row["finish_s"]
        assert row["ttft_s"] == pytest.approx(row["first_token_s"] - row["queued_s"])
        assert row["e2e_s"] == pytest.approx(row["finish_s"] - row["queued_s"])
    assert math.isnan(table[1]["tpot_s"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["finished"] == 3 and summary["num_gpu_blocks"] == 200
    assert "rtx4090" in summary["hardware_model"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_users_own_operator_tables_are_used(root, tmp_path, mirror):
    tables = mirror / "rtx4090_llama31_8b"
    done = simulate(root, tmp_path, GOOD, "--operators", str(tables))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "roofline" not in summary["hardware_model"].split(",")[0]
    # the sheet's own arithmetic for this table: 32 layers of linear operators at 1 token, plus head and attention
    assert summary["tpot_p50_s"] == pytest.approx(0.0175, rel=0.1)


def test_a_tighter_kv_cache_never_serves_sooner(root, tmp_path):
    many = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{i * 0.01},400,100\n" for i in range(40))
    finish = {}
    for blocks in ("100", "2000"):
        assert simulate(root, tmp_path, many, "--num-gpu-blocks", blocks).returncode == 0
        finish[blocks] = max(row["finish_s"] for row in rows(tmp_path))
    assert finish["100"] > finish["2000"]


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("arrival_s,input_tokens\n0,1\n", (), ["requests.csv", "output_tokens"]),
        ("", (), ["requests.csv", "empty"]),
        ("arrival_s,input_tokens,output_tokens\n", (), ["requests.csv", "no"]),
        (GOOD + "nan,1,1\n", (), ["requests.csv", "line 5", "arrival_s", "nan"]),
        (GOOD + "1.0,-3,1\n", (), ["requests.csv", "line 5", "input_tokens", "-3"]),
        (GOOD + "1.0,3,0\n", (), ["requests.csv", "line 5", "output_tokens", "0"]),
        (GOOD + "1.0,3\n", (), ["requests.csv", "line 5"]),
        (GOOD + "0.1,3,3\n", (), ["requests.csv", "line 5", "arrival_s", "sort"]),
        (GOOD + "9,4000,10\n", (), ["requests.csv", "line 5", "4010", "KV cache", "num_gpu_blocks"]),
        (GOOD, ("--hardware", "rtx4099"), ["--hardware", "rtx4099", "rtx4090"]),
        (GOOD, ("--model", "llama-3.1-9b"), ["--model", "llama-3.1-9b", "llama-3.1-8b"]),
        (GOOD, ("--max-num-batched-tokens", "64"), ["max_num_batched_tokens", "64", "max_num_seqs"]),
        (GOOD, ("--max-num-seqs", "0"), ["max_num_seqs", "0"]),
        (GOOD, ("--num-gpu-blocks", "-1"), ["num_gpu_blocks", "-1"]),
        (GOOD, ("--tp", "2"), ["tp", "2", "GPUs of rtx4090"]),
        (GOOD, ("--overhead-us", "-1"), ["overhead-us", "-1"]),
        (GOOD, ("--operators", "/nowhere"), ["/nowhere"]),
        (GOOD, ("--out", "/proc/none"), ["/proc/none", "cannot be written"]),
    ],
)
def test_bad_input_ends_in_one_clear_line_and_writes_nothing(root, tmp_path, text, options, says):
    done = simulate(root, tmp_path, text, *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    for part in says:
        assert part.lower() in done.stderr.lower()
    assert not (tmp_path / "out").exists()
