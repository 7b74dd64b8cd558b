"""`python -m systems.maveriq.estimate` and `fit` as a user calls them."""

import csv
import json
import subprocess
import sys

import pytest

from tests.unit.test_maveriq_estimator import linear, to_rows, write_csv

ONE = ("--model", "llama-2-7b", "--tp", "8", "--pp", "1", "--dtype", "int4")


def call(root, *arguments, module="estimate"):
    return subprocess.run(
        [sys.executable, "-m", f"systems.maveriq.{module}", *map(str, arguments)],
        cwd=root, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prints(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("prints") / "f.csv", to_rows(linear(models=("llama-2-7b", "new"))))


def test_one_configuration(root, prints):
    done = call(root, "--fingerprints", prints, *ONE, "--batch", 1, "--output-length", 100)
    assert done.returncode == 0, done.stderr
    assert "latency" in done.stdout and "memory" in done.stdout and "(90 %)" in done.stdout


@pytest.mark.parametrize("mode", ["paper", "improved"])
def test_json(root, prints, mode):
    done = call(root, "--fingerprints", prints, *ONE, "--int8-kv", "--json", "--mode", mode)
    if mode == "paper":  # int8 KV was not fingerprinted
        assert done.returncode == 2 and "int8_kv" in done.stderr
        done = call(root, "--fingerprints", prints, *ONE, "--json", "--mode", mode)
    answer = json.loads(done.stdout)
    assert answer["latency_s"] > 0 and answer["memory_gib"] > 0 and answer["mode"] == mode
    assert (answer["latency_low_s"] is None) == (mode == "paper")


def test_a_grid(root, prints, tmp_path):
    grid, out = tmp_path / "grid.csv", tmp_path / "out.csv"
    rows = [("llama-2-7b", tp, pp, "float16", kv, 1, o) for tp, pp in ((1, 1), (2, 4)) for kv in (False,) for o in (20, 100)]
    grid.write_text("model,tp,pp,dtype,int8_kv,batch,output_length\n" + "".join(",".join(map(str, r)) + "\n" for r in rows))
    done = call(root, "--fingerprints", prints, "--grid", grid, "--out", out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with out.open() as stream:
        found = list(csv.DictReader(stream))
    assert [row["output_length"] for row in found] == ["20", "100", "20", "100"]
    assert float(found[0]["latency_s"]) < float(found[1]["latency_s"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.csv", "out.csv"]
    shown = call(root, "--fingerprints", prints, "--grid", grid)
    assert shown.stdout == out.read_text()
    lines = call(root, "--fingerprints", prints, "--grid", grid, "--json").stdout.splitlines()
    assert [json.loads(line)["tp"] for line in lines] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "llama-2-7b"), "--tp"),
        ((*ONE, "--batch", "0"), "--batch"),
        ((*ONE, "--level", "2"), "level"),
        ((*ONE, "--out", "x.csv"), "--grid"),
        (("--model", "gpt-9", "--tp", "1", "--pp", "1", "--dtype", "int4"), "gpt-9"),
        (("--model", "new", "--tp", "1", "--pp", "1", "--dtype", "int4"), "--layers"),
        (("--grid", "no-such-file.csv"), "no-such-file.csv"),
        ((*ONE, "--models", "no-such-file.yaml"), "no-such-file.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(root, prints, arguments, says):
    done = call(root, "--fingerprints", prints, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_bad_files(root, prints, tmp_path):
    grid = tmp_path / "grid.csv"
    for text, says in (
        ("model,tp\nllama-2-7b,1\n", "'pp': this column is missing"),
        ("model,tp,pp,dtype,int8_kv,batch,output_length\nllama-2-7b,x,1,int4,False,1,100\n", "line 2: tp: 'x'"),
        ("model,tp,pp,dtype,int8_kv,batch,output_length\nllama-2-7b,1,1,int4,no,1,100\n", "int8_kv"),
        ("model,tp,pp,dtype,int8_kv,batch,output_length\nllama-2-7b,1\n", "line 2"),
    ):
        grid.write_text(text)
        done = call(root, "--fingerprints", prints, "--grid", grid, "--out", tmp_path / "out.csv")
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()
    (tmp_path / "bad.csv").write_text("Model,TP\nx,1\n")
    done = call(root, "--fingerprints", tmp_path / "bad.csv", *ONE)
    assert done.returncode == 2 and "column is missing" in done.stderr
    grid.write_text("model,tp,pp,dtype,int8_kv,batch,output_length\nllama-2-7b,1,1,int4,0,1,100\n")
    done = call(root, "--fingerprints", prints, "--grid", grid, "--out", tmp_path / "no" / "out.csv")
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_a_new_model_by_its_depth(root, prints, tmp_path):
    done = call(
        root, "--fingerprints", prints, "--model", "new", "--layers", 48, "--tp", 1, "--pp", 1, "--dtype", "int4", "--json"
    )
    assert done.returncode == 0 and "nominal" in json.loads(done.stdout)["notes"]
    file = tmp_path / "models.yaml"
    file.write_text(
        "models:\n  new: {layers: 48, hidden: 4096, heads: 32, kv_heads: 32, mlp: 11008, vocab: 32000, gated: true}\n"
    )
    done = call(
        root, "--fingerprints", prints, "--model", "new", "--models", file, "--tp", 1, "--pp", 1, "--dtype", "int4", "--json"
    )
    assert done.returncode == 0 and "nominal" not in json.loads(done.stdout)["notes"]


def test_it_loads_neither_pandas_nor_torch(root, prints):
    code = (
        "import sys; from systems.maveriq.estimate import main;"
        f"main({['--fingerprints', str(prints), *ONE]!r});"
        "print(sorted({'pandas', 'torch', 'scipy', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_fit_names_what_is_wrong(root, prints):
    done = call(root, "--fingerprints", prints, "--whole", "no-such-file.csv", module="fit")
    assert done.returncode == 2 and "no-such-file.csv" in done.stderr
