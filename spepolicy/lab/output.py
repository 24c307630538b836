"""The run folder: what is written, under which name, and what is said when it cannot be written.

Every file is complete or absent: it is written beside its place and then renamed, so that an interrupt leaves no half
of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spepolicy.errors import OutputError

if TYPE_CHECKING:
    from spepolicy.judge.tables import Column

__all__ = [
    "BLACKOUTS",
    "CONFIG",
    "ERRATA_JSON",
    "ERRATA_PAGE",
    "ERRATA_RST",
    "FIGURE",
    "LANES",
    "METRICS_FILE",
    "open_folder",
    "stacked",
    "write_bytes",
    "write_file",
    "write_json",
    "write_parquet",
    "write_text",
]

CONFIG = "config.json"
METRICS_FILE = "metrics.json"
LANES = "lanes.parquet"
BLACKOUTS = "blackouts.parquet"
ERRATA_JSON = "errata.json"
ERRATA_PAGE = "errata.md"
ERRATA_RST = "errata.rst"
FIGURE = "blackout.png"


def _cannot_write(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(
        f"cannot write '{path}': {reason}. The run's folder must be one in which new files can be made. Choose another "
        "place with output.dir=FOLDER, or make room."
    )


def open_folder(run_dir: Path) -> Path:
    """Make *run_dir* if needed and try to write there, before anything is simulated; return it as an absolute path."""
    probe = run_dir / f".writable.{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _cannot_write(run_dir, error) from error
    return run_dir.resolve()


def write_file(path: Path, write: Callable[[Path], None]) -> Path:
    """Let *write* fill a temporary file, then put it in place as *path*."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write *text* as UTF-8."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    return write_file(path, write)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write *content* as it is."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    return write_file(path, write)


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write *content* as JSON with keys in the order given. NaN and infinity are errors: they are not JSON."""
    return write_text(path, json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")


def stacked(tables: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    """Return *tables*, which have the same columns, one below the other."""
    import numpy as np

    from spepolicy.judge.tables import Categories

    rows: dict[str, Column] = {}
    for name, first in tables[0].items():
        parts = [table[name] for table in tables]
        if isinstance(first, Categories):
            names: dict[str, int] = {}
            codes = []
            for part in parts:
                assert isinstance(part, Categories)
                number = np.array([names.setdefault(text, len(names)) for text in part.names], dtype=np.int32)
                codes.append(number[part.codes])
            rows[name] = Categories(np.concatenate(codes), tuple(names))
        else:
            rows[name] = np.concatenate([part for part in parts if not isinstance(part, Categories)])
    return rows


def write_parquet(path: Path, table: Mapping[str, Column]) -> Path:
    """Write *table* as Parquet. A metric's column carries its definition and unit as field metadata."""
    import pyarrow
    from pyarrow import parquet

    from spepolicy.judge.metrics import METRICS
    from spepolicy.judge.tables import Categories
    from spepolicy.lab.arrow import arrow_array, arrow_categories

    columns, fields = [], []
    for name, column in table.items():
        if isinstance(column, Categories):
            array = arrow_categories(column)
        else:
            array = arrow_array(column)
        metric = METRICS.get(name)
        metadata = {"doc": metric.doc, "unit": metric.unit} if metric else None
        columns.append(array)
        fields.append(pyarrow.field(name, array.type, metadata=metadata))
    content = pyarrow.Table.from_arrays(columns, schema=pyarrow.schema(fields))

    def write(temporary: Path) -> None:
        parquet.write_table(content, temporary)

    return write_file(path, write)
