"""The store of a sweep: a folder of Parquet files, a row a lane, to which files are added and in which none is changed.

    pandas.read_parquet("outputs/store")
    polars.read_parquet("outputs/store/*.parquet")

Columns, in this order:

`lane_hash`      what identifies the row: configuration, seed, replicate, and the code that computed it
`config_hash`    the configuration alone; its rows are the replicates of one point
`scenario_hash`  the configuration without the policy: rows of equal scenario, seed and replicate are *paired*
`policy`, `policy_fields`, `config`  what was configured; the last two as JSON
`seed`, `replicate`
numbers          those of `lanes.parquet` of a single run (`spepolicy.judge.tables.lane_table`: exact counts, then the
                 metrics of `spepolicy.judge.metrics`, whose definition and unit are in the field's metadata), and
                 `observed_*`, what erratum reporters are told (`spepolicy.judge.findings.OBSERVATIONS`)
`blackout_over_time_ms_per_s`  list of float: blackout of all causes in equal parts of the guest time
`spepolicy`, `source`, `plugin`, `commit`, `dirty`, `versions`, `machine`, `written_utc`  where the row comes from

A file is written in a hidden folder beside the store, flushed to the disk and then moved, so it is complete or not
there: a process that is killed leaves whole files, and at worst a half one in that folder, which the next sweep
removes.
One sweep at a time may add rows; it holds a lock that ends with its process. No two rows have one `lane_hash`.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from spepolicy.errors import StoreError

__all__ = ["Store"]

SUFFIX = ".parquet"
LOCK = "lock"


class Store:
    """The store in one folder, locked for one sweep. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Open or make the store in *folder*. Raises `StoreError` if it cannot be used, and says why."""
        self.folder = folder.absolute()
        self._beside = self.folder.parent / f".{self.folder.name}.writing"
        self._number = 0
        self._known: dict[str, int] = {}  # lane_hash -> digest
        self._schema: Any = None
        try:
            for made in (self.folder, self._beside):
                made.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._beside / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._take_lock()
            for left in self._beside.glob(f"*{SUFFIX}"):
                left.unlink(missing_ok=True)
            self._read_known()
        except OSError as error:
            self.close()
            if isinstance(error, StoreError):
                raise
            raise self._unusable(error) from error

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others use the store."""
        with suppress(OSError):
            os.close(self._lock)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, lane_hash: str) -> bool:
        return lane_hash in self._known

    # ---- opening -----------------------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"store '{self.folder}' is in use{self._holder()}. Only one sweep at a time may add rows to a store. "
                "Wait for it to end, or choose another store with sweep.store=FOLDER."
            ) from error
        now = datetime.now(UTC).isoformat(timespec="seconds")
        mine = json.dumps({"pid": os.getpid(), "node": platform.node(), "since": now})
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, mine.encode(), 0)

    def _holder(self) -> str:
        try:
            holder = json.loads(os.pread(self._lock, 1000, 0))
            return f" by process {holder['pid']} on {holder['node']}, since {holder['since']}"
        except (OSError, ValueError, KeyError):
            return ""

    def files(self) -> list[Path]:
        """Return the files that hold rows, in the order in which they were written."""
        return sorted(self.folder.glob(f"*{SUFFIX}"))

    def _read_known(self) -> None:
        from pyarrow import parquet

        for path in self.files():
            with self._reading(path):
                schema = parquet.read_schema(path)
                self._check_schema(path, schema)
                table = parquet.read_table(path, columns=["lane_hash", "digest"], partitioning=None)
            pairs = zip(table["lane_hash"].to_pylist(), table["digest"].to_pylist(), strict=True)
            for lane_hash, digest in pairs:
                if lane_hash in self._known:
                    raise StoreError(
                        f"store '{self.folder}' has the row {lane_hash} twice, the second time in '{path.name}'. No "
                        "two rows may have one lane_hash: was a file copied? Remove one of the copies."
                    )
                self._known[lane_hash] = digest

    def _check_schema(self, path: Path, schema: Any) -> None:
        if self._schema is None:
            self._schema = schema
        ours = set(schema.names)
        first = set(self._schema.names)
        if ours != first:
            other = sorted(ours ^ first)
            raise StoreError(
                f"store '{self.folder}': '{path.name}' has other columns than the files before it ({_few(other)}). All "
                "files of a store have the same columns. Move it to a store of its own."
            )

    def _reading(self, path: Path) -> Any:
        return _Reading(self.folder, path)

    def _unusable(self, error: OSError) -> StoreError:
        reason = error.strerror or str(error)
        return StoreError(
            f"store '{self.folder}' cannot be written: {reason}. It must be a folder in which new files can be made. "
            "Make room, or choose another place with sweep.store=FOLDER."
        )

    # ---- rows --------------------------------------------------------------------------------------------------------

    def append(self, columns: Mapping[str, Any]) -> int:
        """Add rows, whose *columns* are numpy arrays or lists of equal length; return how many were new.

        Rows whose lane is in the store already are merged into it: they must be the same, and nothing is written.
        Raises `StoreError` if the file cannot be written; then none of the rows is there.
        """
        import numpy as np
        from pyarrow import parquet

        from spepolicy.lab.arrow import arrow_array

        fresh = self._fresh(columns["lane_hash"], columns["digest"])
        if not fresh:
            return 0
        table = _as_table(columns)
        if len(fresh) < table.num_rows:
            table = table.take(arrow_array(np.array(fresh)))
        if self._schema is not None and set(table.schema.names) != set(self._schema.names):
            other = sorted(set(table.schema.names) ^ set(self._schema.names))
            raise StoreError(
                f"store '{self.folder}' was written by another version of spepolicy: its columns differ "
                f"({_few(other)}). Its rows stay readable, but no row of this version fits. Choose another store with "
                "sweep.store=FOLDER."
            )
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        self._number += 1
        path = self.folder / f"{stamp}-{os.getpid()}-{self._number:06d}{SUFFIX}"
        hidden = self._beside / path.name
        try:
            parquet.write_table(table, hidden, compression="zstd")
            _flush(hidden)
            hidden.rename(path)
            _flush(self.folder)
        except OSError as error:
            hidden.unlink(missing_ok=True)
            raise self._unusable(error) from error
        self._schema = self._schema or table.schema
        self._known.update(zip(table["lane_hash"].to_pylist(), table["digest"].to_pylist(), strict=True))
        return len(fresh)

    def _fresh(self, hashes: Sequence[str], digests: Any) -> list[int]:
        fresh = []
        for row, lane_hash in enumerate(hashes):
            if lane_hash not in self._known:
                fresh.append(row)
            elif self._known[lane_hash] != int(digests[row]):
                raise AssertionError(
                    f"lane {lane_hash} gave records with digest {int(digests[row])}, and {self._known[lane_hash]} when "
                    f"it was stored in '{self.folder}'. A lane depends on its configuration and seed only: this is a "
                    "bug in spepolicy, or a plugin that remembers something outside of vcpus.state."
                )
        return fresh

    def read(self, lane_hashes: Sequence[str]) -> Iterator[Any]:
        """Yield pyarrow tables with the rows of *lane_hashes* that are in the store."""
        import pyarrow
        from pyarrow import compute, parquet

        from spepolicy.lab.arrow import arrow_array

        wanted = arrow_array([name for name in lane_hashes if name in self._known])
        if not len(wanted):
            return
        for path in self.files():
            with self._reading(path):
                table = parquet.read_table(path, partitioning=None)
            mask = compute.is_in(table["lane_hash"].cast(pyarrow.string()), value_set=wanted)
            chosen = table.filter(mask)
            if chosen.num_rows:
                yield chosen


class _Reading:
    """Turns what goes wrong in reading a file into a `StoreError` that says what to do."""

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder, self._path = folder, path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import pyarrow

        if isinstance(error, StoreError) or not isinstance(error, pyarrow.ArrowException | OSError | KeyError):
            return
        raise StoreError(
            f"store '{self._folder}': '{self._path.name}' cannot be read ({' '.join(str(error).split())[:200]}). "
            "A file of a store is written whole, so something has damaged it since. Move it away; "
            "sweep.resume=true computes its rows again and nothing else."
        ) from error


def _as_table(columns: Mapping[str, Any]) -> Any:
    import numpy as np
    import pyarrow

    from spepolicy.judge.metrics import METRICS
    from spepolicy.judge.tables import Categories
    from spepolicy.lab.arrow import arrow_array, arrow_categories

    arrays, fields = [], []
    for name, column in columns.items():
        if isinstance(column, Categories):
            array = arrow_categories(column)
        elif isinstance(column, np.ndarray) and column.ndim == 2:
            flat = arrow_array(column.reshape(-1))
            ends = np.arange(len(column) + 1, dtype=np.int32) * column.shape[1]
            array = pyarrow.ListArray.from_arrays(arrow_array(ends), flat)
        else:
            array = arrow_array(column)
        metric = METRICS.get(name)
        metadata = {"doc": metric.doc, "unit": metric.unit} if metric else None
        arrays.append(array)
        fields.append(pyarrow.field(name, array.type, metadata=metadata))
    return pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields))


def _flush(path: Path) -> None:
    """Wait until what is at *path*, a file or the names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def now_utc() -> str:
    """Return the time for the column `written_utc`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
