"""Arrow arrays are those that pyarrow makes, and pandas stays out of a run."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from spepolicy.judge.tables import Categories
from spepolicy.lab.arrow import arrow_array, arrow_categories

KINDS = st.sampled_from(["i1", "i4", "i8", "u1", "u8", "f4", "f8", "?"])
UNHURRIED = settings(deadline=None)  # the first call imports


@UNHURRIED
@given(column=KINDS.flatmap(lambda kind: npst.arrays(kind, st.integers(0, 40))), step=st.sampled_from([1, 3, -1]))
def test_numbers_and_booleans(column: NDArray[Any], step: int) -> None:
    made, expected = arrow_array(column[::step]), pyarrow.array(column[::step])
    made.validate(full=True)
    assert (made.type, len(made), made.null_count) == (expected.type, len(expected), 0)
    np.testing.assert_array_equal(made.to_numpy(zero_copy_only=False), column[::step])  # NaN is equal to NaN here


@UNHURRIED
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=20))
def test_texts(texts: list[str]) -> None:
    made = arrow_array(texts)
    made.validate(full=True)
    assert made.equals(pyarrow.array(texts, pyarrow.string()))
    codes = np.arange(len(texts), dtype=np.int32)[::-1].copy()
    table = arrow_categories(Categories(codes, tuple(texts)))
    assert table.equals(pyarrow.DictionaryArray.from_arrays(codes, pyarrow.array(texts, pyarrow.string())))


@pytest.mark.parametrize("column", [["a", None], [1, 2], np.array(["a", "bc"]), np.array([None, "x"], dtype=object)])
def test_what_is_not_plain_is_left_to_pyarrow(column: Any) -> None:
    assert arrow_array(column).equals(pyarrow.array(column))


def test_a_run_does_not_import_pandas() -> None:
    """It is installed wherever MLflow is, and takes a fifth of a second."""
    code = (
        "import sys, numpy, pyarrow.parquet\n"
        "from spepolicy.lab.arrow import arrow_array\n"
        "columns = [arrow_array(numpy.arange(3)), arrow_array(list('abc'))]\n"
        "table = pyarrow.Table.from_arrays(columns, names=['a', 'b'])\n"
        "pyarrow.parquet.write_table(table, pyarrow.BufferOutputStream())\n"
        "sys.exit('pandas' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
