"""Which tiling a product with quantised weights takes, and the table that a search on a GPU writes."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.torch_engine.kernels.quant_tilings import FILE, TILINGS, Tiling, chosen, parse


def test_the_table_in_use() -> None:
    for kind, group in (("int8", 0), ("int4", 128)):
        rows = [one.rows for one in TILINGS[kind]]
        assert rows == sorted(set(rows)) and rows[0] == 1 and rows[-1] == 128
        for one in TILINGS[kind][1:]:
            assert one.bk == 128 and one.rows >= 16 and one.rows & (one.rows - 1) == 0
            assert one.bn >= (64 if one.left else 16)  # Hopper's units take 64 rows of a left operand at once
        for n in range(1, 140):
            one = chosen(n, group)
            assert one is None if n > 128 else one is not None and n <= one.rows


def test_int4_between_17_and_32_rows_is_padded_to_what_was_faster() -> None:
    """Recorded times of one layer of Llama-2-7B: 32 rows by their own tiling against 64 rows by theirs."""
    recorded = FILE.parents[4] / "reference" / "h200" / "benchmarks" / "quantised.json"
    products = json.loads(recorded.read_text())["kernels"]["products"]
    by_rows = {rows: sum(products[f"int4 {site} {rows}"]["us"] for site in ("qkv", "o", "up", "down")) for rows in (32, 64)}
    if "quantised.json" in json.loads(FILE.read_text())["source"]:  # and not a later search
        assert (chosen(32, 128).rows == 64) == (by_rows[64] < by_rows[32])


@given(st.integers(16, 30_000), st.integers(32, 30_000), st.sampled_from([16, 32, 64, 128]), st.sampled_from([132, 256, 528]))
def test_shares(outer: int, inner: int, bn: int, programs: int) -> None:
    tiling = Tiling(bn, 128, splits=0, programs=programs)
    shares = tiling.shares(outer, inner)
    assert shares in (1, 2, 4, 8) and (shares == 1 or inner // shares >= 1024)
    tiles = -(-outer // bn)
    assert tiles * shares >= programs or shares == 8 or inner // (2 * shares) < 1024
    assert shares == 1 or tiles * shares // 2 < programs
    assert Tiling(bn, 128, splits=3).shares(outer, inner) == 3


def test_a_search_takes_the_place_of_what_it_measured() -> None:
    pytest.importorskip("torch")
    from benchmarks.tilings import candidates, overlaid

    table = json.loads(FILE.read_text())
    fast = {n: next(one for one in candidates(n) if one.left) for n in (32, 64, 128)}
    found = overlaid(table, {"int4": {n: (us, fast[n]) for n, us in ((32, 50.0), (64, 49.0), (128, 60.0))}, "int8": {}})
    assert found["int8"] == table["int8"] and set(found) == set(table)
    tilings = parse(found)["int4"]
    assert [one.rows for one in tilings] == [1, 16, 64, 128]  # 64 rows are faster than 32
    assert [one.left for one in tilings] == [False, False, True, True]
    expected = {name: value for name, value in asdict(fast[64]).items() if name != "splits"}
    assert found["int4"][2] == expected
