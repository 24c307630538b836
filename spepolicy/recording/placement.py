"""Where the pages of a recording lie in another guest's memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import RecordingError
from spepolicy.recording.model import Recording

__all__ = ["OUTSIDE", "PLACEMENTS", "place"]

OUTSIDE = "(events outside the guest's memory, where host.placement put them)"  # in `Recording.ignored`
PLACEMENTS = ("same", "scale", "fold")


def place(recording: Recording, ram_pages: int, placement: str = "same", offset_pages: int = 0) -> Recording:
    """Return *recording* as it happens to a guest of *ram_pages* pages (4 KiB).

    same: page n stays page n. scale: the whole of the recorded memory is stretched or squeezed over the whole of the
    guest's; a range grows or shrinks with it and keeps one page at least. fold: page n is page n modulo *ram_pages*; a
    range that crosses the end is cut there, and its rest comes first in memory, at the same time. *offset_pages* is
    added before; what then lies outside the guest is left out and counted (fold leaves nothing out).
    """
    if placement not in PLACEMENTS:
        raise RecordingError(f"placement '{placement}' is not one of {', '.join(PLACEMENTS)}")
    first = recording.first_page.astype(np.int64)
    end = recording.end_page.astype(np.int64)
    if placement == "scale" and ram_pages != recording.ram_pages:
        length = np.maximum((end - first) * ram_pages // recording.ram_pages, 1)
        first = first * ram_pages // recording.ram_pages
        end = np.minimum(first + length, ram_pages)
    first, end = first + offset_pages, end + offset_pages
    rows = np.arange(len(recording))
    if placement == "fold":
        rows, first, end = _folded(rows, first, end, ram_pages)
    low, high = np.maximum(first, 0), np.minimum(end, ram_pages)
    kept = low < high
    chosen = rows[kept]
    columns = ("time_us", "op", "notifier", "write", "repointed")
    outside = int((~kept).sum())
    return replace(
        recording,
        first_page=low[kept].astype(np.int32),
        end_page=high[kept].astype(np.int32),
        ram_pages=ram_pages,
        ignored=recording.ignored | ({OUTSIDE: outside} if outside else {}),
        **{name: getattr(recording, name)[chosen] for name in columns},
    )


def _folded(
    rows: NDArray[np.int64], first: NDArray[np.int64], end: NDArray[np.int64], ram_pages: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    length = np.minimum(end - first, ram_pages)
    first = first % ram_pages
    over = np.flatnonzero(first + length > ram_pages)
    rows = np.concatenate([rows, rows[over]])
    starts = np.concatenate([first, np.zeros(len(over), np.int64)])
    ends = np.concatenate([np.minimum(first + length, ram_pages), first[over] + length[over] - ram_pages])
    order = np.argsort(rows, kind="stable")
    return rows[order], starts[order], ends[order]
