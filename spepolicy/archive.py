"""Reading .npz files that another program may have written, or a disk may have damaged. Nothing of them is executed."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_arrays"]

# What numpy and zipfile raise, for all of which the file is to blame: no zip archive or no array; a member that is cut,
# missing, wrongly compressed, compressed in an unknown way, or encrypted (RuntimeError); a header that is no header, or
# that promises more than there can be.
_DAMAGE = (
    ValueError, EOFError, zipfile.BadZipFile, KeyError, zlib.error, lzma.LZMAError, struct.error, RuntimeError,
    tokenize.TokenError, SyntaxError, OverflowError, MemoryError,
)  # fmt: skip


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Return the arrays of the archive at *path*, or those of *names* that it has.

    Raises OSError where it cannot be read, ValueError with the reason where it is damaged or no such archive.
    """
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {name: content[name] for name in content.files if names is None or name in names}
    except _DAMAGE as error:
        raise ValueError(f"damaged, or no .npz file ({error})") from error
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError("a zip archive of something else")
    return arrays
