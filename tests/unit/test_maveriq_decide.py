"""`python -m systems.maveriq.decide`: one decision, many, and everything a user may get wrong."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from systems.maveriq import decide

COLUMNS = (
    "Model", "TP", "PP", "PP_Map", "DTYPE", "INT8_KV_Cache", "Output_Lenght", "Batch_Size", "Latency", "Memory-Pre-Run",
    "Memory-After-Run",
)  # fmt: skip
LAYOUTS = ((1, 1), (1, 2), (2, 1))


def fingerprints(file, layouts=LAYOUTS, columns=COLUMNS, models=("llama-2-7b",)):
    """A small but whole table: straight lines in depth and length."""
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(columns)
        for model in models:
            for tp, pp in layouts:
                for dtype, share in (("float16", 1.0), ("int8", 0.5)):
                    for batch in (1, 2):
                        for layers in (pp, pp + 1):
                            for tokens in (10, 20):
                                pp_map = " ".join(["1"] * (pp - 1) + [str(layers - pp + 1)])
                                latency = (
                                    share * (layers / tp * (0.001 + 0.001 * tokens) + 0.002 * tokens + 0.01) * (1 + 0.1 * batch)
                                )
                                memory = share * layers * (1 + 0.1 * tp + 0.05 * batch) + 0.5 * pp
                                told = (model, tp, pp, pp_map, dtype, False, tokens, batch, latency, memory, memory)
                                rows.writerow(told[: len(columns)])
    return file


@pytest.fixture
def table(tmp_path):
    return fingerprints(tmp_path / "prints.csv")


def run(capsys, *argv):
    """Exit status, stdout as JSON lines, stderr."""
    status = decide.main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


def base(table, *more):
    return (
        "--fingerprints",
        table,
        "--model",
        "llama-2-7b",
        "--gpu-total-gib",
        "48",
        "--gpu-used-gib",
        "0.5,0.5,0.5,0.5",
        *more,
    )


def test_one_decision_is_one_json_object(table, capsys):
    status, (told,), err = run(capsys, *base(table, "--intent", "min_lat"))
    assert (status, err, told["refusal"], told["best_effort"]) == (0, "", None, False)
    c = told["configuration"]
    assert len(told["gpus"]) == len(told["gib_per_gpu"]) == c["tp"] * c["pp"]
    assert sum(told["pp_map"]) == 32
    assert sum(told["gib_per_gpu"]) == pytest.approx(told["estimates"]["memory_gib"])
    assert told["estimates"]["latency_interval_s"] is None  # paper mode knows no uncertainty


def test_flags_change_the_decision(table, capsys):
    free = run(capsys, *base(table))[1][0]
    assert run(capsys, *base(table, "--fp16-only"))[1][0]["configuration"]["dtype"] == "float16"
    assert run(capsys, *base(table, "--accuracy", "99.9"))[1][0]["configuration"]["dtype"] == "float16"
    assert run(capsys, *base(table, "--slo", "0.0001"))[1][0]["best_effort"]
    assert run(capsys, *base(table, "--output-length", "200"))[1][0]["estimates"]["latency_s"] > free["estimates"]["latency_s"]
    assert run(capsys, *base(table, "--batch", "2"))[1][0]["estimates"]["latency_s"] > free["estimates"]["latency_s"]
    busy = run(capsys, *base(table, "--intent", "min_mem", "--gpu-busy", "0.9,0.2,0,0.5"))[1][0]
    assert busy["gpus"] == [2]
    assert run(capsys, *base(table, "--intent", "min_mem", "--gpu-busy", "0.9,0.2,0,0.5", "--strategy", "packing"))[1][0][
        "gpus"
    ] == [0]


def test_a_refusal_is_an_answer_with_status_1(table, capsys):
    full = ("--fingerprints", table, "--model", "llama-2-7b", "--gpu-total-gib", "48", "--gpu-used-gib", "48,48")
    status, (told,), err = run(capsys, *full)
    assert (status, err, told["configuration"]) == (1, "", None)
    assert told["refusal"].startswith("out of memory")


def test_many_cases_are_a_line_each_and_bad_ones_say_why(table, tmp_path, capsys):
    cases = tmp_path / "cases.jsonl"
    cases.write_text(
        '{"intent": "min_mem"}\n'
        "\n"
        '{"intent": "cheap"}\n'
        "{no json\n"
        '{"model": "llama-9"}\n'
        '{"gpu_used_gib": [48, 48]}\n'
        '{"slo": NaN}\n'
        '{"slow": 1}\n'
        "[1]\n"
        '{"batch": true}\n'
        '{"gpu_used_gib": "0.5,x"}\n'
        '{"gpu_total_gib": [48, 80], "gpu_used_gib": [1, 1], "model": "llama-2-7b", "fp16_only": true}\n'
    )
    status, told, err = run(capsys, *base(table, "--cases", cases))
    assert status == 2 and "lines: 8: could not be answered" in err
    assert [one["line"] for one in told] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    by = {one["line"]: one for one in told}
    assert by[1]["configuration"]["dtype"] == "int8" and by[12]["configuration"]["dtype"] == "float16"
    assert by[6]["refusal"]  # an answer, not an error
    for line, word in (
        (3, "intent"),
        (4, "JSON"),
        (5, "llama-9"),
        (7, "JSON"),
        (8, "slow"),
        (9, "object"),
        (10, "batch"),
        (11, "gpu_used"),
    ):
        assert word in by[line]["error"] and "\n" not in by[line]["error"]
    assert f"{cases}, line 3: intent: 'cheap'" in by[3]["error"]


def test_good_cases_end_with_0_even_when_refused(table, tmp_path, capsys):
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"intent": "min_mem"}\n{"gpu_used_gib": [48]}\n')
    assert run(capsys, *base(table, "--cases", cases))[0] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--gpu-used-gib", "0.5,-1"), "gpu_used_gib"),
        (("--gpu-used-gib", "0.5,49"), "GPU 1 must use between 0 and its 48 GiB"),
        (("--gpu-used-gib", "a,b"), "finite numbers"),
        (("--gpu-used-gib", "nan"), "finite numbers"),
        (("--gpu-total-gib", "0"), "above 0"),
        (("--gpu-total-gib", "48,48"), "give 4 numbers"),
        (("--gpu-busy", "2,0,0,0"), "busy"),
        (("--intent", "cheap"), "intent"),
        (("--strategy", "best"), "strategy"),
        (("--mode", "guess"), "mode"),
        (("--slo", "soon"), "slo"),
        (("--slo", "nan"), "slo"),
        (("--batch", "0"), "batch"),
        (("--output-length", "-5"), "output_length"),
        (("--model", "lama-2-7b"), "lama-2-7b"),
        (("--accuracy", "nan"), "accuracy"),
        (("--cases", "/nowhere/cases.jsonl"), "can't be read"),
        (("--models", "/nowhere/models.yaml"), "/nowhere/models.yaml"),
        (("--fingerprints", "/nowhere/prints.csv"), "/nowhere/prints.csv"),
    ],
)
def test_bad_input_is_one_line_and_status_2(table, capsys, argv, said):
    status = decide.main([str(part) for part in (*base(table), *argv)])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert said in err and err.count("\n") == 1


def test_a_missing_option_is_named(table, capsys):
    status, _, err = run(capsys, "--fingerprints", table, "--model", "llama-2-7b")
    assert status == 2 and "gpu_total_gib" in err
    assert decide.main([]) == 2


def test_fingerprints_with_wrong_columns_or_missing_layouts(tmp_path, capsys):
    short = fingerprints(tmp_path / "short.csv", columns=COLUMNS[:-1])
    status, _, err = run(capsys, *base(short))
    assert status == 2 and "Memory-After-Run" in err and err.count("\n") == 1
    lone = fingerprints(tmp_path / "lone.csv", layouts=((1, 1),))
    status, _, err = run(capsys, *base(lone))
    assert status == 2 and err.count("\n") == 1 and "layout" in err.lower()


def test_an_accuracy_floor_without_a_table(tmp_path, capsys):
    models = tmp_path / "models.yaml"
    models.write_text("models: {mine: {layers: 16, hidden: 2048}}\n")
    table = fingerprints(tmp_path / "prints.csv", models=("mine",))
    argv = ("--fingerprints", table, "--model", "mine", "--models", models, "--gpu-total-gib", "48", "--gpu-used-gib", "0,0")
    assert run(capsys, *argv)[0] == 0
    status, _, err = run(capsys, *argv, "--accuracy", "90")
    assert status == 2 and "accuracy table: model: 'mine'" in err


def test_the_command_itself(table, root):
    done = subprocess.run(
        [sys.executable, "-m", "systems.maveriq.decide", *(str(part) for part in base(table))],
        cwd=root, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model"] == "llama-2-7b"


def test_it_starts_without_heavy_packages(root):
    code = (
        "import sys, systems.maveriq.decide; print([m for m in ('pandas', 'scipy', 'matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
