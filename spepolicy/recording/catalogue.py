"""The recordings that the package ships, and how to open one by name or path."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from spepolicy.errors import RecordingError
from spepolicy.recording.compact import load
from spepolicy.recording.model import Recording
from spepolicy.recording.reader import read_log

__all__ = ["DEFAULT", "open_recording", "shipped"]

DEFAULT = "numa"  # the host that replays use when none is named

_DATA = Path(__file__).with_name("data")
_SHIPPED = {
    "numa": "NUMA balancing while the VMM is moved between nodes: 2 scans of all RAM, 8496 page migrations by faults",
    "numa_pinned": "NUMA balancing, all RAM pinned: 2 scans still unmap all RAM, nothing migrates",
    "ksm": "KSM merging: 34864 unmaps, nearly all mapped again read-only by the host at once",
    "ksm_pinned": "KSM, all RAM pinned: 13321 unmaps for merges that never succeed, the guest faults pages in again",
    "swap": "memory.high lowered from 110 MiB to 75 MiB for a guest of 256 MiB: 79832 agings, 28417 pages reclaimed",
    "compact": "four runs of /proc/sys/vm/compact_memory on fragmented memory: 485 pages move",
    "migrate": "migratepages from node 0 to 1 and back: 55648 unmaps, with retries",
    "fork": "the VMM forks twice with RAM not excluded: all RAM unmapped each time, 1131 pages copied on write",
    "dirty": "dirty logging with 8 rounds of KVM_GET_DIRTY_LOG, as in a migration's pre-copy: no notifier at all",
}


def shipped() -> dict[str, str]:
    """Return the names of the recordings that the package ships, each with one line on what it holds."""
    return dict(_SHIPPED)


def open_recording(name_or_path: str | Path, **how: Any) -> Recording:
    """Open a shipped recording by name (`shipped()`), an .npz by `save`, or a trace that `read_log` reads, *how* being
    its keyword arguments.

    A string without a folder or suffix is a name. Raise RecordingError for a name that is not shipped, with the nearest
    ones, and for a file that cannot be read.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in _SHIPPED:
        return load(_DATA / f"{name_or_path}.npz")
    if path.suffix == ".npz":
        return load(path)
    if path.suffix or len(path.parts) > 1 or path.exists():
        return read_log(path, **how)
    near = difflib.get_close_matches(str(name_or_path), _SHIPPED, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    raise RecordingError(
        f"recording '{name_or_path}' is not shipped, and there is no such file.{hint} Shipped: {', '.join(_SHIPPED)}. "
        "Otherwise give the path of an .npz or of a kernel trace."
    )
