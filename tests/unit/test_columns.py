"""Columns that are made without pandas are those that pyarrow makes."""

from __future__ import annotations

import subprocess
import sys

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.columns import column_of, table_of

WHOLE = st.integers(-(2**63), 2**63 - 1)
KINDS = {
    "numbers": st.one_of(st.floats(), st.integers(-(2**53), 2**53)),
    "whole": WHOLE,
    "truths": st.booleans(),
    "texts": st.text(st.characters(exclude_categories=["Cs"])),
    "nothing": st.none(),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_a_column_is_what_pyarrow_makes_of_it(kind, data):
    values = data.draw(st.lists(st.one_of(st.none(), KINDS[kind])))
    ours, theirs = column_of(values), pyarrow.array(values)
    ours.validate(full=True)
    assert ours.type == theirs.type
    assert repr(ours.to_pylist()) == repr(theirs.to_pylist())
    assert ours.null_count == theirs.null_count


def test_other_kinds_are_left_to_pyarrow():
    assert column_of([b"a", None]).type == pyarrow.binary()


def test_no_pandas_is_imported():
    program = (
        "import sys; from harness.columns import table_of; "
        "table_of({'a': [1.5, None], 'b': ['x', 'y'], 'c': [True, False]}); print('pandas' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_a_table_keeps_its_columns_in_order():
    assert table_of({"b": [1], "a": ["x"]}).to_pylist() == [{"b": 1, "a": "x"}]
