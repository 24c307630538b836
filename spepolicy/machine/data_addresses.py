"""Which data a sampled load or store accesses: a virtual address for the event log.

No rule of the machine depends on it, so nothing here is compiled and nothing of it is in the machine's tables: the log
keeps random bits for each sampled access (`spepolicy.machine.trace`), and readers of the log turn them into an address.

A workload that was recorded or captured knows the addresses of each of its functions as *extents*, runs of memory with
a share of the accesses each; see `spepolicy.workload_data`. For others the address says no more than the level that
served the access: it lies somewhere in as many bytes as fit that cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["DATA_BITS", "KINDS", "SHARE_BITS", "DataAddresses", "Region", "data_addresses"]

KINDS = ("load", "load_miss", "store", "store_miss")
"""Accesses that are told apart: loads (and atomics) and stores, each in the L1 cache or beyond."""

DATA_BITS = 53  # random bits of an access in the log
SHARE_BITS = 24  # of which so many choose the extent, the low ones
_PLACE_BITS = DATA_BITS - SHARE_BITS

# Bytes that accesses of one level range over: the cache that serves them, or memory (an assumption; Neoverse N1 has
# 64 KiB, 1 MiB, and a system level cache of tens of MiB).
_REACH_L1, _REACH_L2, _REACH_LLC, _REACH_DRAM = (1 << bits for bits in (16, 20, 24, 30))
_L1D_REFILL, _LLC_ACCESS, _LLC_MISS = 1 << 3, 1 << 8, 1 << 9
_STORE_ONLY = 4  # OpType of a store that is no atomic
_USER_DATA = 0x0000_AAAB_0000_0000
_KERNEL_DATA = 0xFFFF_8000_0000_0000


class Region(NamedTuple):
    """A part of the program's memory that has a name: [heap], [stack], a file."""

    name: str
    begin: int  # VA
    size: int  # bytes


class DataAddresses(NamedTuple):
    """The extents of a workload's functions, as lists one after the other."""

    list_of: NDArray[np.int64]  # [F, KINDS] number of the list of a function's accesses of a kind; -1 for none
    below: NDArray[
        np.int64
    ]  # [E] number of its list << SHARE_BITS, plus the shares up to and with it in 2**-SHARE_BITS
    begin: NDArray[np.uint64]  # [E] VA
    places: NDArray[np.int64]  # [E] how many addresses there are in it, below 2**34
    step: NDArray[np.uint64]  # [E] bytes from one to the next
    regions: tuple[Region, ...]


def data_addresses(
    bits: NDArray[np.uint64],
    kind: NDArray[np.integer],
    events: NDArray[np.uint64],
    level: NDArray[np.integer],
    function: NDArray[np.integer],
    known: DataAddresses | None,
) -> NDArray[np.uint64]:
    """Return the VA of each of n loads and stores.

    :param bits: `DATA_BITS` random ones of each access.
    :param kind: machine.scenario.OpType.
    :param events: Events packet.
    :param level: exception level, 0 or 1.
    :param function: index of Workload.function_names.
    """
    refill = events & np.uint64(_L1D_REFILL) != 0
    reach = np.select(
        [events & np.uint64(_LLC_MISS) != 0, events & np.uint64(_LLC_ACCESS) != 0, refill],
        [_REACH_DRAM, _REACH_LLC, _REACH_L2],
        _REACH_L1,
    ).astype(np.uint64)
    base = np.where(level == 1, np.uint64(_KERNEL_DATA), np.uint64(_USER_DATA))
    addresses: NDArray[np.uint64] = base + (bits & (reach - np.uint64(8)))
    if known is None or not len(known.below):
        return addresses
    lists = known.list_of[function, 2 * (kind == _STORE_ONLY) + refill]
    chosen = lists >= 0
    share = (bits[chosen] & np.uint64((1 << SHARE_BITS) - 1)).astype(np.int64)
    extent = np.searchsorted(known.below, (lists[chosen] << SHARE_BITS) + share, side="right")
    place = (bits[chosen] >> np.uint64(SHARE_BITS)) * known.places[extent].astype(np.uint64) >> np.uint64(_PLACE_BITS)
    addresses[chosen] = known.begin[extent] + place * known.step[extent]
    return addresses
