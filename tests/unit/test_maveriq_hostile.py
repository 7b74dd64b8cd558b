"""What files and options may hold and still be read, and what is refused in one line, for both commands."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from systems.common.errors import InputError
from systems.maveriq import decide, estimate
from systems.maveriq.files import write
from systems.maveriq.placement import GpuState, Placement, capacity, place
from tests.unit.test_maveriq_decide import fingerprints

HEADER = ",".join(estimate.GRID_COLUMNS)
ROW = "llama-2-7b,1,1,int8,False,1,20"
ONE = ("--model", "llama-2-7b", "--tp", "2", "--pp", "1", "--dtype", "int8")
NODE = ("--model", "llama-2-7b", "--gpu-total-gib", "48", "--gpu-used-gib", "0,0,0,0")
HUGE = "9" * 400


@pytest.fixture(scope="module")
def prints(tmp_path_factory):
    return fingerprints(tmp_path_factory.mktemp("prints") / "prints.csv")


@pytest.fixture
def call(capsys):
    """Exit status, stdout, stderr of a command; numpy's warnings are errors."""

    def called(module, file, *argv):
        status = module.main(["--fingerprints", str(file), *map(str, argv)])
        return status, *capsys.readouterr()

    return called


pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: "\n".join(",".join([*reversed(line.split(",")), "more"]) for line in text.splitlines()),
        lambda text: text + "\n\n" + text.splitlines()[1] + "\n",
        lambda text: text.replace("Output_Lenght", " Output_Length "),
    ],
    ids=["BOM and CRLF", "another order and more columns", "blank lines and a row twice", "the right spelling"],
)
def test_a_file_may_look_different_and_says_the_same(prints, tmp_path, call, change):
    (tmp_path / "f.csv").write_bytes(change(prints.read_text()).encode())
    for module, argv in ((estimate, (*ONE, "--json")), (decide, NODE)):
        assert call(module, tmp_path / "f.csv", *argv) == call(module, prints, *argv)


def test_a_point_with_two_memories_or_a_column_twice_is_refused(prints, tmp_path, call):
    lines = prints.read_text().splitlines()
    (tmp_path / "f.csv").write_text("\n".join([*lines, lines[1].rsplit(",", 1)[0] + ",99"]))
    status, out, err = call(decide, tmp_path / "f.csv", *NODE)
    assert (status, out) == (2, "") and f"line {len(lines) + 1}: Memory-After-Run" in err
    (tmp_path / "f.csv").write_text("\n".join(line + "," + (line.split(",")[8]) for line in lines))
    assert "'Latency': this column comes twice" in call(decide, tmp_path / "f.csv", *NODE)[2]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f"\ufeff{HEADER}\r\n{ROW}\r\n", 0),
        (f" {HEADER.replace(',', ' , ')}\n{ROW}\n", 0),
        (f"{HEADER}\nllama-2-7b,1.0,1.0,int8,0,1.0,20.0\n", 0),  # as pandas writes a column with a gap
        (f"{HEADER}\n\n{ROW}\n\n", 0),
        (f"{HEADER},model\n{ROW},new\n", 2),
        (f"{HEADER}\nllama-2-7b,1,1,int8,False,1,{HUGE}\n", 2),
        (f"{HEADER}\nllama-2-7b,1,1,int8,False,1,{'9' * 5000}\n", 2),
        (f"{HEADER}\nllama-2-7b,1.5,1,int8,False,1,20\n", 2),
        (f"{HEADER}\nllama-2-7b,nan,1,int8,False,1,20\n", 2),
    ],
)
@pytest.mark.parametrize("mode", ["paper", "improved"])
def test_grids(prints, tmp_path, call, text, status, mode):
    (tmp_path / "grid.csv").write_bytes(text.encode())
    argv = ("--grid", tmp_path / "grid.csv", "--out", tmp_path / "out.csv", "--mode", mode)
    found, out, err = call(estimate, prints, *argv)
    assert (found, out, err.count("\n")) == (status, "", status // 2)
    assert (tmp_path / "out.csv").exists() == (status == 0)
    if status == 0:
        with (tmp_path / "out.csv").open(newline="") as stream:
            (row,) = csv.DictReader(stream)
        assert [row[name] for name in estimate.GRID_COLUMNS] == ROW.split(",")
    elif "," in text.splitlines()[1].removeprefix(ROW):
        assert "grid.csv" in err


@pytest.mark.parametrize(
    ("module", "argv", "said"),
    [
        (estimate, (*ONE, "--batch", "x"), "--batch"),
        (estimate, (*ONE, "--mode", "best"), "--mode"),
        (estimate, (*ONE, "--nonsense"), "--nonsense"),
        (estimate, (*ONE, "--output-length", HUGE), "--output-length"),
        (estimate, (*ONE, "--batch", HUGE), "--batch"),
        (estimate, (*ONE, "--tp", HUGE), "--tp"),
        (estimate, (*ONE, "--layers", HUGE), "--layers"),
        (estimate, (*ONE, "--prompt-tokens", HUGE), "--prompt-tokens"),
        (estimate, ("--grid", "x.csv", "--layers", "3"), ""),
        (decide, (*NODE, "--batch", HUGE), "batch"),
        (decide, (*NODE, "--output-length", HUGE), "output_length"),
        (decide, (*NODE, "--packing-threshold", "-1"), "packing_threshold"),
        (decide, (*NODE, "--model", "nobody"), "fingerprinted are llama-2-7b"),
    ],
)
def test_options_are_refused_in_one_line(prints, call, module, argv, said):
    status, out, err = call(module, prints, *argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err


def test_cases_may_have_a_byte_order_mark_and_odd_strings(prints, tmp_path, call):
    good = {"model": "llama-2-7b", "batch": 2.0}
    lines = [
        good,
        {"model": "a\u2028b"},
        {**good, "slo": int(HUGE)},
        {**good, "batch": int(HUGE)},
        {**good, "batch": 1.5},
        good,
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "cases.jsonl").write_bytes(("\ufeff" + text).encode())
    status, out, err = call(decide, prints, "--cases", tmp_path / "cases.jsonl", *NODE[2:])
    told = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and err.count("\n") == 1 and [one["line"] for one in told] == [1, 2, 3, 4, 5, 6]
    assert ["error" in one for one in told] == [False, True, True, True, True, False]
    assert {**told[0], "line": 6} == told[5]


def test_a_depth_without_a_width_is_no_search(tmp_path, call):
    table = fingerprints(tmp_path / "prints.csv", models=("mine",))
    (tmp_path / "models.yaml").write_text("models: {mine: {layers: 16}}\n")
    argv = ("--models", tmp_path / "models.yaml", "--model", "mine", *NODE[2:])
    status, _, err = call(decide, table, *argv)
    assert status == 2 and "mine.hidden" in err and "degrees of tensor parallelism divide it" in err


def test_room_without_bounds():
    assert capacity(GpuState(0, 1e308, 0.0), 1e-30, 80) == 80
    found = place(80, 1e-30, 1, 2, [GpuState(0, 1e308, 0.0), GpuState(1, 48.0, 47.9999999)])
    assert isinstance(found, Placement) and found.pp_map == (40, 40)


def test_writing_keeps_links_and_devices(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    write(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(pipe, "through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)
    for folder in (tmp_path, Path(), Path("/")):
        with pytest.raises(InputError, match="is a folder"):
            write(folder, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "pipe", "real.csv"]
