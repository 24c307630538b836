"""Arrow arrays from numpy arrays and lists of texts, as `pyarrow.array` makes them.

pyarrow.array() imports pandas where it is installed, to see whether it was given something of it: a fifth of a second,
in each run. What this package writes is plain, so its buffers are handed over as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from spepolicy.judge.tables import Categories

__all__ = ["arrow_array", "arrow_categories"]


def arrow_array(column: NDArray[Any] | Sequence[str]) -> Any:
    """Return the `pyarrow.Array` of a numpy array of numbers or booleans, shape (n,), or of a list of texts.

    Its memory is the numpy array's. NaN stays NaN, which is not null. Anything else goes to `pyarrow.array`.
    """
    import pyarrow

    if isinstance(column, np.ndarray):
        if column.ndim == 1 and column.dtype.isnative and column.dtype.kind in "iuf":
            values = np.ascontiguousarray(column)
        elif column.ndim == 1 and column.dtype.kind == "b":
            values = np.packbits(column, bitorder="little")
        else:
            return pyarrow.array(column)
        kind = pyarrow.from_numpy_dtype(column.dtype)
        return pyarrow.Array.from_buffers(kind, len(column), [None, pyarrow.py_buffer(values)])
    if not all(type(text) is str for text in column):
        return pyarrow.array(column)
    encoded = [text.encode() for text in column]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        return pyarrow.array(column)
    buffers = [pyarrow.py_buffer(ends.astype(np.int32)), pyarrow.py_buffer(b"".join(encoded))]
    return pyarrow.StringArray.from_buffers(len(column), *buffers)


def arrow_categories(column: Categories) -> Any:
    """Return the `pyarrow.DictionaryArray` of a column of few distinct texts."""
    import pyarrow

    return pyarrow.DictionaryArray.from_arrays(arrow_array(column.codes), arrow_array(list(column.names)))
