"""Ticks of the generic counter and perf's nanoseconds, as PERF_RECORD_TIME_CONV relates them.

perf computes ns = zero + (ticks >> shift) * mult + ((ticks & (2**shift - 1)) * mult >> shift), in 64 bits that wrap
(tools/perf/util/tsc.c, tsc_to_perf_time(); arm64 takes shift, mult and zero from the vDSO's sched_clock data).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.perfdata.layout import TimeConv

__all__ = ["conversion", "ns_to_ticks", "ticks_to_ns"]

NS = 1_000_000_000


def conversion(frequency_hz: int) -> TimeConv:
    """Return a conversion for a counter of *frequency_hz* whose zero is time 0.

    The largest shift that keeps the multiplier below 2**32, so that the products stay within 64 bits.
    """
    shift = 31
    while shift > 0 and (NS << shift) // frequency_hz >= 1 << 32:
        shift -= 1
    return TimeConv(shift=shift, multiplier=((NS << shift) + frequency_hz // 2) // frequency_hz, zero=0)


def ticks_to_ns(conv: TimeConv, ticks: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return perf's time in ns of counter values, as perf computes it: 64-bit arithmetic that wraps."""
    with np.errstate(over="ignore"):
        cycles = np.asarray(ticks, np.uint64)
        if conv.cap_short:
            base, mask = np.uint64(conv.cycles), np.uint64(conv.mask)
            cycles = base + ((cycles - base) & mask)
        shift = np.uint64(min(conv.shift, 63))
        multiplier = np.uint64(conv.multiplier)
        low = cycles & ((np.uint64(1) << shift) - np.uint64(1))
        ns = np.uint64(conv.zero) + (cycles >> shift) * multiplier + ((low * multiplier) >> shift)
    return ns.view(np.int64)


def ns_to_ticks(conv: TimeConv, ns: int) -> int:
    """Return the first counter value whose time is *ns* or later (for conversions made here: zero 0, no short form)."""
    ticks = (ns << conv.shift) // conv.multiplier
    while int(ticks_to_ns(conv, np.array([ticks], np.uint64))[0]) < ns:
        ticks += 1
    return ticks
