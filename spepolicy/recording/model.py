"""A recording: what a real host's memory management did to one guest's memory, in order, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import RecordingError
from spepolicy.machine.hostops import HostOp

__all__ = ["NO_NOTIFIER", "Recording"]

NO_NOTIFIER = 255  # in `Recording.notifier`: no MMU notifier event came before
_KEEPS_MAPPING = (HostOp.NONE, HostOp.CPU_TOUCH, HostOp.AGE, HostOp.DIRTY_LOG)


def _no_flags() -> NDArray[np.bool_]:
    return np.zeros(0, np.bool_)


@dataclass(frozen=True, eq=False)
class Recording:
    """What happened to the stage 2 mappings of one guest, event by event, in the order of the host's trace.

    Pages are indices into guest RAM, in 4 KiB pages: page 0 is the first page of RAM. Every range is half open and not
    empty. All arrays have one row per event, n rows, and are read-only.
    """

    time_us: NDArray[np.int64]  # [n] microseconds since the scenario's start, never decreasing, 0..duration_us
    first_page: NDArray[np.int32]  # [n] first page of the range, 0..ram_pages-1
    end_page: NDArray[np.int32]  # [n] page behind the range, 1..ram_pages
    op: NDArray[np.uint8]  # [n] HostOp
    notifier: NDArray[np.uint8]  # [n] number of the mmu_notifier_event that announced it, 0..7; NO_NOTIFIER if none
    write: NDArray[np.bool_]  # [n] CPU_TOUCH: the mapping is writable from here on; False for everything else
    ram_pages: int  # size of guest RAM in pages
    duration_us: int  # length of the recording in microseconds
    scenario: str  # name in the `SCENARIO name start` mark, empty if there was none
    kernel: str  # host kernel, empty if not known
    source: str  # file that the recording was read from
    # lines of the log that did not become events, by kind; names in brackets count something else than lines
    ignored: dict[str, int] = field(default_factory=dict)
    # how many events rest on which kind of line and, for unmaps, on which rule of `spepolicy.recording.classify`
    evidence: dict[str, int] = field(default_factory=dict)
    # [n] unmaps after which the host itself mapped the page again at once, read-only and without a fault of the guest
    # (MMU notifier change_pte: KSM and copy-on-write, Linux before 6.10): these pages are mapped afterwards
    repointed: NDArray[np.bool_] = field(default_factory=_no_flags)

    def __post_init__(self) -> None:
        """Check shapes, types and ranges, and make the arrays read-only."""
        if self.repointed.size == 0:
            object.__setattr__(self, "repointed", np.zeros(self.time_us.shape, np.bool_))
        wanted: dict[str, Any] = {
            "time_us": np.int64,
            "first_page": np.int32,
            "end_page": np.int32,
            "op": np.uint8,
            "notifier": np.uint8,
            "write": np.bool_,
            "repointed": np.bool_,
        }
        for name, dtype in wanted.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != (self.time_us.size,):
                self._fail(
                    f"{name} is {array.dtype}{list(array.shape)}, expected {np.dtype(dtype)}[{self.time_us.size}]"
                )
        if self.ram_pages < 1:
            self._fail(f"ram_pages is {self.ram_pages}, expected at least 1")
        time, first, end, ram = self.time_us, self.first_page, self.end_page, self.ram_pages
        self._check("time_us", time, (time >= 0) & (time <= self.duration_us), f"0..{self.duration_us} (duration_us)")
        self._check("time_us", time[1:], time[1:] >= time[:-1], "not below the row before")
        self._check("first_page", first, first >= 0, "0 or more")
        self._check("end_page", end, (end > first) & (end <= ram), f"above first_page, up to {ram}")
        self._check("op", self.op, (self.op > HostOp.NONE) & (self.op <= max(HostOp)), "a HostOp except NONE")
        known = (self.notifier <= 7) | (self.notifier == NO_NOTIFIER)
        self._check("notifier", self.notifier, known, f"0..7 or {NO_NOTIFIER}")
        self._check("write", self.write, ~self.write | (self.op == HostOp.CPU_TOUCH), "False unless op is CPU_TOUCH")
        self._check("repointed", self.repointed, ~self.repointed | self.unmaps, "False unless the event unmaps")
        for name in wanted:
            getattr(self, name).flags.writeable = False

    def __len__(self) -> int:
        """Return the number of events, n."""
        return int(self.time_us.size)

    @property
    def unmaps(self) -> NDArray[np.bool_]:
        """bool[n]: events that take stage 2 mappings away (see also `repointed`)."""
        return ~np.isin(self.op, _KEEPS_MAPPING)

    def counts(self) -> dict[HostOp, int]:
        """Return how many events there are of each operation that occurs, most frequent first."""
        number = np.bincount(self.op, minlength=len(HostOp))
        return {HostOp(i): int(number[i]) for i in np.argsort(-number, kind="stable") if number[i]}

    def _check(self, name: str, array: NDArray[Any], good: NDArray[np.bool_], rule: str) -> None:
        bad = np.flatnonzero(~good)
        if bad.size:
            self._fail(f"{name} holds {array[bad[0]]} ({bad.size} bad of {array.size}), expected {rule}")

    def _fail(self, problem: str) -> None:
        raise RecordingError(
            f"recording '{self.source}': {problem}. Make the recording again from its log: "
            "python -m spepolicy.recording.convert LOG OUT.npz"
        )
