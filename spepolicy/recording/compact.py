"""The compact form of a recording: an .npz file of a few bytes an event.

Consecutive events are near in time and often on neighbouring pages, so times and first pages are stored as the
difference from the event before, in the narrowest integer type that holds them all, and deflated. A row an event:

    time_step   unsigned   microseconds since the event before (since the start for the first)
    first_step  signed     first_page minus that of the event before (minus 0 for the first)
    pages       unsigned   end_page - first_page
    op          uint8      HostOp
    notifier    uint8      number of the mmu_notifier_event, 255 for none
    flags       uint8      bit 0 write, bit 1 repointed
    meta        uint8      JSON in UTF-8: format, version, and the fields of `Recording` that are no arrays
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.archive import read_arrays
from spepolicy.errors import OutputError, RecordingError
from spepolicy.recording.lines import damaged
from spepolicy.recording.model import Recording

__all__ = ["load", "save"]

FORMAT = "spepolicy host recording"
VERSION = 1

_ARRAYS = {"time_step": "u", "first_step": "i", "pages": "u", "op": "u", "notifier": "u", "flags": "u"}
_META: dict[str, type] = {
    "ram_pages": int,
    "duration_us": int,
    "scenario": str,
    "kernel": str,
    "source": str,
    "ignored": dict,
    "evidence": dict,
}
_EXPECTED = f"a recording of format version {VERSION}, written by spepolicy.recording.save"
_REMEDY = "Make it again from the log: python -m spepolicy.recording.convert LOG OUT.npz"


def save(recording: Recording, path: str | Path) -> None:
    """Write *recording* to *path* (.npz), all or nothing. The same recording gives the same bytes."""
    path = Path(path)
    if path.suffix != ".npz":
        raise OutputError(f"{path}: a compact recording must end in .npz")
    meta = {"format": FORMAT, "version": VERSION, **{name: getattr(recording, name) for name in _META}}
    arrays = {
        "time_step": _narrow(_steps(recording.time_us), "u"),
        "first_step": _narrow(_steps(recording.first_page.astype(np.int64)), "i"),
        "pages": _narrow(recording.end_page.astype(np.int64) - recording.first_page, "u"),
        "op": recording.op,
        "notifier": recording.notifier,
        "flags": recording.write.astype(np.uint8) | recording.repointed.astype(np.uint8) << 1,
        "meta": np.frombuffer(json.dumps(meta, sort_keys=True).encode(), np.uint8),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def load(path: str | Path) -> Recording:
    """Read a recording that `save` wrote. Raise RecordingError if *path* is anything else, or damaged."""
    path = Path(path)
    try:
        arrays = read_arrays(path, (*_ARRAYS, "meta"))
    except OSError as error:
        raise damaged(path, 0, f"cannot be read: {error.strerror or error}", _EXPECTED, "Check the path.") from error
    except ValueError as error:
        raise damaged(path, 0, str(error), _EXPECTED, _REMEDY) from error
    meta = _read_meta(path, arrays)
    steps = _read_arrays(path, arrays)
    first = np.cumsum(steps["first_step"], dtype=np.int64)
    end = first + steps["pages"].astype(np.int64)
    limit = 2**31 - 1  # what the int32 arrays of a Recording hold; it checks ram_pages itself
    if first.size and (min(first.min(), end.min()) < 0 or max(first.max(), end.max()) > limit):
        raise damaged(path, 0, "first_step and pages lead to pages outside 0..2**31-1", _EXPECTED, _REMEDY)
    try:
        return Recording(
            time_us=np.cumsum(steps["time_step"], dtype=np.int64),
            first_page=first.astype(np.int32),
            end_page=end.astype(np.int32),
            op=steps["op"],
            notifier=steps["notifier"],
            write=(steps["flags"] & 1).astype(np.bool_),
            repointed=(steps["flags"] & 2).astype(np.bool_),
            **meta,
        )
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from error


def _steps(values: NDArray[np.int64]) -> NDArray[np.int64]:
    steps = values.copy()
    steps[1:] -= values[:-1]
    return steps


def _narrow(values: NDArray[np.int64], kind: str) -> NDArray[Any]:
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    types = [np.dtype(f"{kind}{size}") for size in (1, 2, 4, 8)]
    narrowest = next(it for it in types if np.iinfo(it).min <= low and high <= np.iinfo(it).max)
    return values.astype(narrowest)


def _read_meta(path: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    try:
        meta = json.loads(arrays["meta"].astype(np.uint8).tobytes())
        known = meta["format"] == FORMAT
        version = meta["version"]
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(path, 0, "no readable 'meta' in it", _EXPECTED, _REMEDY) from error
    if not known or version != VERSION:
        problem = f"format {meta['format']!r}, version {version!r}"
        raise damaged(path, 0, problem, _EXPECTED, _REMEDY)
    for name, wanted in _META.items():
        if type(meta.get(name)) is not wanted:
            raise damaged(path, 0, f"'{name}' in meta is {meta.get(name)!r}", wanted.__name__, _REMEDY)
    for name in ("ignored", "evidence"):
        if not all(type(count) is int for count in meta[name].values()):
            raise damaged(path, 0, f"'{name}' in meta is {meta[name]!r}", "counts by name", _REMEDY)
    return {name: meta[name] for name in _META}


def _read_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise damaged(path, 0, f"no array {', '.join(missing)}", _EXPECTED, _REMEDY)
    rows = arrays["op"].shape
    for name, kind in _ARRAYS.items():
        array = arrays[name]
        narrow = array.dtype == np.uint8 or name not in ("op", "notifier", "flags")
        if array.dtype.kind != kind or not narrow or array.ndim != 1 or array.shape != rows:
            problem = f"array {name} is {array.dtype}{list(array.shape)}"
            expected = f"integers of kind {kind} (op, notifier, flags: uint8), shape {list(rows)} as op has"
            raise damaged(path, 0, problem, expected, _REMEDY)
    if (arrays["flags"] > 3).any():
        raise damaged(path, 0, "array flags holds values above 3", "bits 0 and 1", _REMEDY)
    return {name: arrays[name] for name in _ARRAYS}
