"""table.csv: its columns, its cells, and that the same rows give the same bytes."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.draw import footer, read_table
from harness.rows import About, merged, read_rows, write_rows
from harness.table import as_csv, columns, main
from systems.registry import InputError
from tests.unit.test_figure_file import figure

ROWS = [
    {"series": "a", "x": 1, "y": 0.1 + 0.2, "what": "(1, 4)", "knob_k": None, "feasible": True},
    {"series": "b", "x": 2.5, "y": math.nan, "what": None, "knob_k": 3, "feasible": False},
]


def test_cells_are_written_as_stated() -> None:
    text = as_csv(ROWS, list(ROWS[0]))
    assert text == 'series,x,y,what,knob_k,feasible\na,1.0,0.30000000000000004,"(1, 4)",,true\nb,2.5,nan,,3,false\n'


def test_columns_come_in_the_stated_order() -> None:
    factors = ["rate_rps", "model_size"]
    assert columns(figure()) == [
        "series",
        *factors,
        "work",
        "ttft_p99_s",
        "knob_chunk",
        "feasible",
        "outcome",
        "probes",
        "trial",
    ]


@given(st.lists(st.tuples(st.floats(allow_nan=False), st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0")))))
def test_what_is_written_reads_back(cells: list[tuple[float, str]]) -> None:
    rows = [{"y": number, "text": text} for number, text in cells]
    read = list(csv.DictReader(io.StringIO(as_csv(rows, ["y", "text"]))))  # type: ignore[arg-type]
    assert [(float(row["y"]), row["text"]) for row in read] == cells


def test_rows_come_back_from_parquet_with_what_stands_behind_them(tmp_path: Path) -> None:
    about = About(hardware=["t4x16"], backends=["simulated"], seeds=[3], notes=["n"])
    write_rows(tmp_path / "a.parquet", ROWS, about)  # type: ignore[arg-type]
    rows, told = read_rows(tmp_path / "a.parquet")
    assert told == about
    assert rows[0] == {**ROWS[0], "x": 1.0}
    assert math.isnan(rows[1].pop("y"))  # type: ignore[arg-type]
    assert rows[1] == {key: value for key, value in ROWS[1].items() if key != "y"}


def test_texts_and_numbers_in_one_column_become_texts(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [{"series": "a", "x": 1}, {"series": "a", "x": "auto"}], About())
    assert [row["x"] for row in read_rows(tmp_path / "a.parquet")[0]] == ["1", "auto"]


def test_a_file_that_is_no_series_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="delete this file"):
        read_rows(tmp_path / "a.parquet")


def test_a_series_that_is_absent_is_named(root: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [{"series": "llmstation"}], About())
    path = str(root / "figures" / "llmstation" / "fig8a.yaml")
    with pytest.raises(InputError, match="fineinfer, vllm_torchtune, chunked"):
        main(["--figure", path, "--series", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "table.csv")])
    assert not (tmp_path / "table.csv").exists()


def test_the_table_reads_back_for_drawing(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(as_csv(ROWS, list(ROWS[0])))
    table = read_table(tmp_path / "table.csv")
    assert list(table["x"]) == [1.0, 2.5] and math.isnan(table["y"][1]) and list(table["feasible"]) == [True, False]


def test_the_footer_says_what_the_numbers_are_made_of() -> None:
    first = About(["rtx3090x2"], ["simulated"], ["paper"], [0], ["abc+"], ["lengths"], ["azure"], ["roofline"], ["t2"])
    second = About(["rtx3090x2"], ["simulated"], ["paper"], [0], ["abd"], [], [], ["analytic"], ["t1"])
    both = merged([first, second])
    assert both.trials == ["t1", "t2"]
    assert footer(both) == (
        "simulated on rtx3090x2; analytic; roofline; data: lengths, synthetic stand-in for azure; seed 0; commit abc+, abd"
    )
    assert "smoke scale" in footer(About(["x"], ["simulated"], ["smoke"], [0], ["abc"]))
